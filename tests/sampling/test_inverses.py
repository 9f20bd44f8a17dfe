"""The choice between the transporter's inverses: by the arithmetic of the chip that runs them."""

from types import SimpleNamespace

import pytest

from ntm_jax.core.config import ModelConfig
from ntm_jax.sampling import inverses
from tests.core.conftest import TINY

# 256 tokens of width 2,048, at the precision of exact inverses
MODEL = ModelConfig(**TINY | {
    "grid": (1, 256), "width": 2048, "transporter_width": 2048, "head_size": 128, "kv_heads": 16,
    "mlp_ratio": 4, "transporter_layers": 2, "precision": "highest"})
V5P = SimpleNamespace(platform="tpu", device_kind="TPU v5")
H100 = SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3")
CPU = SimpleNamespace(platform="cpu", device_kind="cpu")


@pytest.mark.parametrize(("device", "rows", "shape", "chosen"), [
    (V5P, 1, {}, "parallel"), (V5P, 4, {}, "sequential"), (H100, 1, {}, "parallel"),
    (V5P, 64, {"data": 8, "fsdp": 8}, "parallel"), (V5P, 65, {"data": 8, "fsdp": 8}, "sequential"),
    (CPU, 1, {}, "sequential")])
def test_auto_counts_the_rows_of_one_chip(device, rows, shape, chosen):
    axes = {"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1} | shape
    mesh = SimpleNamespace(shape=axes, devices=SimpleNamespace(flat=[device]))
    for asked, expected in (("auto", chosen), ("parallel", "parallel"), ("sequential",) * 2):
        assert inverses.choose(asked, MODEL, rows, mesh) == expected
