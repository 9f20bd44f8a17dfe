"""The forward process: its linear map, conditioning of joint Gaussians, values by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntm_jax.core import trajectory
from tests.core.conftest import noise_levels

PAIRS = [(1.0, 0.755), (0.755, 0.51), (0.265, 0.02), (0.9, 0.001), (0.3, 0.299), (1.0, 0.02)]
simulate, covariance, log_reverse = map(
    jax.jit, (trajectory.simulate, trajectory.covariance, trajectory.log_reverse))
levels = jax.jit(trajectory.Schedule.levels, static_argnums=(0, 1))


def uneven_levels():
    """Levels [B, K] of two examples, unevenly spaced."""
    return jnp.array([[0.02, 0.3, 0.45, 0.9, 1.0], [0.1, 0.11, 0.5, 0.7, 1.0]], jnp.float32)


def forward_step(s, t):
    """Coefficient and variance of x_t given x_s, from the marginals alone.

    x_t = a x_s + noise, with variances s^2 and t^2 given x.
    """
    a = (1 - t) / (1 - s)
    return a, t**2 - a**2 * s**2


@pytest.mark.parametrize(("schedule", "tokens"), [("linear", 256), ("shifted", 1), ("shifted", 16),
                                                  ("shifted", 256), ("shifted", 4096)])
def test_levels_ascend_from_t_min_to_one_exactly(schedule, tokens):
    t_min, shift = np.array([1e-3, 0.01], np.float32), trajectory.default_shift(tokens)
    counts = (1, 2, 3, 4, 7, 16, 31, 100)
    found = jax.jit(lambda t_min: [noise_levels(steps, t_min, schedule, shift)
                                   for steps in counts])(t_min)
    for steps, t in zip(counts, found, strict=True):
        assert t.shape == (2, steps + 1)
        assert t.dtype == np.float32
        np.testing.assert_array_equal(t[:, 0], t_min)
        assert (np.asarray(t)[:, -1] == 1).all()
        assert (np.diff(t, axis=1) > 0).all()


def test_levels_by_hand():
    t_min = jnp.array([0.02, 0.1])
    # one rounding of a few float32 operations on numbers below 1: 3e-7
    expected = [[0.02, 0.265, 0.51, 0.755, 1.0], [0.1, 0.325, 0.55, 0.775, 1.0]]
    np.testing.assert_allclose(noise_levels(4, t_min, "linear", 0.0), expected, atol=3e-7)
    # m = log 3: s_k = 3/(3 + 4/k - 1), that is 3/6, 3/4, 3/(3 + 1/3), 1
    expected = [[0.02, 0.5, 0.75, 0.9, 1.0], [0.1, 0.5, 0.75, 0.9, 1.0]]
    np.testing.assert_allclose(noise_levels(4, t_min, "shifted", math.log(3)), expected,
                               atol=3e-7)
    np.testing.assert_allclose(SHIFTED.fixed_levels(4, 3), expected[:1] * 3, atol=3e-7)


@pytest.mark.parametrize(("tokens", "shift"),
                         [(256, 0.5), (4096, 1.15), (2176, 0.825), (16, 0.459375)])
def test_default_shift(tokens, shift):
    assert trajectory.default_shift(tokens) == pytest.approx(shift, abs=1e-12)


LINEAR = trajectory.Schedule("linear", 0.0, (4,), t_min=0.02, t_min_range=(0.01, 0.03))
SHIFTED = trajectory.Schedule("shifted", math.log(3), (2, 4), t_min=0.02, t_min_range=(0.01, 0.03))


@pytest.mark.parametrize("schedule", [LINEAR, SHIFTED], ids=lambda schedule: schedule.schedule)
def test_each_example_may_have_its_own_level_and_number_of_steps(schedule):
    k, steps = np.array([0, 1, 3, 4, 8]), np.array([4, 4, 4, 4, 8])
    whole = {n: levels(schedule, n, np.float32([0.05]))[0] for n in (4, 8)}
    expected = [whole[int(n)][int(i)] for i, n in zip(k, steps, strict=True)]
    np.testing.assert_array_equal(jax.jit(schedule.level)(k, steps, 0.05), expected)


@pytest.mark.parametrize("schedule", [LINEAR, SHIFTED], ids=lambda schedule: schedule.schedule)
def test_a_share_of_the_way_is_the_schedule_with_infinitely_many_steps(schedule):
    """The level at k / T is level k of T steps from t_min = 0, whatever the schedule's t_min."""
    fine = levels(schedule, 64, np.zeros(1, np.float32))[0]
    found = np.asarray(jax.jit(schedule.level_at_fraction)(np.arange(65, dtype=np.float32) / 64))
    np.testing.assert_allclose(found, fine, rtol=3e-7)  # roundings
    np.testing.assert_array_equal(found[[0, -1]], [0, 1])


