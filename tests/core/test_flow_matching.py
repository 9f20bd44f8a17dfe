"""Flow matching on Gaussian data, whose velocity, ODE and posteriors are known in closed form.

Also its head as fine-tuning begins: the rest new, over a backbone with random weights.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntm_jax.core import flow_matching, trajectory
from ntm_jax.core.config import ModelConfig
from ntm_jax.core.model import NTM
from ntm_jax.data.conditions.label import ClassCondition
from tests.core.conftest import (
    TINY,
    Tiny,
    _inputs,
    _new_weights,
    _random_weights,
    compiled,
    noise_levels,
)

R = TINY["data_std"]
CONFIG = ModelConfig(**(TINY | {
    "head": "flow_matching", "condition": ClassCondition(2, True), "transporter_blocks": 1}))
MODEL = NTM(CONFIG, backbone=flow_matching.Velocity(CONFIG))


@pytest.fixture(scope="module")
def started():
    """An NTM as fine-tuning begins: random weights in the backbone, the rest new."""
    return Tiny(MODEL, _new_weights(MODEL, 0) | {"backbone": _random_weights(MODEL, 1)["backbone"]})


@pytest.fixture(scope="module")
def random():
    return Tiny(MODEL, _random_weights(MODEL, 2))


def backbone_velocity(model: Tiny, x, t, y):
    """The velocity and last hidden states of the model's backbone, compiled once for each shape."""
    return compiled(MODEL.backbone)({"params": model.weights["backbone"]}, x, t, y)


def gaussian(x, t):
    """E[eps - x | x_t] of independent Gaussian data of mean 0 and deviation R."""
    variance = (1 - t) ** 2 * R**2 + t**2
    return t / variance * x - (1 - t) * R**2 / variance * x


def exact_backbone(x, t, y):
    """The velocity of Gaussian data, as solve expects of a backbone."""
    return gaussian(x, t[:, None, None]), None


def test_a_new_network_is_right_for_gaussian_data():
    x = np.random.default_rng(0).normal(size=(4, 6, 2)).astype(np.float32)
    t = np.array([0.0, 0.1, 0.6, 1.0], np.float32)
    new = Tiny(MODEL, _new_weights(MODEL, 0))
    found, hidden = backbone_velocity(new, x, t, np.array([0, 1, 2, 0]))
    np.testing.assert_allclose(found, gaussian(x, t[:, None, None]), rtol=1e-5, atol=1e-6)
    assert hidden.shape == (4, 6, TINY["width"])


class Broadcasting(nn.Module):
    """A backbone whose hidden states have one token alone."""

    def __call__(self, x, t, y):
        return x, x[:, :1]


def test_what_a_backbone_returns_is_checked():
    head = flow_matching.Posterior(CONFIG, Broadcasting())
    x, t = np.zeros((4, 6, 2), np.float32), np.full(4, 0.5, np.float32)
    with pytest.raises(ValueError, match=r"Broadcasting returns arrays .*\(4, 6, 2\), \(4, 1, 2\)"):
        jax.eval_shape(head.init, jax.random.key(0), x, t, t / 2, np.full(4, 2), np.zeros(4, int))


@pytest.mark.parametrize(("heun", "order"), [(False, 1), (True, 2)])
def test_the_ode_carries_noise_to_gaussian_data(heun, order):
    """The solution is x_t = sqrt(Var x_t) x_1; half the step divides the error by 2^order."""
    noise, errors = np.array([[[1.5], [-0.3]]], np.float32), []
    for steps in (20, 40):
        t = np.asarray(noise_levels(steps, np.zeros(1), "linear", 0.0))
        xs = jax.jit(lambda noise, t: flow_matching.solve(
            exact_backbone, noise, t, None, heun=heun))(noise, t)
        exact = np.sqrt((1 - t) ** 2 * R**2 + t**2)[:, :, None, None] * noise[:, None]
        assert xs.shape == (1, steps + 1, 2, 1)
        np.testing.assert_array_equal(xs[:, -1], noise)
        errors.append(np.abs(xs - exact).max())
    assert errors[1] < (0.004 if heun else 0.05)
    assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


