"""The flow map with a predicted divergence, on Gaussian data, whose map is known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntm_jax.core.config import ModelConfig
from ntm_jax.projects.densities import flow_map
from tests.common import randomised
from tests.core.conftest import TINY

R = TINY["data_std"]
CONFIG = ModelConfig(**(TINY | {"head": "flow_matching"}))
MAP = flow_map.FlowMap(CONFIG)
X = np.random.default_rng(0).normal(size=(2, 6, 2)).astype(np.float32)
Y = np.zeros(2, np.int32)


def _spread(t):
    return np.sqrt((1 - t) ** 2 * R**2 + t**2)


@pytest.fixture(scope="module")
def new():
    return jax.jit(MAP.init)(jax.random.key(0), X, jnp.full(2, 0.5), Y)


def test_a_new_map_carries_gaussian_data_in_one_step(new):
    t, s = np.array([0.05, 0.3], np.float32), np.array([1.0, 0.8], np.float32)
    average, divergence, _ = jax.jit(lambda *a: MAP.apply(new, *a, method="average"))(X, t, s, Y)
    growth = _spread(s) / _spread(t)
    np.testing.assert_allclose(
        X + (s - t)[:, None, None] * average, growth[:, None, None] * X, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose((s - t) * divergence, 12 * np.log(growth), rtol=1e-5)


def test_the_estimate_of_a_new_map_is_a_gaussians_density(new):
    t = jnp.tile(jnp.linspace(0.04, 1, 4), (2, 1))
    found = jax.jit(lambda x: flow_map.log_density(MAP, new, x, t, Y))(X)
    variance = _spread(0.04) ** 2
    expected = np.sum(-0.5 * (X**2 / variance + np.log(2 * np.pi * variance)), (1, 2))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_average_over_no_time_is_the_velocity(new):
    """It is the limit of short intervals, and a backbone returns it."""
    params, t = randomised(new, 1), np.array([0.1, 0.6], np.float32)
    average = jax.jit(lambda s: MAP.apply(params, X, t, s, Y, method="average")[:2])
    velocity, hidden = jax.jit(lambda t: MAP.apply(params, X, t, Y))(t)
    for found, short in zip(average(t), average(t + 1e-3), strict=True):
        np.testing.assert_allclose(found, short, rtol=0.05, atol=0.05)
    np.testing.assert_allclose(velocity, average(t)[0], rtol=1e-5, atol=1e-6)
    assert hidden.shape == (2, 6, TINY["width"])


def test_errors_have_the_targets_of_joint_self_distillation(new):
    """Computed in NumPy from single calls of the network; only the found sides have gradients."""
    params, rng = randomised(new, 1), np.random.default_rng(2)
    noise = rng.normal(size=(2, *X.shape)).astype(np.float32)
    probes = np.sign(rng.normal(size=(1, *X.shape))).astype(np.float32)
    level, low, high = (np.array(a, np.float32) for a in ([0.2, 0.9], [0.1, 0.4], [0.5, 0.6]))
    call = jax.jit(lambda x, t, s: MAP.apply(params, x, t, s, Y, method="average")[:2])
    found = jax.jit(lambda params: flow_map.errors(
        MAP, params, X, noise, probes, (level, (low, high)), Y))(params)

    def at(t, eps):
        return (1 - t)[:, None, None] * X + t[:, None, None] * eps

    x_t = at(level, noise[0])
    velocity, divergence = call(x_t, level, level)
    step = 1e-3 * probes[0]
    slope = (call(x_t + step, level, level)[0] - call(x_t - step, level, level)[0]) / 2e-3
    own = np.sum(probes[0] * slope, (1, 2))
    x_low, half = at(low, noise[1]), (low + high) / 2
    first = call(x_low, low, half)
    second = call(x_low + (half - low)[:, None, None] * first[0], half, high)
    whole = call(x_low, low, high)
    expected = {
        "velocity": np.mean((velocity - (noise[0] - X)) ** 2, (1, 2)),
        "divergence": (divergence - own) ** 2 / 144,
        "average_velocity": np.mean((whole[0] - (first[0] + second[0]) / 2) ** 2, (1, 2)),
        "average_divergence": (whole[1] - (first[1] + second[1]) / 2) ** 2 / 144}
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0.02, atol=1e-5, err_msg=name)