def test_simulation_is_linear_with_exactly_this_mean_and_covariance():
    t = np.asarray(uneven_levels())
    expected = np.asarray(covariance(t))
    x, noise = np.zeros((2, 1, 1), np.float32), np.zeros((2, 5, 1, 1), np.float32)
    by_x, by_noise = jax.device_get(jax.jit(jax.jacfwd(
        lambda x, noise: simulate(x, t, noise), (0, 1)))(x, noise))
    for i in range(2):
        # products of a few float32 factors below 1
        np.testing.assert_allclose(by_x[i, :, 0, 0, i, 0, 0], 1 - t[i], atol=1e-6)
        factor = by_noise[i, :, 0, 0, i, :, 0, 0]
        np.testing.assert_allclose(factor @ factor.T, expected[i], atol=1e-6)
        assert not by_x[i, ..., 1 - i, :, :].any()
        assert not by_noise[i, ..., 1 - i, :, :, :].any()


@pytest.mark.parametrize(("t", "s"), PAIRS)
def test_posterior_by_joint_conditioning(t, s):
    covariance = s * s * (1 - t) / (1 - s)  # of x_s and x_t given x
    a = covariance / t**2
    expected = a, (1 - s) - a * (1 - t), math.sqrt(s * s - a * covariance)
    # as above; 1e-7 absolute where A is zero
    np.testing.assert_allclose(trajectory.posterior(jnp.float32(s), jnp.float32(t)), expected,
                               rtol=1e-6 + 1.2e-7 / (t - s), atol=1e-7)


@pytest.mark.parametrize(("t", "s"), PAIRS)
def test_transition_keeps_the_marginals(t, s):
    a, sig = trajectory.transition(jnp.float32(s), jnp.float32(t))
    step, variance = forward_step(s, t)
    rtol = 1e-6 + 1.2e-7 / (t - s)  # a few float32 roundings, and that of t - s
    np.testing.assert_allclose((a, sig**2), (step, variance), rtol=rtol)


def log_gaussian(x, mean, variance):
    return (-0.5 * ((x - mean) ** 2 / variance + np.log(2 * math.pi * variance))).sum()


@pytest.mark.parametrize("r", [0.0, 0.015])
def test_log_reverse_sums_to_the_joint_density_given_x_r(r):
    """The joint Gaussian of x_0..x_T given x_r, by coordinate, from the forward steps alone."""
    rng = np.random.default_rng(2)
    x_r, xs = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 3, 2), (2, 5, 3, 2)))
    t = uneven_levels()
    reverse = np.asarray(log_reverse(xs, t, x_r, np.full((2, 1), r, np.float32) if r else 0.0))
    assert reverse.shape == (2, 4)
    for i, s in enumerate(np.asarray(t, np.float64)):
        total = log_gaussian(xs[i, -1].astype(float), 0, 1)
        total_forward, below, x_below = 0.0, r, x_r[i].astype(float)
        for k in range(5):
            a, variance = forward_step(below, s[k]) if k < 4 else (0.0, 1.0)
            total_forward += log_gaussian(xs[i, k].astype(float), a * x_below, variance)
            below, x_below = s[k], xs[i, k].astype(float)
        # Float32 sums of tens of terms; between the levels .1 and .11 rounding changes the variance
        # by 1e-5.
        assert total + reverse[i].sum() == pytest.approx(total_forward, rel=2e-5)
        for k in range(4):  # and each by conditioning in the joint Gaussian of x_k and x_{k+1}
            (a, low), (b, high) = forward_step(r, s[k]), forward_step(r, s[k + 1])
            gain = (b / a) * low / high
            mean = a * x_r[i] + gain * (xs[i, k + 1].astype(float) - b * x_r[i])
            assert reverse[i, k] == pytest.approx(
                log_gaussian(xs[i, k].astype(float), mean, low - gain * (b / a) * low), rel=2e-5)
