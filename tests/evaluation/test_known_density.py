"""Learned densities against true ones: by level, drawn, and in evaluation.json."""

import dataclasses
import math

import numpy as np
import pytest

from ntm_jax.data import sources
from ntm_jax.evaluation import evaluate, known_density, scoring
from ntm_jax.evaluation.report import write_report
from ntm_jax.training import state
from tests.common import as_run, setup, tiny_config


def log_normal(points, t):
    """log N(0, ((1-t)^2 + t^2) I) at points [n, 2]: standard normal data noised to t."""
    variance = (1 - t) ** 2 + t**2
    return -0.5 * np.sum(points**2, 1) / variance - math.log(2 * math.pi * variance)


@pytest.fixture(scope="module")
def run():
    """A new model without transporter, which is exact for standard normal data.

    Its bound is the true log-density on every trajectory, up to float32.
    """
    settings = tiny_config(**{
        "data.source": "toy:gaussians", "data.patch_size": 1, "model.condition": "none",
        "train.condition_dropout": 0.0, "model.transporter_blocks": 0, "model.data_std": 1.0,
        "trajectory.steps": (3,), "sample.steps": 3, "evaluate.split": "test[:50]"})
    _, model, mesh = setup(settings)
    new = as_run(settings, model, mesh)
    return dataclasses.replace(new, params=state.initialize(new).params, workdir="runs/toy")


@pytest.mark.parametrize("level", [0, 1, 2])
def test_the_density_at_every_level(run, level):
    points = np.random.default_rng(0).normal(size=(41, 2))
    t = run.evaluated_levels()[level]
    found = known_density.log_density(run, points, level, trajectories=2)
    np.testing.assert_allclose(found, log_normal(points, t), atol=1e-4)


def test_bounds_beside_the_true_density(run):
    source = sources.open_source(run.config.data.source, "test[:50]")
    source = dataclasses.replace(source, log_density=log_normal)
    scores = scoring.score_records(run, source, 2)
    found = known_density.compare_with_true_density(run, source, scores)
    assert found["importance_weighted"]["mean"] == pytest.approx(0, abs=1e-4)
    assert found["bound"]["mean"] == pytest.approx(0, abs=1e-4)


@pytest.mark.slow
def test_an_evaluation_of_planar_data_draws_its_densities(run, tmp_path, capsys):
    result, scores = evaluate.evaluate(run)
    truth = result["truth"]
    assert truth["importance_weighted"]["mean"] < -0.05  # the model is untrained
    # Above the negative entropy of a normal distribution of equal variance, -2.84.
    assert truth["log_density"]["mean"] > -2.6
    assert "bits_per_dim" not in result
    assert "class_accuracy" not in result
    write_report(run, result, scores, tmp_path / "evaluation.json")
    assert (tmp_path / "densities.png").stat().st_size > 1000
    assert "true mean log-density of the data noised to t_0" in capsys.readouterr().out
