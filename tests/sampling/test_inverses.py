"""The choice between the transporter's inverses: by the arithmetic of the chip that runs them."""

import dataclasses

import jax.numpy as jnp
import pytest

from ntm_jax.core.config import ModelConfig
from ntm_jax.runtime.chips import CHIPS, Chip
from ntm_jax.sampling import inverses


def model(tokens: int, width: int) -> ModelConfig:
    """A transporter of one block of two layers, at the precision of exact inverses."""
    head = min(width, 256) // 2
    return ModelConfig(
        grid=(1, tokens), dim=16, steps=(4,), width=width, head_size=head,
        kv_heads=width // head, mlp_ratio=4, positions="rotary", transporter_width=width,
        transporter_blocks=1, transporter_layers=2, predictor_layers=1, head="direct",
        log_scale_bound=2.0, data_std=1.0, dtype=jnp.float32, transporter_dtype=jnp.float32,
        remat="none", scan=False, precision="highest")


class Device:
    def __init__(self, platform: str, kind: str):
        self.platform, self.device_kind = platform, kind


class Mesh:
    """A mesh of equal devices, as far as the choice reads it."""

    def __init__(self, device: Device, **shape: int):
        self.shape = {"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1} | shape
        self.devices = self
        self.flat = [device]


V5P, H100 = Device("tpu", "TPU v5"), Device("gpu", "NVIDIA H100 80GB HBM3")


def break_even(rows: int, chip: Chip, precision: str | None = "highest") -> float:
    """The sweeps that take as long as the sequential inverse of 256 tokens of width 2,048."""
    config = dataclasses.replace(model(256, 2048), precision=precision)
    found = inverses.seconds(config, rows, chip)
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
    (Device("cpu", "cpu"), 1, {}, "sequential")])
def test_auto_counts_the_rows_of_one_chip(device, rows, shape, chosen):
    config, mesh = model(256, 2048), Mesh(device, **shape)
    assert inverses.choose("auto", config, rows, mesh) == chosen
    for named in ("parallel", "sequential"):
        assert inverses.choose(named, config, rows, mesh) == named
