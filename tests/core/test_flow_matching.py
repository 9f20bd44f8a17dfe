"""Flow matching against Gaussian data, whose velocity, ODE and posteriors are known, and the posterior head at step 0."""

import jax.numpy as jnp
import numpy as np
import pytest

from ntm_jax.core import flow_matching, layers, trajectory
from ntm_jax.core.config import ModelConfig
from ntm_jax.core.model import NTM
from tests.core.conftest import TINY, Tiny, _inputs, _new_weights, _random_weights

R = TINY["data_std"]
CONFIG = ModelConfig(**(TINY | {"head": "posterior", "num_classes": 2}))
MODEL = NTM(CONFIG, backbone=flow_matching.Velocity(CONFIG, layers.plain_attention))


@pytest.fixture(scope="module")
def started():
    """An NTM as fine-tuning begins: random weights in the backbone, the rest new."""
    return Tiny(MODEL, _new_weights(MODEL, 0) | {"backbone": _random_weights(MODEL, 1)["backbone"]})


@pytest.fixture(scope="module")
def random():
    return Tiny(MODEL, _random_weights(MODEL, 2))


def gaussian(x, t):
    """E[eps - x | x_t] of independent Gaussian data of mean 0 and deviation R."""
    variance = (1 - t) ** 2 * R**2 + t**2
    return t / variance * x - (1 - t) * R**2 / variance * x


def test_a_new_network_is_right_for_gaussian_data():
    x, t = np.random.default_rng(0).normal(size=(4, 6, 2)).astype(np.float32), np.array([0.0, 0.1, 0.6, 1.0], np.float32)
    weights = {"params": _new_weights(MODEL, 0)["backbone"]}
    found, hidden = MODEL.backbone.apply(weights, x, t, np.array([0, 1, 2, 0]))
    np.testing.assert_allclose(found, gaussian(x, t[:, None, None]), rtol=1e-5, atol=1e-6)
    assert hidden.shape == (4, 6, TINY["width"])


class Exact:
    """The velocity of Gaussian data as a backbone."""

    @staticmethod
    def apply(params, x, t, y):
        return gaussian(x, t[:, None, None]), None


@pytest.mark.parametrize(("heun", "order"), [(False, 1), (True, 2)])
def test_the_ode_carries_noise_to_gaussian_data(heun, order):
    """Its solution is x_t = sqrt(Var x_t) x_1; halving the steps' length divides the error by 2 to the method's order."""
    noise, errors = jnp.array([[[1.5], [-0.3]]]), []
    for steps in (20, 40):
        t = trajectory.levels(steps, np.zeros(1), "linear", 0.0)
        xs = flow_matching.solve(Exact, None, noise, t, None, heun=heun)
        exact = np.sqrt((1 - t) ** 2 * R**2 + t**2)[:, :, None, None] * noise[:, None]
        assert xs.shape == (1, steps + 1, 2, 1)
        np.testing.assert_array_equal(xs[:, -1], noise)
        errors.append(float(jnp.abs(xs - exact).max()))
    assert errors[1] < (0.004 if heun else 0.05)
    assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


def test_guidance_moves_away_from_the_null_condition(random):
    """One Euler step from t = 1 to 0, of two examples at once: x - v, v the combination of both velocities."""
    params, noise, y = {"params": random.weights["backbone"]}, np.random.default_rng(0).normal(size=(2, 6, 2)), np.array([0, 1])
    t, nothing = np.tile([0.0, 1.0], (2, 1)), np.array([2, 2])
    told, untold = (MODEL.backbone.apply(params, noise, t[:, 1], c)[0] for c in (y, nothing))
    assert np.abs(told - untold).max() > 1e-3
    xs = flow_matching.solve(MODEL.backbone, params, jnp.asarray(noise), t, y, nothing, 1.5)
    np.testing.assert_allclose(xs[:, 0], noise - (2.5 * told - 1.5 * untold), rtol=1e-5, atol=1e-5)


def test_the_loss_is_the_velocitys_error(random):
    rng = np.random.default_rng(3)
    x, noise, t, y = rng.normal(size=(2, 6, 2)), rng.normal(size=(2, 6, 2)), np.array([0.2, 0.9]), np.array([0, 1])
    params = {"params": random.weights["backbone"]}
    x_t = (1 - t)[:, None, None] * x + t[:, None, None] * noise
    velocity, _ = MODEL.backbone.apply(params, x_t, t, y)
    expected = np.mean((np.asarray(velocity) - noise + x) ** 2, (1, 2))
    np.testing.assert_allclose(flow_matching.velocity_errors(MODEL.backbone, params, x, noise, t, y), expected, rtol=1e-5)


