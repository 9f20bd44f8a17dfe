"""The contributions of a likelihood, and a new model's on Gaussian data."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntm_jax.core import likelihood, trajectory
from ntm_jax.core.model import Terms
from tests.core.conftest import noise_levels

# Compiled, since eager operations compile one by one.
contributions = jax.jit(likelihood.contributions)
log_weight = jax.jit(likelihood.log_weight)
simulate = jax.jit(trajectory.simulate)


def log_gaussian(x, mean, variance):
    x = np.asarray(x, np.float64)
    return (-0.5 * ((x - mean) ** 2 / variance
                    + np.log(2 * math.pi * variance))).reshape(len(x), -1).sum(1)


@pytest.fixture(scope="module")
def drawn():
    """x of 17 pixel values [B, N, D], trajectories [B, K, N, D] of it and their levels [B, K]."""
    rng = np.random.default_rng(1)
    t = noise_levels(4, np.float32([0.02, 0.05, 0.2]))
    x = jnp.linspace(-1, 1, 17)[rng.integers(17, size=(3, 4, 2))]
    noise = rng.normal(size=(3, 5, 4, 2)).astype(np.float32)
    return x, simulate(x, t, noise), t


@pytest.mark.parametrize("bounded", ["pixels", "dequantised", "noised"])
def test_contributions_by_hand(drawn, bounded):
    x, xs, t = drawn
    rng = np.random.default_rng(2)
    quadratic, log_scale, log_det = rng.normal(size=(3, 3, 4)).astype(np.float32)
    reconstruction = None if bounded == "noised" else rng.normal(size=3).astype(np.float32)
    given = x if bounded == "pixels" else None
    terms = Terms(quadratic, log_scale, log_det, 2.5)
    parts = contributions(terms, xs, t, given, reconstruction)
    s, xs_, x_ = (np.asarray(a, np.float64) for a in (np.asarray(t)[:, :, None, None], xs, x))
    start = log_gaussian(xs[:, 0], (1 - s[:, 0]) * x_, s[:, 0] ** 2) if given is not None else 0
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
    if reconstruction is not None:
        expected["reconstruction"] = reconstruction
    assert parts.keys() == expected.keys()
    assert parts["forward"].shape == (3, 5)
    # x_T is independent noise
    np.testing.assert_allclose(parts["forward"][:, -1], -expected["prior"], rtol=1e-6)
    assert given is not None or not parts["forward"][:, 0].any()
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
        contributions(new(xs, t, jnp.full(8, 4), jnp.zeros(8, int)), xs, t))
    t_0 = np.asarray(t, np.float64)[:, 0, None, None]
    expected = log_gaussian(xs[:, 0], 0, (1 - t_0) ** 2 * r**2 + t_0**2)
    # Exact except for float32 rounding: 4e-6 nats a dimension, and more at
    # t_0 = .001, where z = 1e-7 / .001.
    np.testing.assert_allclose(log_w / (config.tokens * config.dim),
                               expected / (config.tokens * config.dim), atol=1e-4)
