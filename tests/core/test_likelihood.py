"""Likelihoods: discretised pixels, a trajectory's contributions, exact cases, importance sums."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_ndtr, logsumexp

from ntm_jax.core import likelihood, trajectory
from ntm_jax.core.model import Terms

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
levels = jax.jit(trajectory.levels, static_argnums=(0, 2, 3))
start, simulate = jax.jit(trajectory.start), jax.jit(trajectory.simulate)


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
def test_probabilities_sum_to_one_over_all_levels(pixel_levels):
    mean, scale = (jnp.asarray(a, jnp.float32).reshape(-1, 1) for a in np.meshgrid(MEANS, SCALES))
    log_p = log_discretized_normal(pixels(pixel_levels)[None], mean, scale, pixel_levels)
    assert jnp.isfinite(log_p).all()
    total = np.exp(np.asarray(log_p, np.float64)).sum(1)
    np.testing.assert_allclose(total, 1, atol=1e-6)


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


def test_the_outermost_bins_are_open():
    # half a bin is 1/16: N(0, 1) below -1 + 1/16 and above 1 - 1/16
    ends = log_discretized_normal(jnp.array([-1.0, 1.0]), 0.0, 1.0, 17)
    expected = math.log(0.5 * math.erfc((1 - 1 / 16) / math.sqrt(2)))
    np.testing.assert_allclose(ends, expected, rtol=1e-6)  # one float32 log_ndtr


def test_the_reconstruction_is_a_gaussian_about_the_scaled_noisy_image():
    rng = np.random.default_rng(0)
    x = pixels(17)[rng.integers(17, size=(2, 3, 2))]
    t_0 = jnp.array([0.02, 0.2])
    x_0 = start(x, t_0, rng.normal(size=x.shape).astype(np.float32))
    found = log_reconstruction(x, x_0, t_0, 17)
    for i, t in enumerate((0.02, 0.2)):
        bins = np.rint((np.asarray(x[i]) + 1) * 8).astype(int)
        mean = np.asarray(x_0[i], np.float64) / (1 - t)
        expected = sum(log_bins(mean[n], t / (1 - t), 17)[bins[n]] for n in np.ndindex(mean.shape))
        assert found[i] == pytest.approx(expected, rel=1e-5, abs=1e-5)  # z off by 1e-7 / .02


def log_gaussian(x, mean, variance):
    x = np.asarray(x, np.float64)
    return (-0.5 * ((x - mean) ** 2 / variance
                    + np.log(2 * math.pi * variance))).reshape(len(x), -1).sum(1)


@pytest.fixture(scope="module")
def drawn():
    """x of 17 pixel values [B, N, D], trajectories [B, K, N, D] of it and their levels [B, K]."""
    rng = np.random.default_rng(1)
    t = levels(4, np.float32([0.02, 0.05, 0.2]), "linear", 0.0)
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


def gaussian_terms(xs, t, mean, variance):
    """Terms of the true reverse conditionals of data N(mean, variance), in float64.

    Each conditions the joint Gaussian of two neighbouring levels.
    """
    xs, t = np.asarray(xs, np.float64), np.asarray(t, np.float64)
    s, t = t[:, :-1], t[:, 1:]
    covariance = (1 - s) * (1 - t) * variance + s**2 * (1 - t) / (1 - s)
    var_s, var_t = ((1 - a) ** 2 * variance + a**2 for a in (s, t))
    gain = covariance / var_t
    deviation = np.sqrt(var_s - gain * covariance)
    s, t, gain, scale = (a[:, :, None, None] for a in (s, t, gain, deviation))
    z = (xs[:, :-1] - (1 - s) * mean - gain * (xs[:, 1:] - (1 - t) * mean)) / scale
    dimensions = z[0, 0].size
    terms = 0.5 * (z**2).sum((2, 3)), dimensions * np.log(deviation), np.zeros_like(deviation)
    constant = dimensions / 2 * math.log(2 * math.pi)
    return Terms(*(jnp.asarray(a, jnp.float32) for a in terms), constant)


def test_with_the_true_conditionals_every_weight_is_the_likelihood_of_the_noisy_data(drawn):
    x, xs, t = drawn
    mean, variance = 0.3, 0.4
    terms = gaussian_terms(xs, t, mean, variance)
    log_w = log_weight(contributions(terms, xs, x, t, 0))
    t_0 = np.asarray(t, np.float64)[:, 0, None, None]
    expected = log_gaussian(xs[:, 0], (1 - t_0) * mean, (1 - t_0) ** 2 * variance + t_0**2)
    # float32 sums of some tens of nats over 8 dimensions, each off by about 4e-6
    np.testing.assert_allclose(log_w / 8, expected / 8, atol=1e-5)
    # pixels add the ratio of decoder and encoder
    pixel = log_weight(contributions(terms, xs, x, t, 17))
    encoder = log_gaussian(xs[:, 0], (1 - t_0) * np.asarray(x), t_0**2)
    ratio = log_reconstruction(x, xs[:, 0], t[:, 0], 17) - encoder
    np.testing.assert_allclose((pixel - log_w) / 8, ratio / 8, atol=1e-5)


def true_conditionals(t, mean, variance):
    """In place of a model: xs -> Terms of the reverse conditionals of data N(mean, variance).

    Written out by hand, in float32 (docs/concepts.md, section 9).
    """
    s, t = t[:, :-1, None, None], t[:, 1:, None, None]

    def terms(xs):
        a, b, c = trajectory.posterior(s, t)
        spread = (1 - t) ** 2 * variance + t**2
        clean = mean + (1 - t) * variance / spread * (xs[:, 1:] - (1 - t) * mean)
        log_scale = 0.5 * jnp.log(c**2 + b**2 * variance * t**2 / spread) + 0 * clean
        z = (xs[:, :-1] - a * xs[:, 1:] - b * clean) * jnp.exp(-log_scale)
        constant = xs[0, 0].size / 2 * math.log(2 * math.pi)
        quadratic = 0.5 * jnp.sum(z**2, (2, 3))
        return Terms(quadratic, jnp.sum(log_scale, (2, 3)), jnp.zeros(z.shape[:2]), constant)

    return terms


@pytest.mark.parametrize(("steps", "schedule"), [(1, "linear"), (4, "shifted")])
def test_one_trajectory_is_as_good_as_any_number_where_the_conditionals_are_true(steps, schedule):
    mean, variance, rng = 0.3, 0.4, np.random.default_rng(5)
    x = jnp.asarray(mean + math.sqrt(variance) * rng.normal(size=(16, 8, 3)), jnp.float32)
    t = levels(steps, np.full(16, 0.02, np.float32), schedule, 0.5)
    x_0 = start(x, t[:, 0], rng.normal(size=x.shape).astype(np.float32))

    def draw(number):
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), number), (16, steps, 8, 3))
        return trajectory.extend(x_0, t, noise)

    expected = log_gaussian(x_0, 0.98 * mean, 0.98**2 * variance + 0.02**2) / 24
    terms = true_conditionals(t, mean, variance)
    for trajectories in (1, 4, 16):
        scores = likelihood.estimate_bounds(terms, draw, x, t, 0, trajectories)
        assert scores["weighted"].shape == (16, len(likelihood.reported_counts(trajectories)))
        for bound in (scores["bound"], scores["importance_weighted"], *scores["weighted"].T):
            # float32: some 4e-6 a dimension
            np.testing.assert_allclose(bound / 24, expected, atol=1e-4)
        np.testing.assert_allclose(scores["effective_sample_size"], trajectories, rtol=1e-3)
        assert (scores["bound_variance"] < 1e-6).all()


def test_with_the_bayes_decoder_the_bound_on_the_clean_data_is_exact(monkeypatch):
    mean, variance, t_0, rng = 0.3, 0.4, 0.05, np.random.default_rng(6)
    x = jnp.asarray(mean + math.sqrt(variance) * rng.normal(size=(16, 8, 3)), jnp.float32)
    t = levels(4, np.full(16, t_0, np.float32), "linear", 0.0)
    p = 1 / (1 / variance + (1 - t_0) ** 2 / t_0**2)

    def bayes(x, x_0, t_0, pixel_levels):
        t_0 = trajectory.per_example(t_0, x)
        posterior_mean = p * (mean / variance + (1 - t_0) * x_0 / t_0**2)
        return jnp.sum(trajectory.log_normal(x, posterior_mean, math.sqrt(p)), (1, 2))

    def without_prior(x, x_0, t_0, pixel_levels):
        t_0 = trajectory.per_example(t_0, x)
        return jnp.sum(trajectory.log_normal(x, x_0 / (1 - t_0), t_0 / (1 - t_0)), (1, 2))

    def draw(number):
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(1), number), (16, 5, 8, 3))
        return trajectory.simulate(x, t, noise)

    terms = true_conditionals(t, mean, variance)
    monkeypatch.setattr(likelihood, "log_reconstruction", bayes)
    scores = likelihood.estimate_bounds(terms, draw, x, t, 17, 4)
    for bound in (scores["bound"], *scores["weighted"].T):
        np.testing.assert_allclose(bound / 24, log_gaussian(x, mean, variance) / 24, atol=1e-4)
    # the decoder that ignores the prior loses about half log(1 + t_0^2 / ((1-t_0)^2 v)) a dimension
    monkeypatch.setattr(likelihood, "log_reconstruction", without_prior)
    worse = likelihood.estimate_bounds(terms, draw, x, t, 17, 4)["bound"]
    gap = float(jnp.mean(scores["bound"] - worse)) / 24
    assert gap == pytest.approx(0.5 * math.log(1 + t_0**2 / ((1 - t_0) ** 2 * variance)), rel=0.5)


def test_the_unbinned_decoder_bounds_the_density_of_continuous_data():
    """The model's x is N(mean, variance + 2 s^2), s the decoder's deviation: the limit of many."""
    mean, variance, t_0, rng = 0.3, 0.4, 0.05, np.random.default_rng(6)
    x = jnp.asarray(mean + math.sqrt(variance) * rng.normal(size=(64, 1, 2)), jnp.float32)
    t = levels(4, np.full(64, t_0, np.float32), "linear", 0.0)
    s = t_0 / (1 - t_0)

    def draw(number):
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(1), number), (64, 5, 1, 2))
        return trajectory.simulate(x, t, noise)

    scores = likelihood.estimate_bounds(true_conditionals(t, mean, variance), draw, x, t,
                                        likelihood.UNBINNED, 1000)
    expected = np.asarray(log_gaussian(x, mean, variance + 2 * s**2))
    error = scores["importance_weighted"] - expected
    spread = np.sqrt(scores["weighted_variance"])
    np.testing.assert_array_less(np.abs(error), 5 * spread + 1e-4)
    assert (spread < 0.02).all()
    # Given x, x_0 is normal: the mean of log w is -E[z^2] / 2, with z^2 of the data and one noise.
    x, wide = np.asarray(x, np.float64), variance + s**2
    bound = -0.5 * (((x - mean) ** 2 + s**2) / wide + np.log(2 * np.pi * wide)).sum((1, 2))
    spread = np.sqrt(scores["bound_variance"])
    np.testing.assert_array_less(np.abs(scores["bound"] - bound), 5 * spread + 1e-4)
    assert scores["reconstruction"].shape == (64,)


def test_the_upper_part_of_a_trajectory_bounds_the_density_at_its_level():
    mean, variance, rng = 0.3, 0.4, np.random.default_rng(7)
    t = levels(4, np.full(6, 0.02, np.float32), "linear", 0.0)[:, 2:]
    points = rng.normal(size=(6, 8, 3)).astype(np.float32)

    def draw(number):
        return trajectory.extend(points, t, jax.random.normal(jax.random.key(number), (6, 2, 8, 3)))

    scores = likelihood.estimate_bounds(true_conditionals(t, mean, variance), draw, points, t, 0, 3)
    level = float(t[0, 0])
    expected = log_gaussian(points, (1 - level) * mean, (1 - level) ** 2 * variance + level**2)
    np.testing.assert_allclose(scores["importance_weighted"] / 24, expected / 24, atol=1e-4)


@pytest.mark.parametrize("schedule", ["linear", "shifted"])
def test_a_new_model_weighs_gaussian_data_exactly(tiny, schedule):
    new = tiny(new=True, transporter_blocks=0)
    r, config = new.config.data_std, new.config
    rng = np.random.default_rng(3)
    x, noise = (rng.normal(size=(8, *shape, config.tokens, config.dim)).astype(np.float32)
                for shape in ((), (5,)))
    t = levels(4, np.linspace(1e-3, 0.1, 8, dtype=np.float32), schedule,
               trajectory.default_shift(config.tokens))
    xs = simulate(r * x, t, noise)
    log_w = log_weight(
        contributions(new(xs, t, jnp.full(8, 4), jnp.zeros(8, int)), xs, r * x, t, 0))
    t_0 = np.asarray(t, np.float64)[:, 0, None, None]
    expected = log_gaussian(xs[:, 0], 0, (1 - t_0) ** 2 * r**2 + t_0**2)
    # Exact except for float32 rounding: 4e-6 nats a dimension, and more at
    # t_0 = .001, where z = 1e-7 / .001.
    np.testing.assert_allclose(log_w / (config.tokens * config.dim),
                               expected / (config.tokens * config.dim), atol=1e-4)


def test_importance_sums_equal_the_direct_ones():
    log_w = np.random.default_rng(4).normal(size=(6, 3)) * np.array([0.5, 3.0, 30.0]) - np.array(
        [100.0, 5000.0, 0.0])
    log_w = log_w.astype(np.float32)
    sums = likelihood.Importance.empty(3)
    for row in log_w:
        sums = sums.add(jnp.asarray(row))
    log_w = log_w.astype(np.float64)
    assert sums.count == 6
    # float32 sums of six terms; a logarithm of 10,000 is off by 5e-4, and its exponential by as
    # much
    rtol = 1e-6
    np.testing.assert_allclose(sums.bound, log_w.mean(0), rtol=rtol)
    np.testing.assert_allclose(sums.importance_weighted, logsumexp(log_w, 0) - math.log(6),
                               rtol=rtol)
    effective = np.exp(2 * logsumexp(log_w, 0) - logsumexp(2 * log_w, 0))
    np.testing.assert_allclose(sums.effective_sample_size, effective, rtol=3e-3)
    assert (sums.importance_weighted >= sums.bound).all()
    # of numbers rounded by 5e-4
    np.testing.assert_allclose(sums.bound_variance, log_w.var(0, ddof=1) / 6, rtol=1e-4)
    without = [logsumexp(np.delete(log_w, i, 0), 0) - math.log(5) for i in range(6)]
    np.testing.assert_allclose(sums.weighted_variance, 5 * np.var(without, 0), rtol=1e-3)


@pytest.mark.parametrize(("deviation", "count"), [(0.3, 4), (3.0, 8), (10.0, 40)])
def test_the_variance_of_the_weighted_bound_is_that_of_repetitions(deviation, count):
    """Of log-normal weights, of which few count where they spread widely."""
    log_w = deviation * np.random.default_rng(5).normal(size=(count, 4000)).astype(np.float32)
    sums = likelihood.Importance.empty(4000)
    for row in log_w:
        sums = sums.add(jnp.asarray(row))
    true = np.var(sums.importance_weighted)
    assert float(sums.weighted_variance.mean()) == pytest.approx(true, rel=0.25)


@pytest.mark.parametrize("weights", [[0.0], [-7.0, -7.0, -7.0, -7.0]])
def test_equal_weights_count_in_full(weights):
    sums = likelihood.Importance.empty(1)
    for weight in weights:
        sums = sums.add(jnp.array([weight]))
    found = (sums.bound[0], sums.importance_weighted[0], sums.effective_sample_size[0])
    # float32 logarithms of the sums
    assert found == pytest.approx((weights[0], weights[0], len(weights)), rel=1e-5, abs=1e-6)


def test_bounds_are_marked_at_powers_of_four():
    assert [likelihood.reported_counts(n) for n in (1, 4, 5)] == [[1], [1, 4], [1, 4, 5]]
    assert likelihood.reported_counts(10**6)[-3:] == [4**8, 4**9, 10**6]


def test_bits_per_dim():
    assert likelihood.bits_per_dim(64 * 3 * math.log(2), 64) == pytest.approx(3)