def test_guidance_moves_away_from_the_null_condition(random):
    """One Euler step from t = 1 to 0 of two examples: x - v, v a combination of both velocities."""
    noise, y = np.random.default_rng(0).normal(size=(2, 6, 2)).astype(np.float32), np.array([0, 1])
    t, nothing = np.tile(np.float32([0, 1]), (2, 1)), np.array([2, 2])
    conditional, unconditional = (
        backbone_velocity(random, noise, t[:, 1], condition)[0] for condition in (y, nothing))
    assert np.abs(conditional - unconditional).max() > 1e-3

    def backbone(x, t, y):
        return backbone_velocity(random, x, t, y)

    xs = flow_matching.solve(backbone, noise, t, y, nothing, 1.5)
    expected = noise - (2.5 * conditional - 1.5 * unconditional)
    np.testing.assert_allclose(xs[:, 0], expected, rtol=1e-5, atol=1e-5)


def test_the_loss_is_the_velocitys_error(random):
    rng = np.random.default_rng(3)
    x, noise = rng.normal(size=(2, 2, 6, 2)).astype(np.float32)
    t, y = np.array([0.2, 0.9], np.float32), np.array([0, 1])
    params = {"params": random.weights["backbone"]}
    x_t = (1 - t)[:, None, None] * x + t[:, None, None] * noise
    velocity, _ = backbone_velocity(random, x_t, t, y)
    expected = np.mean((np.asarray(velocity) - noise + x) ** 2, (1, 2))
    found = jax.jit(functools.partial(flow_matching.velocity_errors, MODEL.backbone))(
        params, x, noise, t, y)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_step_0_is_the_flow_matching_models_posterior(started):
    """At every level mean A x_t + B (x_t - t v) and scale C; the transporter is the identity."""
    xs, t, steps, y = _inputs(CONFIG, 4, steps=4)
    for k in range(4):
        x, high, low = xs[:, k + 1], t[:, k + 1], t[:, k]
        u, log_det = started.transport(xs[:, k], low, steps, y)
        np.testing.assert_array_equal(u, xs[:, k])
        np.testing.assert_array_equal(log_det, 0)
        mean, log_scale = started.predict(x, high, low, steps, y)
        velocity = np.asarray(backbone_velocity(started, x, high, y)[0], np.float64)
        a, b, c = (np.asarray(v, np.float64)[:, None, None]
                   for v in trajectory.posterior(jnp.asarray(low), jnp.asarray(high)))
        expected = a * x + b * (x - high[:, None, None] * velocity)
        np.testing.assert_allclose(mean, expected, rtol=1e-5, atol=2e-6)
        log_c = np.broadcast_to(np.log(c), log_scale.shape)
        np.testing.assert_allclose(log_scale, log_c, rtol=1e-6, atol=1e-6)


def test_misalignment_is_the_means_distance_to_a_reference(started):
    """Zero to the backbone's own means; else the mean square by level, and no part of the NLL."""
    xs, t, steps, y = _inputs(CONFIG, 2)
    means = np.stack([
        flow_matching.posterior_mean(
            xs[:, k + 1], backbone_velocity(started, xs[:, k + 1], t[:, k + 1], y)[0],
            t[:, k], t[:, k + 1])
        for k in range(2)], 1)
    shifted = means + np.array([0.5, 2.0], np.float32)[:, None, None]
    plain, own, moved = (started(xs, t, steps, y, reference)
                         for reference in (None, means, shifted))
    np.testing.assert_allclose(own.misalignment, 0, atol=1e-10)
    np.testing.assert_allclose(moved.misalignment, np.tile([0.25, 4.0], (2, 1)), rtol=1e-4)
    np.testing.assert_allclose(moved.nll, plain.nll, rtol=1e-6)
    np.testing.assert_array_equal(plain.misalignment, 0.0)
