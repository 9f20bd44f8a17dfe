"""Learned densities against true ones: by level, drawn, and in evaluation.json."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from ntm_jax import files
from ntm_jax.data import sources
from ntm_jax.errors import UserError
from ntm_jax.evaluation import evaluate, scoring
from ntm_jax.evaluation.report import write_report
from ntm_jax.projects.densities import known_density
from ntm_jax.training import state
from tests.common import new_run, tiny_config


def log_normal(points, t):
    """log N(0, ((1-t)^2 + t^2) I) at points [n, 2]: standard normal data noised to t."""
    variance = (1 - t) ** 2 + t**2
    return -0.5 * np.sum(points**2, 1) / variance - math.log(2 * math.pi * variance)


def untrained(workdir: str, **changes):
    """A run without transporter, exact for standard normal data as a new one: parameters are 0."""
    new = new_run(tiny_config(**{
        "data.source": "toy:gaussians", "data.patch_size": 1, "model.condition": "none",
        "train.condition_dropout": 0.0, "model.transporter_blocks": 0, "model.data_std": 1.0,
        "evaluate.split": "test[:50]"} | changes))
    zeros = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), state.abstract(new).params)
    return dataclasses.replace(new, params=zeros, workdir=workdir)


@pytest.fixture(scope="module")
def run():
    """Its bound is the true log-density on every trajectory, up to float32."""
    return untrained("runs/toy", **{"trajectory.steps": (3,), "sample.steps": 3})


def test_the_density_at_a_level(run):
    points = np.random.default_rng(0).normal(size=(41, 2))
    found = known_density.log_density(run, points, 1, trajectories=2)
    np.testing.assert_allclose(found, log_normal(points, run.evaluated_levels()[1]), atol=1e-4)


def test_the_true_density_is_that_of_images_not_of_tokens(run, monkeypatch):
    """The tokens of squares have another order than the numbers of an image."""
    monkeypatch.setattr(scoring, "noised", lambda root, x, t, index: x)
    source = sources.open_source("toy:field", "test[:10]")
    source = dataclasses.replace(source, log_density=lambda points, t: points @ np.arange(64))
    settings = tiny_config(**{"data.source": "toy:field", "data.patch_size": 2})
    squares = dataclasses.replace(
        run, config=settings, spec=dataclasses.replace(run.spec, image_shape=(8, 8, 1)))
    scores = dict.fromkeys(scoring.BOUNDS, np.zeros(10))
    found = known_density.compare_with_true_density(squares, source, scores)
    images = np.stack([source.records[i]["image"].ravel() for i in range(10)])
    assert found["log_density"]["mean"] == pytest.approx(np.mean(images @ np.arange(64)))


@pytest.fixture(scope="module")
def flow():
    """A new flow map, whose velocity and estimate are exact for standard normal data."""
    return untrained("runs/map", **{
        "model.head": "flow_matching", "model.backbone": "flow_map", "train.objective": "flow_map",
        "sample.decoder": "euler"})


@pytest.mark.slow
def test_signed_errors_of_a_flow_map_and_of_its_ode(flow, monkeypatch):
    """Those of the map are 0 in one step, and those of the ODE nearly in many."""
    source = dataclasses.replace(flow.config.data.open("test[:50]"), log_density=log_normal)
    monkeypatch.setattr(known_density, "EVALUATIONS", (1, 16))
    monkeypatch.setattr(known_density, "SIDE", 31)
    mapped = known_density.flow_map_estimates(flow)
    one, many = known_density.signed_errors(flow, source, mapped[:2])
    own, = known_density.signed_errors(
        flow, dataclasses.replace(source, planar_extent=0.0), mapped[2:])
    assert [row["method"] for row in (one, many)] == ["F2D2", "F2D2"]
    assert [row["evaluations"] for row in (one, many, own)] == [1, 16, 16]
    for row in (one, many):
        assert row["error"]["mean"] == pytest.approx(0, abs=1e-4)
    assert own["error"]["mean"] == pytest.approx(0, abs=0.03)
    side = np.linspace(-3, 3, 31)
    grid = np.stack(np.meshgrid(side, side), -1).reshape(-1, 2)
    mass = 0.2**2 * np.exp(log_normal(grid, 0.03)).sum()
    assert mass == pytest.approx(1, abs=0.01)
    for row in (one, many):
        assert row["mass"] == pytest.approx(mass, abs=1e-4)


def test_signed_errors_of_an_ntm_are_those_of_its_bounds(run):
    source = dataclasses.replace(run.config.data.open("test[:50]"), log_density=log_normal)
    estimators = known_density.bounds(run, 2)
    rows = known_density.signed_errors(run, source, estimators)
    assert [(row["method"], row["evaluations"]) for row in rows] == [
        ("NTM, bound", 3), ("NTM, importance-weighted, 2 trajectories", 6)]
    for row in rows:
        assert row["error"]["mean"] == pytest.approx(0, abs=1e-4)
        assert "mass" not in row


def test_runs_that_do_not_compare_are_refused(run):
    trajectory = dataclasses.replace(run.config.trajectory, t_min=0.02)
    other = dataclasses.replace(run, config=dataclasses.replace(run.config, trajectory=trajectory))
    with pytest.raises(UserError, match=r"trajectory\.t_min=0\.02, and runs/toy toy:gaussians and"):
        known_density.benchmark([(run, []), (other, [])], "test[:50]")


def test_a_benchmark_is_written_and_drawn(tmp_path):
    row = {"method": "F2D2", "evaluations": 4, "error": {"mean": 0.5, "stderr": 0.1}, "mass": 1.4}
    low = {"method": "NTM, bound", "evaluations": 4, "error": {"mean": -0.1, "stderr": 0.01}}
    result = {"source": "toy:gaussians", "split": "test", "count": 2, "t_min": 0.04,
              "runs": [{"workdir": "a", "step": 1, "rows": [row, low]}]}
    known_density.write_benchmark(result, str(tmp_path / "out"))
    written = files.read_json(tmp_path / "out" / "truth.json", "")
    assert written["runs"] == result["runs"]
    assert (tmp_path / "out" / "truth.png").stat().st_size > 1000


@pytest.mark.slow
def test_an_evaluation_of_planar_data_draws_its_densities(run, tmp_path, monkeypatch):
    monkeypatch.setattr(known_density, "SIDE", 16)
    result, scores = evaluate.evaluate(run)
    truth = result["truth"]
    assert truth["importance_weighted"]["mean"] < -0.05  # the model is untrained
    # Above the negative entropy of a normal distribution of equal variance, -2.84.
    assert truth["log_density"]["mean"] > -2.6
    write_report(run, result, scores, tmp_path / "evaluation.json")
    assert (tmp_path / "densities.png").stat().st_size > 1000
