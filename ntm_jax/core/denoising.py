"""Score denoising across levels by Tweedie's formula (3.5, algorithm 3), and its learned version.

Symbols: B batch, T steps, K = T+1 levels ascending, N tokens, D token channels; L an example's
trajectory NLL in nats.
"""

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp

from ntm_jax.core import trajectory
from ntm_jax.core.model import NTM, Terms, full_precision
from ntm_jax.core.pixels import PixelLikelihood
from ntm_jax.core.predictor import Predictor
from ntm_jax.core.trajectory import covariance, per_example


def _gradient(model: NTM, params, xs, t, y, percentile: float):
    """dL/dx_j of every level j, [B, K, N, D], clipped; see score_denoise."""
    steps = jnp.full(len(xs), xs.shape[1] - 1)

    def nll(xs):  # examples do not interact, so the gradient of the sum is each example's own
        return jnp.sum(cast(Terms, model.apply(params, xs, t, steps, y)).nll)

    gradient = jax.grad(nll)(xs)
    if percentile < 100:
        most = jnp.percentile(jnp.abs(gradient), percentile, axis=(1, 2, 3), keepdims=True)
        gradient = jnp.clip(gradient, -most, most)
    return gradient


def score_denoise(model: NTM, params, xs, t, y, percentile: float = 100.0,
                  variance: Any = 1.0):
    """E[x | trajectory] under the model, [B, N, D]; of learned noise, E[m] of core.pixels.

    x = (x_0 - sum_j S_0j dL/dx_j) / (1 - t_0). The prior on x_T drops out since S_0T = 0. With one
    level it is Tweedie's formula.

    variance: of x_0 given x, over t_0^2, [B, N, D] or 1. The other levels depend on x through x_0,
    so it scales every S_0j.

    xs: trajectories [B, K, N, D] at levels t [B, K]; y: their condition. percentile: clips each
    example's gradient at this percentile of its absolute entries; 100 clips nothing.
    """
    gradient = _gradient(model, params, xs, t, y, percentile)
    correction = jnp.einsum("bk,bknd->bnd", covariance(t)[:, 0], gradient,
                            precision=model.config.precision)
    return (xs[:, 0] - variance * correction) / (1 - per_example(t[:, 0], xs[:, 0]))


def denoise_levels(model: NTM, params, xs, t, y, percentile: float = 100.0,
                   variance: Any = 1.0) -> dict:
    """Clean images from every level k < T, dict of [B, T, N, D].

    as_it_is: x_k / (1 - t_k). trajectory_score: (x_k - sum_j S_kj dL/dx_j) / (1 - t_k), which at
    level 0 is score_denoise and with true conditionals is the same for every k. Arguments as in
    score_denoise.
    """
    s, gradient = covariance(t)[:, :-1], _gradient(model, params, xs, t, y, percentile)
    xs, t = xs[:, :-1], t[:, :-1]
    by_trajectory = jnp.einsum("bkj,bjnd->bknd", s, gradient, precision=model.config.precision)
    # x_k holds a share of x_0's noise, and so of what its variance has beyond t_0^2.
    share = per_example((1 - t) / (1 - t[:, :1]), xs)
    beyond = share * (jnp.broadcast_to(variance, xs[:, 0].shape) - 1)[:, None]
    correction = by_trajectory + beyond * by_trajectory[:, :1]
    scale = 1 - per_example(t, xs)
    return {"as_it_is": xs / scale, "trajectory_score": (xs - correction) / scale}


def make_denoiser(model: NTM) -> Predictor:
    """The learned denoiser (docs/concepts.md, section 8) with the sizes of a model's predictor.

    It predicts the clean image, level s = 0, from the teacher's latent u_0 at t_0.
    """
    return Predictor(dataclasses.replace(model.config, transporter_blocks=0))


def denoise(denoiser: Predictor, params, u_0, t_0, steps: int, y):
    """g(u_0, y): latents [B, N, D] at levels t_0 [B] -> clean tokens [B, N, D]."""
    return denoiser.apply(params, u_0, t_0, jnp.zeros_like(t_0), jnp.full(len(u_0), steps), y)[0]


def denoiser_errors(denoiser: Predictor, params, teacher: NTM, teacher_params,
                    pixels: PixelLikelihood, keys, x, t, y):
    """Mean squared errors per dimension of examples x [B, N, D], dict of [B].

    Each example has one trajectory, at levels t [B, K]. to_target: the denoiser against the
    teacher's score denoising of the trajectory, its loss; to_data: the denoiser against x, or its
    means where the teacher's pixels have learned noise; target_to_data: the score denoising
    against the same.
    """
    teacher, steps = full_precision(teacher), t.shape[1] - 1
    noise = trajectory.example_noise(keys, (steps + 1, *x.shape[1:]))
    xs, x = pixels.simulate(teacher_params, x, t, noise), pixels.embed(teacher_params, x)
    variance = pixels.variance(teacher_params, xs[:, 0], t[:, 0], y)
    target = jax.lax.stop_gradient(
        score_denoise(teacher, teacher_params, xs, t, y, variance=variance))
    inputs = xs[:, 0], t[:, 0], jnp.full(len(x), steps), y
    u_0, _ = teacher.apply(teacher_params, *inputs, method=NTM.transport)
    found = denoise(denoiser, params, u_0, t[:, 0], steps, y)
    pairs = {"to_target": (found, target), "to_data": (found, x), "target_to_data": (target, x)}
    return {name: jnp.mean(jnp.square(a - b), (1, 2)) for name, (a, b) in pairs.items()}