def test_step_0_is_the_flow_matching_models_posterior(started):
    """At every level mean A x_t + B (x_t - t v) and scale C, and the transporter the identity, exactly."""
    xs, t, steps, y = _inputs(CONFIG, 3, steps=4)
    for k in range(4):
        x, high, low = xs[:, k + 1], t[:, k + 1], t[:, k]
        u, log_det = started.transport(xs[:, k], low, steps, y)
        np.testing.assert_array_equal(u, xs[:, k])
        np.testing.assert_array_equal(log_det, 0)
        mean, log_scale = started.predict(x, high, low, steps, y)
        velocity = np.asarray(MODEL.backbone.apply({"params": started.weights["backbone"]}, x, high, y)[0], np.float64)
        a, b, c = (np.asarray(v, np.float64)[:, None, None] for v in trajectory.posterior(jnp.asarray(low), jnp.asarray(high)))
        np.testing.assert_allclose(mean, a * x + b * (x - high[:, None, None] * velocity), rtol=1e-5, atol=2e-6)
        np.testing.assert_allclose(log_scale, np.broadcast_to(np.log(c), log_scale.shape), rtol=1e-6, atol=1e-6)


def test_new_on_gaussian_data_it_is_the_exact_posterior_given_the_clean_image():
    """With the exact velocity x_t - t v is E[x | x_t], so the mean is E[x_s | x_t]; only the scale lacks the clean image's own spread."""
    weights = _new_weights(MODEL, 0)
    s, t, x = np.full(2, 0.3, np.float32), np.full(2, 0.8, np.float32), np.random.default_rng(0).normal(size=(2, 6, 2)).astype(np.float32)
    mean, log_scale = Tiny(MODEL, weights).predict(x, t, s, np.full(2, 2), np.zeros(2, int))
    variance, across = (0.2 * R) ** 2 + 0.8**2, 0.7 * 0.2 * R**2 + 0.2 / 0.7 * 0.3**2  # of x_t; Cov(x_s, x_t), x_t = (0.2/0.7) x_s + ...
    np.testing.assert_allclose(mean, across / variance * x, rtol=1e-5)
    _, b, c = trajectory.posterior(0.3, 0.8)
    spread = R * 0.8 / np.sqrt(variance)
    np.testing.assert_allclose((0.7 * R) ** 2 + 0.3**2 - across**2 / variance, c**2 + (b * spread) ** 2, rtol=1e-5)
    assert np.exp(log_scale).max() == pytest.approx(float(c), rel=1e-5)


def test_the_scale_follows_both_levels_and_the_backbone(random):
    xs, _, steps, y = _inputs(CONFIG, 2)
    deltas = []
    for s, t in ((0.1, 0.5), (0.2, 0.5), (0.1, 0.6)):
        s, t = np.full(2, s, np.float32), np.full(2, t, np.float32)
        _, log_scale = random.predict(xs[:, 1], t, s, steps, y)
        deltas.append(log_scale - np.log(np.asarray(trajectory.posterior(jnp.asarray(s), jnp.asarray(t))[2]))[:, None, None])
    assert all(np.abs(a - b).max() > 1e-3 for a, b in ((deltas[0], deltas[1]), (deltas[0], deltas[2])))
    assert deltas[0].std() > 1e-2  # of tokens and channels


def test_misalignment_is_the_means_distance_to_a_reference(started):
    """Zero to the frozen model's own means before the first step; elsewhere the mean square, level by level, and no part of the NLL."""
    xs, t, steps, y = _inputs(CONFIG, 2)
    params = {"params": started.weights["backbone"]}
    means = np.stack([flow_matching.posterior_mean(
        xs[:, k + 1], MODEL.backbone.apply(params, xs[:, k + 1], t[:, k + 1], y)[0], t[:, k], t[:, k + 1]) for k in range(2)], 1)
    shifted = means + np.array([0.5, 2.0], np.float32)[:, None, None]
    plain, own, moved = (started(xs, t, steps, y, reference) for reference in (None, means, shifted))
    np.testing.assert_allclose(own.misalignment, 0, atol=1e-10)
    np.testing.assert_allclose(moved.misalignment, np.tile([0.25, 4.0], (2, 1)), rtol=1e-4)
    np.testing.assert_allclose(moved.nll, plain.nll, rtol=1e-6)
    np.testing.assert_array_equal(plain.misalignment, 0.0)
