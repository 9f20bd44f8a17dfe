"""The pixels and contributions of a likelihood, and a new model's on Gaussian data."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_ndtr

from ntm_jax.core import likelihood, trajectory
from ntm_jax.core.model import Terms
from tests.core.conftest import noise_levels

PIXEL_LEVELS = [2, 17, 256]
MEANS = [0.0, 0.31, -1.0, 1.0, 1.7, -3.0]
SCALES = [1e-3, 0.01, 0.1, 0.5, 3.0]


def pixels(pixel_levels):
    return jnp.asarray(np.linspace(-1, 1, pixel_levels), jnp.float32)


# Compiled, since eager operations compile one by one.
log_discretized_normal = jax.jit(likelihood.log_discretized_normal, static_argnums=3)
log_reconstruction = jax.jit(likelihood.log_reconstruction, static_argnums=3)
contributions = jax.jit(likelihood.contributions, static_argnums=4)
log_weight = jax.jit(likelihood.log_weight)
simulate = jax.jit(trajectory.simulate)


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
        found = log_discretized_normal(pixels(pixel_levels), mean, scale, pixel_levels)
        found, expected = np.asarray(found), log_bins(float(mean), float(scale), pixel_levels)
        assert np.isfinite(expected).all()
        # Boundaries are float32 numbers up to 4, off by 2.4e-7, so z is off by that over the scale,
        # and log p by about z times as much. A narrow bin is a difference of two log-probabilities,
        # each off by some 5e-7 (float32 erfc), and of two z.
        z = np.sqrt(2 * np.abs(expected))
        width = min(1, 2 / (pixel_levels - 1) / scale)
        tolerance = 2.4e-7 * (1 + z + 1 / width) / scale + 1e-6 / width + 2e-6 * np.abs(expected)
        np.testing.assert_array_less(np.abs(found - expected), tolerance)


def log_gaussian(x, mean, variance):
    x = np.asarray(x, np.float64)
    return (-0.5 * ((x - mean) ** 2 / variance
                    + np.log(2 * math.pi * variance))).reshape(len(x), -1).sum(1)


@pytest.fixture(scope="module")
def drawn():
    """x of 17 pixel values [B, N, D], trajectories [B, K, N, D] of it and their levels [B, K]."""
    rng = np.random.default_rng(1)
    t = noise_levels(4, np.float32([0.02, 0.05, 0.2]))
    x = pixels(17)[rng.integers(17, size=(3, 4, 2))]
    noise = rng.normal(size=(3, 5, 4, 2)).astype(np.float32)
    return x, simulate(x, t, noise), t


@pytest.mark.parametrize("pixel_levels", [0, 17])
def test_contributions_by_hand(drawn, pixel_levels):
    x, xs, t = drawn
    rng = np.random.default_rng(2)
    quadratic, log_scale, log_det = rng.normal(size=(3, 3, 4)).astype(np.float32)
    terms = Terms(quadratic, log_scale, log_det, 2.5)
    parts = contributions(terms, xs, x, t, pixel_levels)
    s, xs_, x_ = (np.asarray(a, np.float64) for a in (np.asarray(t)[:, :, None, None], xs, x))
    start = log_gaussian(xs[:, 0], (1 - s[:, 0]) * x_, s[:, 0] ** 2) if pixel_levels else 0
    forward = start + sum(
        log_gaussian(xs[:, k + 1], (1 - s[:, k + 1]) / (1 - s[:, k]) * xs_[:, k],
                     s[:, k + 1] ** 2 - ((1 - s[:, k + 1]) / (1 - s[:, k]) * s[:, k]) ** 2)
        for k in range(4)
    )
    expected = {
        "prior": log_gaussian(xs[:, -1], 0, 1.0),
        "predictor": -np.asarray(quadratic + log_scale + 2.5),
        "log_det": np.asarray(log_det),
        "forward": -forward,
    }
    if pixel_levels:
        reconstruction = log_reconstruction(x, xs[:, 0], t[:, 0], pixel_levels)
        expected["reconstruction"] = reconstruction
    assert parts.keys() == expected.keys()
    assert parts["forward"].shape == (3, 5)
    # x_T is independent noise
    np.testing.assert_allclose(parts["forward"][:, -1], -expected["prior"], rtol=1e-6)
    assert pixel_levels or not parts["forward"][:, 0].any()
    summed = parts | {"forward": parts["forward"].sum(1)}
    for name, value in expected.items():  # float32 sums of tens of terms
        np.testing.assert_allclose(summed[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
    total = sum(np.asarray(value).reshape(3, -1).sum(1) for value in expected.values())
    # terms of up to 400
    np.testing.assert_allclose(log_weight(parts), total, rtol=1e-5, atol=1e-4)


def test_a_new_model_weighs_gaussian_data_exactly(tiny):
    new = tiny(new=True, transporter_blocks=0)
    r, config = new.config.data_std, new.config
    rng = np.random.default_rng(3)
    x, noise = (rng.normal(size=(8, *shape, config.tokens, config.dim)).astype(np.float32)
                for shape in ((), (5,)))
    t = noise_levels(4, np.linspace(1e-3, 0.1, 8, dtype=np.float32))
    xs = simulate(r * x, t, noise)
    log_w = log_weight(
        contributions(new(xs, t, jnp.full(8, 4), jnp.zeros(8, int)), xs, r * x, t, 0))
    t_0 = np.asarray(t, np.float64)[:, 0, None, None]
    expected = log_gaussian(xs[:, 0], 0, (1 - t_0) ** 2 * r**2 + t_0**2)
    # Exact except for float32 rounding: 4e-6 nats a dimension, and more at
    # t_0 = .001, where z = 1e-7 / .001.
    np.testing.assert_allclose(log_w / (config.tokens * config.dim),
                               expected / (config.tokens * config.dim), atol=1e-4)
