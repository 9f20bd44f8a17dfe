"""p(x | x_0) against float64 and closed forms, and the whole bound of a model of two pixels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from scipy.special import log_ndtr, log_softmax, logsumexp

from ntm_jax.core import pixels
from ntm_jax.core.pixels import PixelLikelihood, PixelNetwork
from ntm_jax.core.trajectory import Schedule
from ntm_jax.data.conditions.label import ClassCondition
from ntm_jax.evaluation.scoring import bounds_of_batch
from tests.core.conftest import random_parameters

PIXEL_LEVELS = [2, 17, 256]
MEANS = [0.0, 0.31, -1.0, 1.0, 1.7, -3.0]
SCALES = [1e-3, 0.01, 0.1, 0.5, 3.0]

# Compiled, since eager operations compile one by one.
log_discretized_normal = jax.jit(pixels.log_discretized_normal, static_argnums=3)
bayes_logits = jax.jit(pixels.bayes_logits)


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


def assert_bayes(x_0, t_0, log_prior, noise, expected):
    """p sums to 1 in float64, and is what is expected in float32."""
    with jax.enable_x64(True):
        double = pixels.bayes_logits(
            jnp.asarray(x_0, jnp.float64), jnp.asarray(t_0, jnp.float64), log_prior[None],
            jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), noise))
        found = np.asarray(double - jax.nn.logsumexp(double, -1, keepdims=True))
    np.testing.assert_allclose(np.exp(logsumexp(found, -1)), 1, atol=1e-12)
    single = np.asarray(bayes_logits(x_0, t_0, log_prior[None], noise), np.float64)
    np.testing.assert_allclose(log_softmax(single, -1), expected, rtol=1e-5, atol=1e-5)


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
    noise = pixels.fixed_noise(pixel_levels)
    assert_bayes(x_0, t_0, log_prior, noise, expected)
    # what is picked for x
    kind = PixelLikelihood("histogram", pixel_levels)
    params = {"pixels": {"log_prior": log_prior}}
    picked = jax.jit(lambda *a: kind.log_prob(params, *a, None))(clean, x_0, t_0)
    index = np.rint((clean + 1) * (pixel_levels - 1) / 2).astype(int)
    by_hand = np.take_along_axis(expected, index[..., None], -1).sum((1, 2, 3))
    np.testing.assert_allclose(picked, by_hand, rtol=1e-5)
    mode = jax.jit(lambda *a: kind.mode(params, *a, None))(x_0, t_0)
    np.testing.assert_array_equal(mode, values(pixel_levels)[expected.argmax(-1)])
    plain = PixelLikelihood("uniform", pixel_levels)  # whose x_0 is not scaled by 1 - t_0
    np.testing.assert_array_equal(plain.mode({}, x_0, t_0, None), x_0)


def learned(pixel_levels: int) -> dict:
    """Random parameters of the noise of pixel values."""
    rng, new = np.random.default_rng(6), pixels.new_noise_params(pixel_levels)
    return {name: np.float32(rng.normal(size=a.shape) * 0.5) for name, a in new.items()}


@pytest.mark.parametrize("pixel_levels", PIXEL_LEVELS)
def test_learned_noise_is_drawn_scored_and_inverted_by_one_table(pixel_levels):
    rng, count = np.random.default_rng(2), 40
    likelihood, own = PixelLikelihood("learned", pixel_levels), learned(pixel_levels)
    log_prior = np.float32(log_softmax(rng.normal(size=(6, 5, pixel_levels)), -1))
    params = {"params": {"pixels": own}, "pixels": {"log_prior": log_prior}}
    index = rng.integers(pixel_levels, size=(count, 6, 5))
    x, eps = values(pixel_levels)[index], rng.normal(size=(count, 6, 5)).astype(np.float32)
    t_0 = np.float32(np.geomspace(1e-3, 0.5, count))
    noise = jax.device_get(jax.jit(pixels.learned_noise)(own))
    t, mean, scale = np.float64(t_0)[:, None, None], *map(np.float64, (noise.mean, noise.scale))
    levels = np.stack([t_0, np.ones_like(t_0)], 1)
    xs = jax.jit(lambda x, e: likelihood.simulate(params, x, levels, e))(x, np.stack([eps, eps], 1))
    np.testing.assert_allclose(
        xs[:, 0], (1 - t) * mean[index] + t * scale[index] * eps, rtol=1e-5, atol=1e-6)
    x_0 = np.asarray(xs[:, 0])
    z = (np.float64(x_0)[..., None] - (1 - t)[..., None] * mean) / (t[..., None] * scale)
    joint = log_prior - z**2 / 2 - np.log(scale)
    expected = log_softmax(joint, -1)
    assert_bayes(x_0, t_0, log_prior, noise, expected)
    picked = np.take_along_axis(expected, index[..., None], -1)[..., 0]
    q = -np.take_along_axis(z, index[..., None], -1)[..., 0] ** 2 / 2 - np.log(
        t * scale[index] * np.sqrt(2 * np.pi))
    found = jax.jit(lambda x: likelihood.log_prob(params, x, x_0, t_0, None))(x)
    # at t_0 = .001 float32 holds x_0 to a part in 10^4 of the noise
    np.testing.assert_allclose(found, (picked - q).sum((1, 2)), rtol=1e-4, atol=1e-3)
    weights = np.exp(expected)
    np.testing.assert_allclose(
        jax.jit(lambda a: likelihood.variance(params, a, t_0, None))(x_0),
        (weights * scale**2).sum(-1), rtol=1e-3)
    nearest = jax.jit(lambda m: likelihood.nearest(params, m))
    np.testing.assert_array_equal(nearest(np.float32(mean[index])), x)


def test_new_noise_is_the_forward_process():
    new, fixed = pixels.learned_noise(pixels.new_noise_params(17)), pixels.fixed_noise(17)
    np.testing.assert_array_equal(new.mean, fixed.mean)
    np.testing.assert_array_equal(new.scale, fixed.scale)


TWO = {"grid": (1, 2), "dim": 1, "condition": ClassCondition(2, True), "steps": (1,),
       "transporter_blocks": 1}
COUNT = 3  # values of a pixel


@pytest.fixture(scope="module")
def of_two_pixels(tiny):
    """of_two_pixels(kind) -> p(x | x_0) of two pixels, and random parameters of it."""
    network = PixelNetwork(tiny(**TWO).config, COUNT)
    log_prior = log_softmax(np.random.default_rng(3).normal(size=(2, 1, COUNT)), -1)
    own = {"log_prior": np.float32(log_prior), "network": random_parameters(
        network, np.zeros((1, 2, 1)), np.ones(1), np.zeros(1, int))["params"]}
    return lambda kind: (PixelLikelihood(kind, COUNT, network if kind == "network" else None),
                         {"params": {"pixels": learned(COUNT)}, "pixels": own})


@pytest.mark.parametrize("kind", ["binned", "bayes", "histogram", "network"])
def test_p_sums_to_one_over_the_values(of_two_pixels, kind):
    likelihood, params = of_two_pixels(kind)
    t_0 = np.float32([1e-3, 0.03, 0.1, 0.5])
    x_0 = np.float32(np.random.default_rng(4).uniform(-1.2, 1.2, size=(4, 2, 1)))
    log_prob = jax.jit(lambda x: likelihood.log_prob(params, x, x_0, t_0, np.array([0, 1, 2, 0])))
    images = np.stack(np.meshgrid(*[values(COUNT)] * 2), -1).reshape(-1, 1, 2, 1)
    total = logsumexp([log_prob(np.repeat(image, 4, 0)) for image in images], 0)
    # float32 sums of a few terms; at t_0 = .001 one value has all the probability
    np.testing.assert_allclose(total, 0, atol=1e-5)


def test_a_new_network_is_the_histogram(of_two_pixels):
    (likelihood, params), (histogram, _) = map(of_two_pixels, ("network", "histogram"))
    x_0, t_0, y = np.float32(np.random.default_rng(4).normal(size=(4, 2, 1))), np.full(
        4, 0.1, np.float32), np.array([0, 1, 2, 0])
    new = jax.jit(likelihood.network.init)(jax.random.key(0), x_0, t_0, y)["params"]
    for own, same in ((nn.unbox(new), True), (params["pixels"]["network"], False)):
        given = {"pixels": params["pixels"] | {"network": own}}
        found, expected = (
            jax.jit(one.logits)(given, x_0, t_0, y) for one in (likelihood, histogram))
        assert (np.asarray(found) == np.asarray(expected)).all() == same


@pytest.mark.parametrize("kind", ["binned", "network", "learned", "uniform"])
def test_the_bounds_of_all_images_add_up_to_at_most_one(of_two_pixels, tiny, kind):
    """And their importance-weighted bounds, of many trajectories, to one.

    x_0 of a plain flow may lie in a bin beyond the values: there, too, are images.
    """
    likelihood, params = of_two_pixels(kind)
    plain = {"head": "standard"} if kind == "uniform" else {}
    model, t_0 = tiny(**TWO, **plain), 1e-6 if plain else 0.4
    line = values(COUNT) if not plain else np.arange(-4, 5, dtype=np.float32)
    images = np.stack(np.meshgrid(line, line), -1).reshape(-1, 2, 1)
    batch = {"x": images, "label": np.ones(len(images), int), "index": np.arange(len(images))}
    own = {"params": model.params["params"] | params["params"], "pixels": params["pixels"]}
    scores = jax.device_get(bounds_of_batch(
        own, jax.random.key(5), batch, schedule=Schedule("linear", t_min=t_0),
        model=model.module, pixels=likelihood, trajectories=2000, steps=1))
    bound, weighted = (np.exp(scores[name]).sum() for name in ("bound", "importance_weighted"))
    assert bound < 1
    np.testing.assert_allclose(weighted, 1, atol=0.05)  # 2000 trajectories leave 0.03
