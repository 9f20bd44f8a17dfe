"""The benchmark: its rows, the FLOPs that they count, and the program."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntm_jax.errors import UserError
from ntm_jax.runtime import flops
from ntm_jax.tools.rates import benchmark, rows
from ntm_jax.training import state
from tests.common import TINY, experiment, new_run, python, random_run, tiny_config

KEYS = ["name", "items_per_second", "flops_per_second", "limit", "share_of_limit", "runs"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(benchmark, "SECONDS", 0.02)
    monkeypatch.setattr(flops, "MATRICES", (64, 128))
    monkeypatch.setattr(benchmark, "COPIED", 1 << 20)


def setting(**overrides) -> rows.BenchmarkInput:
    """The setting of an untrained run with its data."""
    config = tiny_config(**overrides)
    data = (config.data.open(split) for split in (config.data.split, config.evaluate.split))
    return rows.BenchmarkInput(new_run(config), config.sample.num, *data)


@pytest.mark.slow
def test_rows_agree_with_themselves():
    timed = benchmark._rows(rows.TRAINING, setting(), 3, "")
    assert [row["name"] for row in timed] == [
        "train step", "forward pass", "input pipeline", "likelihood evaluation"]
    for row in timed:
        assert list(row) == KEYS
        assert len(row["runs"]) == 3
        assert row["items_per_second"] == np.median(row["runs"])
        assert min(row["runs"]) > 0
        if row["flops_per_second"] is not None:
            assert row["share_of_limit"] == pytest.approx(row["flops_per_second"] / row["limit"])
    assert timed[2]["flops_per_second"] is None


@pytest.fixture(scope="module")
def run():
    """A run of random weights, whose inverse takes sweeps."""
    return random_run(new_run(tiny_config()), step=4, workdir="runs/tiny")


@pytest.mark.slow
def test_the_rows_of_a_run_measure_its_sampler(run):
    timed = benchmark.benchmark_run(run, 1, batch=6, only="inverse")
    extra = {"images, decoder inverse": [],
             "inverse, sequential": ["tokens", "auto", "round_trip_error"],
             "inverse, parallel": ["tokens", "auto", "round_trip_error", "sweeps"]}
    assert [row["name"] for row in timed] == list(extra)
    for row in timed:
        assert list(row) == KEYS + extra[row["name"]]
        assert row["items_per_second"] > 0
        assert row["share_of_limit"] == pytest.approx(row["flops_per_second"] / row["limit"])
    for row in timed[1:]:
        assert row["tokens"] == 16
        assert 0 < row["round_trip_error"] < 1e-4  # float32 rounding of numbers of order 1
    rough, fine = timed[2]["sweeps"].values()
    assert all(1 < a < b < 16 for a, b in zip(rough, fine, strict=True))
    printed = benchmark.table(timed)
    assert f"to 0.001, clean to noisy: {rough[0]:.1f}, {rough[1]:.1f}" in printed


@pytest.mark.slow
def test_a_samplers_flops_are_those_of_its_parts(run):
    """The inverse decoder inverts one of the two levels, the score decoder both.

    The denoiser is one more pass of the predictor.
    """
    cases = {name: make(rows.BenchmarkInput(run, 6)) for name, make in rows.SAMPLING.items()}
    assert {name for name, case in cases.items() if case is None} == {
        f"images, decoder {solver}" for solver in ("euler", "heun")}
    inverse, score, denoiser, predictor, sequential, parallel, denoising = (
        case.flops for case in cases.values() if case)
    assert sequential == parallel == 2 * (inverse - predictor) > 0
    assert score == predictor + sequential + denoising
    assert denoiser == predictor * 3 / 2


@pytest.mark.slow
def test_a_step_is_three_evaluations(monkeypatch):
    """The gradient of a product is two products, which the first layers' inputs do not need."""
    monkeypatch.setattr(state, "initialize", state.abstract)
    tiny = setting(**{"data.batch_size": 20, "evaluate.batch_size": 20})
    step, forward, evaluation = (
        make(tiny) for make in (rows._train_step, rows._forward, rows._likelihood))
    assert step.items == forward.items == evaluation.items == 20
    assert 2.7 * forward.flops < step.flops < 3 * forward.flops
    assert evaluation.flops == forward.flops


def test_a_setting_varies():
    values = experiment()
    values.update_from_flattened_dict(TINY)
    found = list(benchmark.varied(values.to_dict(), "model.width,model.transporter_width:16,32"))
    assert [name for name, *_ in found] == [
        f"model.width,model.transporter_width={value}" for value in (16, 32)]
    assert [(c.model.width, c.model.transporter_width) for *_, c in found] == [(16, 16), (32, 32)]
    with pytest.raises(UserError, match="names seed, which is no setting of a section"):
        list(benchmark.varied(values.to_dict(), "seed:0,1"))


@pytest.mark.slow
def test_the_program_writes_rows(tmp_path):
    done = python("-m", "launch.benchmark", "--config=experiments/digits.py", "--runs=1",
                  "--rows=pipeline", *(f"--config.{key}={value}" for key, value in TINY.items()),
                  f"--json={tmp_path / 'rows.json'}")
    timed = json.loads((tmp_path / "rows.json").read_text())
    assert [list(row) for row in timed] == [KEYS]
    assert re.match(r"1 x \S.*, jax [\d.]+, medians of 1 runs\n", done.stdout)
    assert benchmark.table(timed) in done.stdout


def test_products_and_convolutions_are_counted_and_weighted_sums_are_not():
    matrix, vector = jnp.ones((3, 4)), jnp.ones(4)
    assert flops.count(jnp.matmul, matrix, vector) == 0
    assert flops.count(lambda a, b: jnp.einsum("nc,kc->nkc", a, b), matrix, matrix) == 0
    assert flops.count(jnp.matmul, matrix, vector[:, None]) == 2 * 3 * 4
    conv = functools.partial(jax.lax.conv_general_dilated, window_strides=(2, 2), padding="VALID",
                             dimension_numbers=("NHWC", "HWIO", "NHWC"))
    assert flops.count(conv, jnp.ones((5, 7, 7, 2)), jnp.ones((3, 3, 2, 4))) == (
        2 * 5 * 3 * 3 * 4 * 3 * 3 * 2)
