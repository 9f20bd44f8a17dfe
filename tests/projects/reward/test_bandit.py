"""A bandit whose optimum is known: points of the plane, a quadratic reward, and a divergence.

The objective E[reward] - beta KL(model || reference) has one optimum, the reference tilted by
exp(reward / beta). A new model is exact for independent normal data, so that optimum is a normal
density too.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from ntm_jax.core import sampling
from ntm_jax.core.model import NTM
from ntm_jax.core.trajectory import example_keys
from ntm_jax.data import pipeline
from ntm_jax.projects.reward import rewards
from ntm_jax.runtime import sharding
from ntm_jax.runtime.run import untrained
from ntm_jax.training import state
from ntm_jax.training.step import make_step
from tests.common import configured, objective_of

BETA, CURVATURE, CENTRE, SPREAD = 0.5, 1.0, np.array([0.8, -0.6]), 1.0
STEPS = 150


def quadratic(argument, source):
    def score(points, conditions):
        return -0.5 * CURVATURE * np.square(points.reshape(-1, 2) - CENTRE).sum(1)

    return score


def optimum(t_0: float) -> tuple[np.ndarray, float]:
    """Mean and deviation of x_0 in the optimum: clean points are x_0 / (1 - t_0)."""
    prior = (1 - t_0) ** 2 * SPREAD**2 + t_0**2
    curvature = CURVATURE / BETA / (1 - t_0) ** 2
    variance = 1 / (1 / prior + curvature)
    return variance * curvature * (1 - t_0) * CENTRE, np.sqrt(variance)


def log_density(run, params, points, samples: int = 4000):
    """log p(x_0) of points [n, 2]: the mean of p(x_0 | x_1) over samples of the model's x_1.

    Without a transporter, where levels are their own latents.
    """
    @jax.jit
    def lowest_gaussians(params):
        t = run.schedule.fixed_levels(2, samples)
        keys = example_keys(jax.random.key(5), "density", jnp.arange(samples))
        y = jnp.zeros(samples, jnp.int32)
        us, _ = sampling.draw_latents(run.model, params, keys, t, y)
        mean, log_scale = run.model.apply(
            params, us, t, jnp.full(samples, 2), y, method=NTM.gaussians)
        return mean[:, 0].reshape(-1, 2), jnp.exp(log_scale[:, 0]).reshape(-1, 2)

    mean, scale = map(np.asarray, lowest_gaussians(params))
    logs = scipy.stats.norm.logpdf(points[:, None], mean, scale).sum(-1)
    return scipy.special.logsumexp(logs, 1) - np.log(samples)


@pytest.mark.slow
def test_the_optimum_is_the_tilted_reference(monkeypatch):
    monkeypatch.setitem(rewards.REWARDS._entries, "quadratic", ("quadratic", quadratic))
    config = configured("toy2d", {
        "trajectory.steps": (2,), "trajectory.t_min": 0.1, "trajectory.t_min_range": (0.1, 0.1),
        "trajectory.schedule": "linear", "sample.steps": 2, "model.transporter_blocks": 0,
        "model.width": 32, "model.predictor_layers": 1, "model.data_std": SPREAD,
        "data.batch_size": 16, "train.steps": STEPS, "train.objective": "policy_gradient",
        "init_from": "x", "reward.name": "quadratic", "reward.samples": 16, "reward.kl": BETA,
        "reward.normalise": False, "reward.data_loss_weight": 0.0, "optimizer.learning_rate": 6e-3,
        "optimizer.warmup_steps": 10, "optimizer.weight_decay": 0.0, "optimizer.ema_decay": 0.98})
    source = config.data.open("train")
    run = untrained(config, pipeline.spec(source, 1), sharding.make_mesh(config.mesh))
    current = state.initialize(run)
    reference = jax.tree.map(jnp.copy, current.params)
    rollouts = objective_of(run).extend(run, source)
    step = make_step(run, objective_of(run))
    batches = pipeline.TrainIterator(source, 1, 16, 0, 0)
    for number in range(STEPS):
        batch = sharding.to_global(next(batches), run.mesh)
        batch, _ = rollouts.finish(
            rollouts.begin(current.params, reference, batch, number, logged=False))
        with sharding.use(run.mesh):
            current, _ = step(current, batch, 2)
    batches.close()
    mean, deviation = optimum(0.1)
    points = mean + deviation * np.random.default_rng(0).normal(size=(500, 2))  # held out
    wanted = scipy.stats.norm.logpdf(points, mean, deviation).sum(1)
    before, after = (log_density(run, params, points) for params in (reference, current.ema))
    assert np.abs(before - wanted).mean() > 0.5
    assert np.abs(after - wanted).mean() < 0.05
