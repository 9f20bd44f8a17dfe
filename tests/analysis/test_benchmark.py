"""The benchmark: what its rows say, what it counts, and the program."""

import dataclasses
import json
import re
import time

import jax
import numpy as np
import pytest

from ntm_jax.analysis import benchmark
from ntm_jax.api import Run
from ntm_jax.core import sampling
from ntm_jax.data import pipeline
from ntm_jax.errors import UserError
from ntm_jax.runtime import flops, sharding
from ntm_jax.training import state
from tests.common import TINY, as_run, python, randomised, rehearsal, setup, tiny_config

pytestmark = pytest.mark.usefixtures("quick_compilation")
KEYS = ["name", "items_per_second", "flops_per_second", "limit", "share_of_limit", "runs"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(benchmark, "SECONDS", 0.02)
    monkeypatch.setattr(flops, "MATRICES", (64, 128))
    monkeypatch.setattr(benchmark, "COPIED", 1 << 20)


def setting(**overrides) -> benchmark.Setting:
    config = tiny_config(**overrides)
    source, held_out = (config.data.open(split) for split in (config.data.split, config.evaluate.split))
    return benchmark.Setting(config, sharding.make_mesh(config.mesh), source, held_out)


def test_rows_agree_with_themselves():
    rows = benchmark._rows(benchmark.TRAINING, setting(), 3, "")
    assert [row["name"] for row in rows] == ["train step", "forward pass", "input pipeline", "likelihood evaluation"]
    for row in rows:
        assert list(row) == KEYS
        assert len(row["runs"]) == 3
        assert row["items_per_second"] == np.median(row["runs"])
        assert min(row["runs"]) > 0
        if row["flops_per_second"] is not None:
            assert row["share_of_limit"] == pytest.approx(row["flops_per_second"] / row["limit"])
    pipeline = rows[2]
    assert pipeline["flops_per_second"] is None
    example = 64 * 4 + 4 + 4  # pixels in float32, the label and the index
    assert pipeline["share_of_limit"] == pytest.approx(pipeline["items_per_second"] * example / pipeline["limit"])
    printed = benchmark.table(rows).splitlines()
    assert len(printed) == 7
    assert f"gives {pipeline['items_per_second'] / rows[0]['items_per_second']:.1f} examples" in printed[-2]
    slower = rows[1]["items_per_second"] / rows[3]["items_per_second"]
    assert f"takes {slower:.2f} times as long as a train step's forward pass" in printed[-1]


@pytest.fixture(scope="module")
def run():
    """A load.Run of random weights, whose inverse takes sweeps."""
    config = tiny_config()
    source, model, mesh = setup(config)
    return Run(config, pipeline.spec(source, 2), model, randomised(state.initialize(as_run(config, model, mesh)).params), 4, mesh, "runs/tiny")


@rehearsal
def test_rows_of_a_run_are_of_its_sampler(run):
    rows = benchmark.benchmark_run(run, 1, batch=6)
    names = ["images, decoder inverse", "images, decoder score", "images, decoder denoiser", "predictor's steps", "inverse, sequential",
             "inverse, parallel", "score denoising"]
    assert [row["name"] for row in rows] == names
    extra = {"inverse, sequential": ["tokens", "round_trip_error"], "inverse, parallel": ["tokens", "round_trip_error", "sweeps"]}
    for row in rows:
        assert list(row) == KEYS + extra.get(row["name"], [])
        assert row["items_per_second"] > 0
        assert row["share_of_limit"] == pytest.approx(row["flops_per_second"] / row["limit"])
    for row in rows[4:6]:
        assert row["tokens"] == 16
        assert 0 < row["round_trip_error"] < 1e-4  # float32 rounding of numbers of order 1
    us = benchmark.Setting(run.config, run.mesh, run=run, batch=6).drawn[-1]
    t = np.tile(as_run(run.config, run.model, None).sampled_levels(), (6, 1))
    sweeps = jax.jit(lambda us: sampling.inverse_sweeps(run.model, run.params, us, t, np.arange(6), 1e-3))(us)
    np.testing.assert_allclose(rows[5]["sweeps"]["0.001"], np.mean(np.asarray(sweeps), (0, 2)), atol=0.2)  # rounding: a sweep of one in six
    rough, fine = rows[5]["sweeps"].values()
    assert all(1 < a < b < 16 for a, b in zip(rough, fine, strict=True))
    seconds = {row["name"]: 1 / row["items_per_second"] for row in rows}
    total = seconds["predictor's steps"] + seconds["inverse, sequential"] + seconds["score denoising"]
    printed = benchmark.table(rows).splitlines()
    assert len(printed) == 8 + 5
    first = seconds["predictor's steps"] / total
    assert f"predictor's steps {first:.0%}" in printed[8]
    assert f"inverse, sequential {seconds['inverse, sequential'] / total:.0%}" in printed[8]
    slower = max(1, seconds["inverse, sequential"] / seconds["inverse, parallel"])
    assert f"takes inverse, sequential, {slower:.2f} times as long as the faster one" in printed[9]
    assert f"to 0.001, clean to noisy: {rough[0]:.1f}, {rough[1]:.1f}" in printed[10]


def test_only_the_rows_that_are_asked_for_are_timed(run, monkeypatch):
    closed = []
    names = ("inverse, parallel", "score denoising")
    monkeypatch.setattr(benchmark, "SAMPLING", {
        name: lambda _, name=name: benchmark.Case(lambda: None, 1, flops=1, close=lambda: closed.append(name)) for name in names})
    assert [row["name"] for row in benchmark.benchmark_run(run, 1, only="inverse")] == ["inverse, parallel"]
    assert closed == ["inverse, parallel"]  # the other was never made
    with pytest.raises(UserError, match=r"--rows=invert is in no row's name"):
        benchmark.benchmark_run(run, 1, only="invert")


def test_a_sampler_is_its_parts(run):
    """Of two steps: the inverse decoder inverts one level of the two, the score decoder both, and the denoiser is one pass more."""
    made = benchmark.Setting(run.config, run.mesh, run=run, batch=6)
    cases = filter(None, (make(made) for make in benchmark.SAMPLING.values()))  # no ODE's among them
    inverse, score, denoiser, predictor, sequential, parallel, denoising = (case.flops for case in cases)
    assert sequential == parallel == 2 * (inverse - predictor) > 0
    assert score == predictor + sequential + denoising
    assert denoiser == predictor * 3 / 2


def test_rows_without_a_transporter(run):
    config = tiny_config(**{"model.transporter_blocks": 0})
    _, model, mesh = setup(config)
    plain = dataclasses.replace(run, config=config, model=model, params=state.initialize(as_run(config, model, mesh)).params)
    made = benchmark.Setting(config, mesh, run=plain)
    assert [benchmark.SAMPLING[f"inverse, {how}"](made) for how in ("sequential", "parallel")] == [None, None]
    rows = [{"name": name, "items_per_second": rate, "flops_per_second": 1.0, "limit": 2.0, "share_of_limit": 0.5, "runs": [rate]}
            for name, rate in (("predictor's steps", 10.0), ("score denoising", 30.0))]
    said = "score decoder, each part timed by itself: predictor's steps 75%, score denoising 25%"
    assert benchmark.table(rows).splitlines()[3:] == [said]


def test_recomputation_is_not_counted():
    counts = [benchmark._train_step(setting(**{"model.remat": remat})).flops for remat in ("none", "full")]
    assert counts[0] == counts[1]


def test_a_step_is_three_evaluations():
    """The gradient of a product is two products; the first layers' inputs need none, so a little less than three."""
    tiny = setting(**{"data.batch_size": 20, "evaluate.batch_size": 20})
    step, forward, evaluation = benchmark._train_step(tiny), benchmark._forward(tiny), benchmark._likelihood(tiny)
    assert step.items == forward.items == evaluation.items == 20
    assert 2.7 * forward.flops < step.flops < 3 * forward.flops
    assert evaluation.flops == forward.flops


def test_steps_go_on_from_one_another():
    case = benchmark._train_step(setting())
    first, second = (jax.device_get(case.once()) for _ in range(2))
    assert first["finite"]
    assert second["finite"]
    assert first["loss"] != second["loss"]


def test_a_run_is_long_enough_and_the_case_is_closed(monkeypatch):
    done, closed, looks = [], [], []
    # A clock of its own, since a machine that stalls makes fewer calls in the time: a millisecond a call, a microsecond a look.
    monkeypatch.setattr(time, "perf_counter", lambda: looks.append(1) or 0.001 * len(done) + 1e-6 * len(looks))
    case = benchmark.Case(lambda: done.append(1), 5, bytes=7, least=3, close=lambda: closed.append(True))
    row = benchmark.measure(case, 2, setting())
    assert all(rate <= 5 / 0.001 for rate in row["runs"])
    assert len(done) >= 2 + 2 * (3 + benchmark.SECONDS / 0.002)
    assert closed == [True]


def test_product_rate_counts_half_precision():
    rate = flops.products("bfloat16", setting().mesh, 0.02)
    assert 1e6 < rate() < 1e16


def test_a_configuration_or_a_run_is_asked_for(tmp_path):
    for arguments in ([], ["--config=experiments/digits.py", f"--workdir={tmp_path}"]):
        refused = python("-m", "launch.benchmark", *arguments, check=False)
        assert (refused.returncode, refused.stderr) == (2, "error: give either --config, an experiment, or --workdir, a run's folder\n")


@rehearsal
def test_the_program_writes_rows(tmp_path):
    arguments = ["--config=experiments/digits.py", *(f"--config.{key}={value}" for key, value in TINY.items()), "--runs=1",
                 "--config.model.transporter_blocks=0"]
    done = python("-m", "launch.benchmark", *arguments, f"--json={tmp_path / 'rows.json'}")
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [list(row)[:6] for row in rows] == [KEYS] * 9
    assert re.match(r"1 x \S.*, jax [\d.]+, medians of 1 runs\n", done.stdout)
    assert benchmark.table(rows) in done.stdout
