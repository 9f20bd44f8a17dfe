"""Learned densities against true ones: exact where a new model is, drawn at every level, and what evaluation.json says of them."""

import dataclasses
import math

import numpy as np
import pytest

from ntm_jax.api import Run
from ntm_jax.data import pipeline, sources
from ntm_jax.evaluation import evaluate, known_density, scoring
from ntm_jax.evaluation.report import write_report
from ntm_jax.runtime import build, sharding
from ntm_jax.training import state
from tests.common import as_run, tiny_config

pytestmark = pytest.mark.usefixtures("quick_compilation")
SETTINGS = tiny_config(**{
    "data.source": "toy:gaussians", "data.patch_size": 1, "model.condition": "none", "train.condition_dropout": 0.0,
    "model.transporter_blocks": 0, "model.data_std": 1.0, "trajectory.steps": (3,), "sample.steps": 3, "evaluate.split": "test[:50]"})


def log_normal(points, t):
    """log N(0, ((1-t)^2 + t^2) I) at points [n, 2]: standard normal data noised to t."""
    variance = (1 - t) ** 2 + t**2
    return -0.5 * np.sum(points**2, 1) / variance - math.log(2 * math.pi * variance)


@pytest.fixture(scope="module")
def run():
    """A new model without transporter, which is exact for standard normal data, on data that are told to be that."""
    source = sources.open_source(SETTINGS.data.source, SETTINGS.evaluate.split)
    spec, mesh = pipeline.spec(source, 1), sharding.make_mesh(SETTINGS.mesh)
    model = build.make_model(SETTINGS, spec)
    return Run(SETTINGS, spec, model, state.initialize(as_run(SETTINGS, model, mesh)).params, 0, mesh, "runs/toy")


@pytest.mark.parametrize("level", [0, 1, 2])
def test_the_density_at_every_level(run, level):
    points = np.random.default_rng(0).normal(size=(41, 2))
    t = np.asarray(SETTINGS.schedule(run.model.config.tokens).levels(3, np.full(1, 0.03, np.float32)))[0]
    found = known_density.log_density(run, points, level, trajectories=2)
    np.testing.assert_allclose(found, log_normal(points, t[level]), atol=1e-4)  # float32: a bound that is exact on every trajectory


def test_bounds_beside_the_truth(run, tmp_path, capsys):
    source = dataclasses.replace(sources.open_source(SETTINGS.data.source, "test[:50]"), log_density=log_normal)
    scored = scoring.score_records(as_run(SETTINGS, run.model, run.mesh, run.params), source, 2)
    found = known_density.compare_with_true_density(run, source, scored)
    assert found["importance_weighted"]["mean"] == pytest.approx(0, abs=1e-4)
    assert found["bound"]["mean"] == pytest.approx(0, abs=1e-4)
    result, scored = evaluate.evaluate(run)
    assert result["truth"]["importance_weighted"]["mean"] < -0.05  # of the mixture it knows nothing
    assert result["truth"]["log_density"]["mean"] > -2.6  # below the entropy of a normal of equal variance, 2.84
    assert "bits_per_dim" not in result
    assert "class_accuracy" not in result
    write_report(run, result, scored, tmp_path / "evaluation.json")
    assert (tmp_path / "densities.png").stat().st_size > 1000
    assert "true mean log-density of the data noised to t_0" in capsys.readouterr().out
