"""Bounds from several trajectories: exact cases, and the sums of weights against direct ones."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp

from ntm_jax.core import trajectory
from ntm_jax.core.model import Terms
from ntm_jax.core.pixels import PixelLikelihood
from ntm_jax.evaluation import importance
from tests.core.conftest import noise_levels

# Compiled, since eager operations compile one by one.
summarize = jax.jit(importance.summarize)


def bounds(*arguments):
    return jax.device_get(jax.jit(lambda: importance.estimate_bounds(*arguments))())


def log_gaussian(x, mean, variance):
    x = np.asarray(x, np.float64)
    return (-0.5 * ((x - mean) ** 2 / variance
                    + np.log(2 * math.pi * variance))).reshape(len(x), -1).sum(1)


def true_conditionals(t, mean, variance):
    """In place of a model: xs -> Terms of the reverse conditionals of data N(mean, variance).

    Written out by hand, in float32 (docs/concepts.md, section 9).
    """
    s, t = t[:, :-1, None, None], t[:, 1:, None, None]

    def terms(xs):
        a, b, c = trajectory.posterior(s, t)
        spread = (1 - t) ** 2 * variance + t**2
        clean = mean + (1 - t) * variance / spread * (xs[:, 1:] - (1 - t) * mean)
        log_scale = 0.5 * jnp.log(c**2 + b**2 * variance * t**2 / spread) + 0 * clean
        z = (xs[:, :-1] - a * xs[:, 1:] - b * clean) * jnp.exp(-log_scale)
        constant = xs[0, 0].size / 2 * math.log(2 * math.pi)
        quadratic = 0.5 * jnp.sum(z**2, (2, 3))
        return Terms(quadratic, jnp.sum(log_scale, (2, 3)), jnp.zeros(z.shape[:2]), constant)

    return terms


@pytest.mark.parametrize(("steps", "schedule", "first"), [
    (1, "linear", 0), (4, "shifted", 0), (4, "linear", 2)])
def test_one_trajectory_is_as_good_as_any_number_where_the_conditionals_are_true(
        steps, schedule, first):
    """The bounds are then the density at the first level, be it of a trajectory's upper part."""
    mean, variance, rng = 0.3, 0.4, np.random.default_rng(5)
    t = noise_levels(steps, np.full(16, 0.02, np.float32), schedule, 0.5)[:, first:]
    points = rng.normal(size=(16, 8, 3)).astype(np.float32)

    def draw(number):
        noise = jax.random.normal(jax.random.key(number), (16, steps - first, 8, 3))
        return trajectory.noise_forward(points, t, noise)

    scores = bounds(true_conditionals(t, mean, variance), draw, t, 16)
    level = float(t[0, 0])
    expected = log_gaussian(points, (1 - level) * mean, (1 - level) ** 2 * variance + level**2)
    assert scores["weighted"].shape == (16, 3)  # of the first, of four and of all
    for bound in (scores["bound"], scores["importance_weighted"], *scores["weighted"].T):
        # float32: some 4e-6 a dimension
        np.testing.assert_allclose(bound / 24, expected / 24, atol=1e-4)
    np.testing.assert_allclose(scores["effective_sample_size"], 16, rtol=1e-3)
    assert (scores["bound_variance"] < 1e-6).all()


def test_the_unbinned_decoder_bounds_the_density_of_continuous_data():
    """The model's x is N(mean, variance + 2 s^2), s the decoder's deviation: the limit of many."""
    mean, variance, t_0, rng = 0.3, 0.4, 0.05, np.random.default_rng(6)
    x = jnp.asarray(mean + math.sqrt(variance) * rng.normal(size=(64, 1, 2)), jnp.float32)
    t = noise_levels(4, np.full(64, t_0, np.float32), "linear", 0.0)
    s = t_0 / (1 - t_0)

    def draw(number):
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(1), number), (64, 5, 1, 2))
        return trajectory.simulate(x, t, noise)

    def density(x_0):
        return PixelLikelihood("density").log_prob({}, x, x_0, t[:, 0], None)

    scores = bounds(true_conditionals(t, mean, variance), draw, t, 1000, x, density)
    expected = np.asarray(log_gaussian(x, mean, variance + 2 * s**2))
    error = scores["importance_weighted"] - expected
    spread = np.sqrt(scores["weighted_variance"])
    np.testing.assert_array_less(np.abs(error), 5 * spread + 1e-4)
    assert (spread < 0.02).all()
    # Given x, x_0 is normal: the mean of log w is -E[z^2] / 2, with z^2 of the data and one noise.
    x, wide = np.asarray(x, np.float64), variance + s**2
    bound = -0.5 * (((x - mean) ** 2 + s**2) / wide + np.log(2 * np.pi * wide)).sum((1, 2))
    spread = np.sqrt(scores["bound_variance"])
    np.testing.assert_array_less(np.abs(scores["bound"] - bound), 5 * spread + 1e-4)
    assert scores["reconstruction"].shape == (64,)


def test_the_bounds_equal_direct_sums():
    log_w = np.random.default_rng(4).normal(size=(6, 3)) * np.array([0.5, 3.0, 30.0]) - np.array(
        [100.0, 5000.0, 0.0])
    log_w = log_w.astype(np.float32)
    found = summarize(jnp.asarray(log_w))
    log_w = log_w.astype(np.float64)
    # float32 sums of six terms; a logarithm of 10,000 is off by 5e-4, and its exponential by as
    # much
    rtol = 1e-6
    np.testing.assert_allclose(found["bound"], log_w.mean(0), rtol=rtol)
    for number, count in enumerate((1, 4, 6)):
        expected = logsumexp(log_w[:count], 0) - math.log(count)
        np.testing.assert_allclose(found["weighted"][:, number], expected, rtol=rtol)
    np.testing.assert_array_equal(found["importance_weighted"], found["weighted"][:, -1])
    effective = np.exp(2 * logsumexp(log_w, 0) - logsumexp(2 * log_w, 0))
    np.testing.assert_allclose(found["effective_sample_size"], effective, rtol=1e-5)
    # of numbers rounded by 5e-4
    np.testing.assert_allclose(found["bound_variance"], log_w.var(0, ddof=1) / 6, rtol=1e-4)
    without = [logsumexp(np.delete(log_w, i, 0), 0) - math.log(5) for i in range(6)]
    np.testing.assert_allclose(found["weighted_variance"], 5 * np.var(without, 0), rtol=1e-3)


@pytest.mark.parametrize(("deviation", "count"), [(0.3, 4), (3.0, 8), (10.0, 40)])
def test_the_variance_of_the_weighted_bound_is_that_of_repetitions(deviation, count):
    """Of log-normal weights, of which few count where they spread widely."""
    log_w = deviation * np.random.default_rng(5).normal(size=(count, 4000)).astype(np.float32)
    found = summarize(jnp.asarray(log_w))
    true = np.var(found["importance_weighted"])
    assert float(found["weighted_variance"].mean()) == pytest.approx(true, rel=0.25)
