"""The choice between the transporter's inverses: by the arithmetic of the chip that runs them."""

import dataclasses
from types import SimpleNamespace

import pytest

from ntm_jax.core.config import ModelConfig
from ntm_jax.runtime.chips import CHIPS, Chip
from ntm_jax.sampling import inverses
from tests.core.conftest import TINY

# 256 tokens of width 2,048, at the precision of exact inverses
MODEL = ModelConfig(**TINY | {
    "grid": (1, 256), "width": 2048, "transporter_width": 2048, "head_size": 128, "kv_heads": 16,
    "mlp_ratio": 4, "transporter_layers": 2, "precision": "highest"})
V5P = SimpleNamespace(platform="tpu", device_kind="TPU v5")
H100 = SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3")
CPU = SimpleNamespace(platform="cpu", device_kind="cpu")


def break_even(rows: int, chip: Chip, precision: str | None = "highest") -> float:
    """The sweeps that take as long as the sequential inverse."""
    found = inverses.seconds(dataclasses.replace(MODEL, precision=precision), rows, chip)
    return inverses.MAX_TYPICAL_SWEEPS * found["sequential"] / found["parallel"]


def test_the_break_even_is_that_of_the_ridge():
    """R S = 2 FLOP/s over byte/s for float32 weights, and more by the reading of the cache."""
    free = dataclasses.replace(CHIPS["v5p"], latency=0.0)
    rule = 2 * free.flops / free.memory
    # A step reads 160 tokens of a row's cache on average, 2 W numbers each, beside 12 W^2 weights.
    cache = 1 + 28 * 160 * 2 / (12 * 2048)
    attention = 1 + 4 * 256 / (24 * 2048)
    assert break_even(28, free, None) == pytest.approx(rule * cache / attention / 28)
    assert break_even(28, free) == pytest.approx(rule / 6 * cache / attention / 28)
    assert break_even(1, free, None) == pytest.approx(256, rel=0.02)  # weights bound a sweep too
    assert break_even(1, CHIPS["h100"]) == pytest.approx(2 * 66.9 / 3.352, rel=0.02)


@pytest.mark.parametrize(("device", "rows", "shape", "chosen"), [
    (V5P, 1, {}, "parallel"), (V5P, 4, {}, "sequential"), (H100, 1, {}, "parallel"),
    (V5P, 64, {"data": 8, "fsdp": 8}, "parallel"), (V5P, 65, {"data": 8, "fsdp": 8}, "sequential"),
    (CPU, 1, {}, "sequential")])
def test_auto_counts_the_rows_of_one_chip(device, rows, shape, chosen):
    axes = {"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1} | shape
    mesh = SimpleNamespace(shape=axes, devices=SimpleNamespace(flat=[device]))
    for asked, expected in (("auto", chosen), ("parallel", "parallel"), ("sequential",) * 2):
        assert inverses.choose(asked, MODEL, rows, mesh) == expected
