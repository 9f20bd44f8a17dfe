"""Score denoising: Tweedie's formula in closed-form cases, and the derivative that it uses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntm_jax.core import trajectory
from ntm_jax.core.denoising import denoise_levels, score_denoise
from tests.core.conftest import RICH, noise_levels


def test_every_level_of_gaussian_data_gives_the_posterior_mean(tiny):
    """dL/dx = J^-1 x, with J_ij = (1-t_i)(1-t_j) r^2 + S_ij for levels below pure noise."""
    new = tiny(new=True, transporter_blocks=0)
    r, rng = new.config.data_std, np.random.default_rng(0)
    t = np.asarray(noise_levels(4, jnp.array([0.05, 0.1, 0.2]), "linear", 0.0))
    noise = rng.normal(size=(3, 5, new.config.tokens, new.config.dim)).astype(np.float32)
    x = (r * rng.normal(size=noise[:, 0].shape)).astype(np.float32)
    xs = trajectory.simulate(x, t, noise)
    found = jax.jit(lambda xs: denoise_levels(new.module, new.params, xs, t, np.zeros(3, int)))(xs)
    below, levels = np.asarray(xs, np.float64)[:, :-1], np.asarray(t, np.float64)[:, :-1]
    noise_covariance = np.asarray(trajectory.covariance(t), np.float64)[:, :-1, :-1]
    joint = (1 - levels[:, :, None]) * (1 - levels[:, None]) * r**2 + noise_covariance
    gradient = np.einsum("bkj,bjnd->bknd", np.linalg.inv(joint), below)
    t_k, t_0 = levels[..., None, None], levels[:, :1, None, None]
    mean = (1 - t_0) * r**2 / ((1 - t_0) ** 2 * r**2 + t_0**2) * below[:, :1]
    expected = {"as_it_is": below / (1 - t_k), "trajectory_score": np.repeat(mean, 4, 1)}
    assert set(found) == set(expected)
    for name, values in expected.items():
        # float32 gradients of up to 1 / t_0, less what they nearly cancel, divided by 1 - t_k
        np.testing.assert_allclose(found[name], values, atol=2e-4, err_msg=name)
    # Noise of another variance at t_0 reaches all levels, by the derivative of simulate.
    scale = np.float32(1.6)
    scales = np.array([scale, 1, 1, 1, 1], np.float32)[None, :, None, None]

    def scaled(noise):
        return trajectory.simulate(jnp.zeros((3, 1, 1)), t, noise * scales)

    own = np.asarray(jax.jit(jax.jacfwd(scaled))(jnp.zeros((3, 5, 1, 1))), np.float64)
    own = np.stack([own[i, :, 0, 0, i, :, 0, 0] for i in range(3)])
    wide = (own @ own.swapaxes(1, 2))[:, :-1, :-1]
    found_wide = jax.jit(lambda xs: denoise_levels(
        new.module, new.params, xs, t, np.zeros(3, int),
        variance=jnp.full(xs[:, 0].shape, scale**2)))(xs)
    correction = np.einsum("bkj,bjnd->bknd", wide, gradient)
    np.testing.assert_allclose(
        found_wide["trajectory_score"], (below - correction) / (1 - t_k), atol=5e-4)


def test_it_moves_all_levels_by_their_covariance(tiny):
    """v . (x_0 - (1 - t_0) x) is the derivative of the NLL when every x_j moves by S_0j v.

    S_0j is scaled by the variance of x_0's noise.
    """
    random = tiny(**RICH)
    xs, t, steps, label = random.inputs(2, steps=3)
    variance = np.random.default_rng(1).uniform(0.5, 2, size=xs[:, 0].shape).astype(np.float32)
    found = jax.jit(lambda xs: score_denoise(
        random.module, random.params, xs, t, label, variance=variance))(xs)
    v = np.random.default_rng(0).normal(size=found.shape)
    s = t[:, :1] ** 2 * (1 - t) / (1 - t[:, :1])  # S_0j, j = 0 included
    direction = (s[:, :, None, None] * (variance * v)[:, None]).astype(np.float32)
    _, slope = jax.jit(lambda *args: jax.jvp(lambda xs: random(xs, t, steps, label).nll.sum(1),
                                             *args))((xs,), (direction,))
    moved = np.sum(v * (xs[:, 0] - (1 - t[:, 0, None, None]) * found), (1, 2))
    assert (np.abs(slope) > 1e-3).all()
    # differences of float32 numbers of size 1, times .03
    np.testing.assert_allclose(moved, slope, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_the_gradient_is_clipped_at_a_percentile_of_each_example(tiny):
    random = tiny(**RICH)
    xs, t, steps, label = random.inputs(2, steps=3)

    @jax.jit
    def gradient_and_denoised(xs):
        gradient = jax.grad(lambda xs: random(xs, t, steps, label).nll.sum())(xs)
        return gradient, score_denoise(random.module, random.params, xs, t, label, percentile=75.0)

    gradient, found = jax.device_get(gradient_and_denoised(xs))
    most = np.percentile(np.abs(gradient).reshape(2, -1), 75, axis=1)[:, None, None, None]
    clipped = np.clip(gradient, -most, most)
    assert (clipped != gradient).mean() == pytest.approx(0.25, abs=0.03)
    correction = np.einsum("bk,bknd->bnd", trajectory.covariance(t)[:, 0], clipped)
    np.testing.assert_allclose(found, (xs[:, 0] - correction) / (1 - t[:, 0, None, None]),
                               atol=1e-5)
