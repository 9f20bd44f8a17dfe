"""Sampling: guidance against products of Gaussians, samples against the likelihood, batches."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntm_jax.core import flow_matching, sampling, trajectory
from ntm_jax.core.conditions import Text
from ntm_jax.core.config import ModelConfig
from ntm_jax.core.model import NTM
from ntm_jax.data.conditions.label import ClassCondition
from ntm_jax.data.conditions.text import TextCondition
from tests.core.conftest import TINY, noise_levels


def keys(count):
    return jax.random.split(jax.random.key(5), count)


def levels(batch, steps):
    return noise_levels(steps, jnp.linspace(0.03, 0.05, batch), "linear", 0.0)


@functools.cache
def _compiled(module, method, options):
    return jax.jit(functools.partial(method, module, **dict(options)))


def drawn(model, method, batch=3, steps=3, **options):
    """(noise, levels, label, what `method` returns) for `batch` examples."""
    t, label = levels(batch, steps), np.arange(batch) % (model.config.condition.width + 1)
    noise = trajectory.example_noise(keys(batch),
                                     (steps + 1, model.config.tokens, model.config.dim))
    run = _compiled(model.module, method, tuple(options.items()))
    return np.asarray(noise), np.asarray(t), label, jax.device_get(
        run(model.params, keys(batch), t, label))


@pytest.fixture(scope="module")
def sampled(random):
    return drawn(random, sampling.sample_with_log_prob)


@pytest.mark.parametrize("w", [0.0, 0.3, 1.0, 4.0])
def test_guidance_is_the_product_of_gaussians(w):
    rng = np.random.default_rng(0)
    mean_c, mean_u, log_u = rng.normal(size=(3, 50))
    # the first two scales are equal
    log_c = log_u - np.abs(rng.normal(size=50)) * (np.arange(50) > 0)
    mean, log_scale = sampling.guide(
        *(jnp.asarray(a, jnp.float32) for a in (mean_c, log_c, mean_u, log_u)), w)
    # of the powers, exponents add: precisions, and precisions times means
    precision = (1 + w) * np.exp(-2 * log_c) - w * np.exp(-2 * log_u)
    expected = ((1 + w) * mean_c * np.exp(-2 * log_c) - w * mean_u * np.exp(-2 * log_u)) / precision
    # float32: a few roundings of numbers of up to (1 + w) |mean| of 3
    np.testing.assert_allclose(mean, expected, rtol=1e-6, atol=1e-6 * max(1, w))
    np.testing.assert_allclose(log_scale, -0.5 * np.log(precision), rtol=1e-6, atol=1e-6)


def test_guidance_clips_a_wider_conditional_and_zero_changes_nothing():
    mean_c, log_c = jnp.array([0.5, -1.0]), jnp.array([0.3, 0.0])
    mean_u, log_u = jnp.array([1.0, 2.0]), jnp.array([-0.2, -3.0])
    mean, log_scale = sampling.guide(mean_c, log_c, mean_u, log_u, 1.5)
    np.testing.assert_allclose(mean, 2.5 * mean_c - 1.5 * mean_u, rtol=1e-6)  # one rounding
    np.testing.assert_allclose(log_scale, log_c, atol=1e-7)
    for a, b in ((log_c, log_u), (log_u, log_c)):
        mean, log_scale = sampling.guide(mean_c, a, mean_u, b, 0.0)
        np.testing.assert_array_equal(mean, mean_c)
        np.testing.assert_array_equal(log_scale, a)


def factor(t, s, mean, variance):
    """(slope, offset, variance) of p(x_s | x_t), where x is N(mean, variance)."""
    at_s, at_t = ((1 - level) ** 2 * variance + level**2 for level in (s, t))
    covariance = (1 - t) / (1 - s) * at_s
    slope = covariance / at_t
    return slope, ((1 - s) - slope * (1 - t)) * mean, at_s - slope * covariance


class Factors(NTM):
    """The true factors of x ~ N(m, 1/4) given m, the condition; of x ~ N(0, 5/4) without it."""

    def setup(self):
        self.predictor = self.true_factor

    def true_factor(self, u, t, s, steps, y):
        if isinstance(y, Text):
            mean, given = y.states[:, 0, 0], y.mask[:, 0]
        else:
            mean, given = jnp.array([1.0, -0.5, 0.0])[y], y < 2
        slope, offset, variance = (a[:, None, None] for a in factor(
            t, s, jnp.where(given, mean, 0), jnp.where(given, 0.25, 1.25)))
        return slope * u + offset, 0.5 * jnp.log(variance) * jnp.ones_like(u)


def guided_moments(t, mean, w):
    """Mean and standard deviation of x_0 from the products of the factors, in float64."""
    found, variance = 0.0, 1.0
    for low, high in zip(t[-2::-1], t[:0:-1], strict=True):
        (a, b, v), (a_u, b_u, v_u) = factor(high, low, mean, 0.25), factor(high, low, 0, 1.25)
        precision = (1 + w) / v - w / v_u
        slope, offset = (((1 + w) * c / v - w * n / v_u) / precision
                         for c, n in ((a, a_u), (b, b_u)))
        found, variance = slope * found + offset, slope**2 * variance + 1 / precision
    return found, np.sqrt(variance)


@pytest.mark.parametrize("w", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("kind", [ClassCondition(2), TextCondition(1)], ids=["class", "text"])
def test_guided_samples_of_gaussians_are_the_product_of_the_factors(kind, w):
    """m is 1, and -1/2. The factors are the true ones: x_0 and x_1 have their own covariance."""
    model = Factors(ModelConfig(**TINY | {
        "grid": (8, 8), "dim": 4, "condition": kind, "transporter_blocks": 0}))
    count, t = 1000, np.array([0.05, 0.2, 0.4, 0.7, 1.0])
    means = np.repeat([1.0, -0.5], count).astype(np.float32)
    y = np.repeat([0, 1], count) if isinstance(kind, ClassCondition) else Text(
        means[:, None, None], np.ones((2 * count, 1), bool))
    us, _ = jax.jit(functools.partial(sampling.draw_latents, model, {}, guidance=w))(
        keys(2 * count), np.tile(t, (2 * count, 1)).astype(np.float32), y)
    us = np.asarray(us, np.float64)
    for x_0, x_1, mean in zip(*(np.split(us[:, k], 2) for k in (0, 1)), (1.0, -0.5), strict=True):
        expected, deviation = guided_moments(t, mean, w)
        if w == 0:
            covariance = 0.95 * 0.8 * 0.25 + float(trajectory.covariance(t[None])[0, 0, 1])
            found = np.cov(x_0.ravel(), x_1.ravel())[0, 1]
            assert found == pytest.approx(covariance, abs=2e-3)  # 4 errors of 256,000 draws
            assert expected == pytest.approx(0.95 * mean)
        error = deviation / np.sqrt(x_0.size)
        assert x_0.mean() == pytest.approx(expected, abs=4 * error)
        assert x_0.std() == pytest.approx(deviation, abs=4 * error / np.sqrt(2))


def test_samples_are_scored_by_the_noise_they_came_from(random, sampled):
    """The z of every factor of the likelihood is the noise drawn for it, and x_T is its noise."""
    noise, t, label, (xs, _) = sampled
    terms = random(xs, t, np.full(3, 3), label)
    # float32 inversion, 1e-6, divided by scales of .1 and more
    np.testing.assert_allclose(terms.quadratic, 0.5 * np.square(noise[:, :-1]).sum((2, 3)),
                               rtol=1e-4)
    np.testing.assert_array_equal(xs[:, -1], noise[:, -1])


@pytest.mark.parametrize("inverse", ["parallel", "sequential"])
def test_a_sample_comes_with_the_density_of_its_trajectory(random, sampled, inverse):
    _, t, label, (xs, log_density) = sampled if inverse == "sequential" else drawn(
        random, sampling.sample_with_log_prob, inverse=inverse)
    np.testing.assert_allclose(xs, sampled[-1][0], atol=1e-5)  # float32 rounding
    terms = random(xs, t, np.full(3, 3), label)
    prior = -0.5 * np.sum(np.square(xs[:, -1]) + np.log(2 * np.pi), (1, 2))
    # float32: 1e-4 nats a dimension, of 12
    np.testing.assert_allclose(log_density[:, :-1], -terms.nll, atol=1.2e-3)
    np.testing.assert_allclose(log_density[:, -1], prior, atol=1e-4)
    assert np.abs(terms.log_det).min() > 0.01


def test_an_image_does_not_depend_on_its_batch(random, sampled):
    _, t, label, (xs, _) = sampled
    order = np.array([2, 0, 2])
    found, _ = _compiled(random.module, sampling.sample_with_log_prob, ())(
        random.params, keys(3)[order], t[order], label[order])
    # float32 sums in another order, through three steps
    np.testing.assert_allclose(found, xs[order], atol=2e-5)


def test_a_level_is_inverted_alone(random):
    xs, t, steps, label = random.inputs(3, steps=3)
    us = np.zeros_like(xs)
    us[:, 1] = random.transport(xs[:, 1], t[:, 1], steps, label)[0]
    found = jax.jit(lambda us: sampling.invert_level(
        random.module, random.params, us, t, label, 1, "parallel"))(us)
    np.testing.assert_allclose(found, xs[:, 1], atol=1e-5)  # float32 rounding of a block


def test_a_schedule_guides_its_own_steps_alone(random):
    """Latents, and their densities, are those of each step's guided Gaussian.

    The first scale is that of the step from u_3 to u_2. A step without guidance is predicted once,
    the others as one batch.
    """
    sizes, guidance = [], (0.0, 1.5, 0.5)

    def count(call, arguments, options, context):
        if context.method_name == "predict":
            sizes.append(len(arguments[0]))
        return call(*arguments, **options)

    with nn.intercept_methods(count):
        noise, t, label, (us, log_density) = drawn(
            random, sampling.draw_latents, guidance=guidance)
    assert sizes == [3, 6]  # the two guided steps are one program
    assert us.shape == (3, 4, 6, 2)
    for k, w in zip((2, 1, 0), guidance, strict=True):
        inputs = us[:, k + 1], t[:, k + 1], t[:, k], np.full(3, 3)
        conditional, null = (random.predict(*inputs, y) for y in (label, np.full(3, 2)))
        mean, log_scale = sampling.guide(*conditional, *null, w)
        # float32 sums in another order
        np.testing.assert_allclose(us[:, k], mean + np.exp(log_scale) * noise[:, k], atol=1e-5)
        density = trajectory.log_normal(us[:, k], mean, np.exp(log_scale)).sum((1, 2))
        np.testing.assert_allclose(log_density[:, k], density, atol=1.2e-3)
    plain = drawn(random, sampling.draw_latents)[-1][0]
    same = [(us[:, k] == plain[:, k]).all() for k in (2, 1, 0)]
    assert same == [True, False, False]  # to the bit until the first guided step
    assert label[2] == 2  # the null class is guided by itself: unchanged
    np.testing.assert_allclose(us[2], plain[2], atol=1e-5)
    assert (np.abs(us[:2] - plain[:2]).max((1, 2, 3)) > 1e-2).all()
    assert flow_matching.guidance_by_step(1.5, 3) == (1.5,) * 3
