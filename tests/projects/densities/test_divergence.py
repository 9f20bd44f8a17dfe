"""The likelihood of an ODE whose velocity is that of Gaussian data, and divergences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntm_jax.projects.densities.divergence import ode_log_density, rademacher, value_and_divergence

R = 0.7  # the deviation of the data


def backbone(x, t, y):
    """The velocity of independent Gaussian data of mean 0 and deviation R, as a backbone."""
    t = t[:, None, None]
    return (t - (1 - t) * R**2) / ((1 - t) ** 2 * R**2 + t**2) * x, None


def gaussian_density(x, t):
    """log N(x; 0, (1-t)^2 R^2 + t^2) at x [B, N, D], [B]: independent Gaussian data noised to t."""
    variance = (1 - t) ** 2 * R**2 + t**2
    return np.sum(-0.5 * (np.asarray(x) ** 2 / variance + np.log(2 * np.pi * variance)), (1, 2))


def even_levels(low, steps):
    return jnp.tile(jnp.linspace(low, 1, steps + 1), (2, 1))


@pytest.mark.parametrize(("heun", "order"), [(False, 1), (True, 2)])
def test_the_ode_log_density_converges_to_a_gaussians(heun, order):
    """Half the step divides the error by 2^order."""
    x = jnp.array([[[0.3, -0.9]], [[1.1, 0.2]]])
    errors = []
    for steps in (20, 40):
        found = jax.jit(lambda x, t: ode_log_density(
            backbone, x, t, None, heun))(x, even_levels(0.1, steps))
        errors.append(np.abs(found - gaussian_density(x, 0.1)))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(errors[0] / errors[1], 2**order, rtol=0.15)
    assert np.max(errors[1]) < (0.005 if heun else 0.1)


def rotation(x):
    """A velocity with a full Jacobian, of tokens and channels, and its divergence."""
    first, second = x[:, 0, 0], x[:, 1, 1]
    value = jnp.zeros_like(x).at[:, 0, 0].set(jnp.sin(first) * second).at[:, 1, 1].set(
        first * second**2)
    return value.at[:, 1, 0].set(first + second), jnp.cos(first) * second + 2 * first * second


def test_the_divergence_is_exact_or_hutchinsons():
    x = np.random.default_rng(3).normal(size=(3, 2, 2)).astype(np.float32)
    both = jax.jit(functools.partial(value_and_divergence, lambda x: rotation(x)[0]))
    expected = jax.device_get(jax.jit(rotation)(x))
    for found, wanted in zip(both(x), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    probes = rademacher(jax.random.split(jax.random.key(0), 3), 2000, (2, 2))
    assert set(np.unique(probes)) == {-1.0, 1.0}
    _, estimate = both(x, probes)
    np.testing.assert_allclose(estimate, expected[1], atol=0.15)
    assert np.max(np.abs(estimate - expected[1])) > 1e-4
