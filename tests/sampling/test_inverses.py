"""The choice between the transporter's inverses: by the arithmetic of the chip that runs them."""

import dataclasses

import jax
import pytest

from ntm_jax.analysis import inverses as table
from ntm_jax.runtime.chips import CPU, Chip, chip_of
from ntm_jax.runtime.chips.gpu import CARDS
from ntm_jax.runtime.chips.tpu import CHIPS
from ntm_jax.sampling import inverses


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
    config = dataclasses.replace(table.model(256, 2048), precision=precision)
    found = inverses.seconds(config, rows, chip, sweeps=1)
    return found["sequential"] / found["parallel"]


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
    assert break_even(1, CARDS["h100"].chip) == pytest.approx(2 * 66.9 / 3.352, rel=0.02)


def test_kernels_that_wait_for_each_other_bound_small_networks():
    config, chip = table.model(64, 64), CHIPS["v5p"]
    found = inverses.seconds(config, 1, chip, sweeps=4)
    step = 2 * inverses.KERNELS_PER_LAYER * chip.latency
    assert found["parallel"] == pytest.approx(4 * step)
    assert found["sequential"] == pytest.approx(64 * step, rel=0.01)


@pytest.mark.parametrize(("device", "rows", "shape", "chosen"), [
    (V5P, 1, {}, "parallel"), (V5P, 4, {}, "sequential"), (H100, 1, {}, "parallel"),
    (H100, 4, {}, "sequential"), (V5P, 64, {"data": 8, "fsdp": 8}, "parallel"),
    (V5P, 65, {"data": 8, "fsdp": 8}, "sequential"), (Device("cpu", "cpu"), 1, {}, "sequential")])
def test_auto_counts_the_rows_of_one_chip(device, rows, shape, chosen):
    config, mesh = table.model(256, 2048), Mesh(device, **shape)
    assert inverses.choose("auto", config, rows, mesh) == chosen
    for named in ("parallel", "sequential"):
        assert inverses.choose(named, config, rows, mesh) == named


def test_unknown_devices_invert_token_by_token():
    assert inverses.choose("auto", table.model(256, 64), 1, None) == "sequential"


@pytest.mark.parametrize(("device", "chip"), [
    (V5P, CHIPS["v5p"]), (Device("tpu", "TPU v6 lite"), CHIPS["v6e"]), (H100, CARDS["h100"].chip),
    (Device("gpu", "NVIDIA B200"), CARDS["b200"].chip), (Device("cpu", "cpu"), CPU),
    (Device("gpu", "NVIDIA A10"), CARDS["h100"].chip), (Device("tpu", "TPU v9"), CHIPS["v5p"])])
def test_a_device_has_the_figures_of_its_kind(device, chip):
    assert chip_of(device) == chip


def test_the_table_holds_every_prediction():
    rows = table.predicted()
    assert len(table.predicted_table(rows).splitlines()) == len(rows) + 1
    (found,) = (row for row in rows if (row["tokens"], row["width"], row["rows"]) == (256, 2048, 1))
    assert found["chips"]["v5p"]["auto"] == "parallel"


@pytest.mark.slow
def test_the_times_here_are_those_of_the_choice(monkeypatch):
    monkeypatch.setattr(table, "SIZES", ((16, 64, 2),))
    monkeypatch.setattr(table, "SECONDS", 0)
    (row,) = table.measured(1)
    assert row["auto"] == "sequential"
    assert row["parallel"] == pytest.approx(8 * row["sweep"])
    best = min(row["parallel"], row["sequential"])
    assert row["lost"] == pytest.approx(row["sequential"] / best - 1)
    assert row["predicted"] == inverses.seconds(table.model(16, 64), 2, chip_of(jax.devices()[0]))
    assert "sequential" in table.measured_table([row])
