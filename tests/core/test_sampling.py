"""Sampling: guidance against products of Gaussians, samples against the likelihood's own arithmetic, and independence of the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntm_jax.core import sampling, trajectory
from ntm_jax.core.model import NTM

RICH = {"num_classes": 2, "steps": (2, 3)}


def keys(count):
    return jax.random.split(jax.random.key(5), count)


def levels(batch, steps):
    return trajectory.levels(steps, jnp.linspace(0.03, 0.05, batch), "linear", 0.0)


def drawn(model, method, batch=3, steps=3, **options):
    """(noise, levels, label, what `method` returns) for `batch` examples."""
    t, label = levels(batch, steps), np.arange(batch) % (model.config.num_classes + 1)
    noise = trajectory.example_noise(keys(batch), (steps + 1, model.config.tokens, model.config.dim))
    run = jax.jit(lambda params, *args: method(model.module, params, *args, **options))
    return np.asarray(noise), np.asarray(t), label, jax.device_get(run(model.params, keys(batch), t, label))


@pytest.fixture(scope="module")
def random(tiny):
    return tiny(**RICH)


@pytest.fixture(scope="module")
def sampled(random):
    return drawn(random, sampling.sample)


@pytest.mark.parametrize("w", [0.0, 0.3, 1.0, 4.0])
def test_guidance_is_the_product_of_gaussians(w):
    rng = np.random.default_rng(0)
    mean_c, mean_u, log_u = rng.normal(size=(3, 50))
    log_c = log_u - np.abs(rng.normal(size=50)) * (np.arange(50) > 0)  # the first two scales are equal
    mean, log_scale = sampling.guide(*(jnp.asarray(a, jnp.float32) for a in (mean_c, log_c, mean_u, log_u)), w)
    # of the powers, exponents add: precisions, and precisions times means
    precision = (1 + w) * np.exp(-2 * log_c) - w * np.exp(-2 * log_u)
    expected = ((1 + w) * mean_c * np.exp(-2 * log_c) - w * mean_u * np.exp(-2 * log_u)) / precision
    # float32: a few roundings of numbers of up to (1 + w) |mean| of 3
    np.testing.assert_allclose(mean, expected, rtol=1e-6, atol=1e-6 * max(1, w))
    np.testing.assert_allclose(log_scale, -0.5 * np.log(precision), rtol=1e-6, atol=1e-6)


def test_guidance_clips_a_wider_conditional_and_zero_changes_nothing():
    mean_c, log_c, mean_u, log_u = jnp.array([0.5, -1.0]), jnp.array([0.3, 0.0]), jnp.array([1.0, 2.0]), jnp.array([-0.2, -3.0])
    mean, log_scale = sampling.guide(mean_c, log_c, mean_u, log_u, 1.5)
    np.testing.assert_allclose(mean, 2.5 * mean_c - 1.5 * mean_u, rtol=1e-6)  # one rounding
    np.testing.assert_allclose(log_scale, log_c, atol=1e-7)
    for a, b in ((log_c, log_u), (log_u, log_c)):
        mean, log_scale = sampling.guide(mean_c, a, mean_u, b, 0.0)
        np.testing.assert_array_equal(mean, mean_c)
        np.testing.assert_array_equal(log_scale, a)


def test_samples_are_scored_by_the_noise_they_came_from(random, sampled):
    """Sampling and likelihood are one model: the z of every factor is the noise drawn for it, and x_T is its noise."""
    noise, t, label, xs = sampled
    terms = random(xs, t, np.full(3, 3), label)
    # float32 inversion, 1e-6, divided by scales of .1 and more
    np.testing.assert_allclose(terms.quadratic, 0.5 * np.square(noise[:, :-1]).sum((2, 3)), rtol=1e-4)
    np.testing.assert_array_equal(xs[:, -1], noise[:, -1])


def test_an_image_does_not_depend_on_its_batch(random, sampled):
    _, t, label, xs = sampled
    order = np.array([2, 0])
    part = jax.jit(lambda *args: sampling.sample(random.module, random.params, *args))(keys(3)[order], t[order], label[order])
    np.testing.assert_allclose(part, xs[order], atol=2e-5)  # float32 sums in another order, through three steps


def latents(random):
    """(trajectories [3, 4, N, D], their latents, what they are told)."""
    xs, t, steps, label = random.inputs(3, steps=3)
    us = [random.transport(xs[:, k], t[:, k], steps, label)[0] for k in range(3)] + [xs[:, 3]]
    return xs, np.stack(us, 1), (t, label)


@pytest.mark.parametrize("inverse", ["auto", "parallel", "sequential"])
def test_inversion_undoes_the_transporter_at_every_level(random, inverse):
    xs, us, told = latents(random)
    found = jax.jit(lambda us: sampling.invert_trajectory(random.module, random.params, us, *told, inverse))(us)
    np.testing.assert_allclose(found, xs, atol=1e-5)  # float32 rounding of two blocks
    np.testing.assert_array_equal(found[:, -1], xs[:, -1])


def test_sweeps_are_told_by_example_level_and_block(random):
    _, us, (t, label) = latents(random)
    rough, fine, exact = (
        jax.jit(lambda us, tolerance=tolerance: sampling.inverse_sweeps(random.module, random.params, us, t, label, tolerance))(us)
        for tolerance in (1e-1, 1e-5, 0.0))
    assert rough.shape == (3, 3, 2)
    assert (rough <= fine).all()
    assert (rough < fine).any()
    assert (exact <= 6).all()
    single = random.module.apply(random.params, us[1:2, 2], t[1:2, 2], np.full(1, 3), label[1:2], "parallel", 1e-5, method=NTM.invert)[1]
    np.testing.assert_array_equal(fine[1, 2], single[0])


@pytest.mark.parametrize("inverse", ["parallel", "sequential"])
def test_sampling_by_either_inverse_is_the_same(random, sampled, inverse):
    np.testing.assert_allclose(drawn(random, sampling.sample, inverse=inverse)[-1], sampled[-1], atol=1e-5)  # float32 rounding


def test_guided_latents_take_every_step_by_the_guided_gaussian(random):
    noise, t, label, us = drawn(random, sampling.sample_latents, guidance=1.5)
    assert us.shape == (3, 4, 6, 2)
    for k in range(3):
        told = t[:, k + 1], t[:, k], np.full(3, 3)
        conditional, null = (random.predict(us[:, k + 1], *told, y) for y in (label, np.full(3, 2)))
        mean, log_scale = sampling.guide(*conditional, *null, 1.5)
        np.testing.assert_allclose(us[:, k], mean + np.exp(log_scale) * noise[:, k], atol=1e-5)  # float32 sums in another order
    assert label[2] == 2  # the null class is guided by itself: unchanged
    plain = drawn(random, sampling.sample_latents)[-1]
    np.testing.assert_allclose(us[2], plain[2], atol=1e-5)
    assert (np.abs(us[:2] - plain[:2]).max((1, 2, 3)) > 1e-2).all()


def test_a_gaussian_model_samples_its_gaussian(tiny):
    """A new model without a transporter is exact for N(0, r^2) data: variances within and covariances between levels are known."""
    new = tiny(new=True, transporter_blocks=0)
    _, t, _, xs = drawn(new, sampling.sample, batch=2000)
    deviations = xs / jnp.sqrt((0.7 * (1 - t)) ** 2 + t**2)[:, :, None, None]  # levels differ between examples
    values = np.moveaxis(np.asarray(deviations), 1, 0).reshape(4, -1)
    count = values.shape[1]  # 24,000
    assert (np.abs(values.mean(1)) < 5 / np.sqrt(count)).all()  # five standard errors, here and below
    assert (np.abs(values.var(1) - 1) < 5 * np.sqrt(2 / count)).all()
    middle = np.asarray(t[1000], np.float64)
    joint = np.outer(1 - middle, 1 - middle) * 0.49 + np.asarray(trajectory.covariance(t[1000]))
    correlation = joint / np.sqrt(np.outer(np.diag(joint), np.diag(joint)))
    # levels differ by .01 from the middle's, and a correlation's slope in t_0 is below .5
    assert (np.abs(np.corrcoef(values) - correlation) < 5 / np.sqrt(count) + 0.005).all()
