"""p(x | x_0) against float64 and closed forms, and the whole bound of a model of two pixels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_ndtr, log_softmax, logsumexp

from ntm_jax.core import pixels
from ntm_jax.core.pixels import PixelLikelihood

PIXEL_LEVELS = [2, 17, 256]
MEANS = [0.0, 0.31, -1.0, 1.0, 1.7, -3.0]
SCALES = [1e-3, 0.01, 0.1, 0.5, 3.0]

# Compiled, since eager operations compile one by one.
log_discretized_normal = jax.jit(pixels.log_discretized_normal, static_argnums=3)
bayes_logits = jax.jit(pixels.bayes_logits, static_argnums=3)


def values(pixel_levels):
    return np.float32(2 * np.arange(pixel_levels) / (pixel_levels - 1) - 1)


def log_bins(mean, scale, pixel_levels):
    """log of the probability of every bin in float64, from boundaries that neighbours share."""
    inner = -1 + (2 * np.arange(1, pixel_levels) - 1) / (pixel_levels - 1)
    edges = np.concatenate([[-np.inf], inner, [np.inf]])
    z = (edges - mean) / scale
    low, high = z[:-1], z[1:]
    low, high = np.where(low > 0, -high, low), np.where(low > 0, -low, high)
    with np.errstate(divide="ignore"):
        return log_ndtr(high) + np.log(-np.expm1(log_ndtr(low) - log_ndtr(high)))


@pytest.mark.parametrize("pixel_levels", PIXEL_LEVELS)
@pytest.mark.parametrize("scale", SCALES)
def test_discretised_normal_far_into_the_tails(pixel_levels, scale):
    for mean in MEANS:
        mean, scale = np.float32(mean), np.float32(scale)
        found = log_discretized_normal(values(pixel_levels), mean, scale, pixel_levels)
        found, expected = np.asarray(found), log_bins(float(mean), float(scale), pixel_levels)
        assert np.isfinite(expected).all()
        # Boundaries are float32 numbers up to 4, off by 2.4e-7, so z is off by that over the scale,
        # and log p by about z times as much. A narrow bin is a difference of two log-probabilities,
        # each off by some 5e-7 (float32 erfc), and of two z.
        z = np.sqrt(2 * np.abs(expected))
        width = min(1, 2 / (pixel_levels - 1) / scale)
        tolerance = 2.4e-7 * (1 + z + 1 / width) / scale + 1e-6 / width + 2e-6 * np.abs(expected)
        np.testing.assert_array_less(np.abs(found - expected), tolerance)


@pytest.mark.parametrize("pixel_levels", PIXEL_LEVELS)
def test_bayes_rule_sums_to_one_and_equals_float64(pixel_levels):
    """At noise levels of .001 to .5, of x_0 near a value, between two and outside their range."""
    rng, count = np.random.default_rng(1), 40
    t_0 = np.float32(np.geomspace(1e-3, 0.5, count))
    clean = values(pixel_levels)[rng.integers(pixel_levels, size=(count, 6, 5))]
    noise = rng.normal(size=clean.shape) * rng.choice([1, 10], size=clean.shape)
    between = rng.uniform(-1.2, 1.2, size=clean.shape)
    x_0 = np.where(rng.random(clean.shape) < 0.5, (1 - t_0[:, None, None]) * clean
                   + t_0[:, None, None] * noise, between).astype(np.float32)
    log_prior = log_softmax(rng.normal(size=(6, 5, pixel_levels)), -1).astype(np.float32)
    t = np.float64(t_0)[:, None, None, None]
    exact = 2 * np.arange(pixel_levels) / (pixel_levels - 1) - 1
    expected = log_softmax(log_prior - ((x_0[..., None] - (1 - t) * exact) / t) ** 2 / 2, -1)
    with jax.enable_x64(True):
        double = pixels.bayes_logits(
            jnp.asarray(x_0, jnp.float64), jnp.asarray(t_0, jnp.float64), log_prior[None],
            pixel_levels)
        found = np.asarray(double - jax.nn.logsumexp(double, -1, keepdims=True))
    np.testing.assert_allclose(np.exp(logsumexp(found, -1)), 1, atol=1e-12)
    single = np.asarray(bayes_logits(x_0, t_0, log_prior[None], pixel_levels), np.float64)
    single = log_softmax(single, -1)
    np.testing.assert_allclose(single, expected, rtol=1e-5, atol=1e-5)
    # what is picked for x
    kind = PixelLikelihood("histogram", pixel_levels)
    params = {"pixels": {"log_prior": log_prior}}
    picked = jax.jit(lambda *a: kind.log_prob(params, *a, None))(clean, x_0, t_0)
    index = np.rint((clean + 1) * (pixel_levels - 1) / 2).astype(int)
    by_hand = np.take_along_axis(expected, index[..., None], -1).sum((1, 2, 3))
    np.testing.assert_allclose(picked, by_hand, rtol=1e-5)
