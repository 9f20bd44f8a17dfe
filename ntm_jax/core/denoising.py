"""Trajectory score denoising: the clean image from the model's own score, by Tweedie's formula across levels (3.5, algorithm 3)."""

import jax
import jax.numpy as jnp

from ntm_jax.core.model import NTM
from ntm_jax.core.trajectory import covariance, per_example


def score_denoise(model: NTM, params, xs, t, y, percentile: float = 100.0):
    """E[x | trajectory] under the model: xs [B, K, N, D] at levels t [B, K], condition y -> x [B, N, D].

    x = (x_0 - sum_j S_0j dL/dx_j) / (1 - t_0), L an example's whole NLL in nats; the prior on x_T drops out as S_0T = 0. Of one level it
    is Tweedie's formula. percentile: the gradient's entries are clipped at that percentile of an example's absolute ones; 100: none is.
    """
    steps = jnp.full(len(xs), xs.shape[1] - 1)

    def nll(xs):  # examples do not interact, so the gradient of the sum is each example's own
        return jnp.sum(model.apply(params, xs, t, steps, y).nll)

    gradient = jax.grad(nll)(xs)
    if percentile < 100:
        most = jnp.percentile(jnp.abs(gradient), percentile, axis=(1, 2, 3), keepdims=True)
        gradient = jnp.clip(gradient, -most, most)
    correction = jnp.einsum("bk,bknd->bnd", covariance(t)[:, 0], gradient)
    return (xs[:, 0] - correction) / (1 - per_example(t[:, 0], xs[:, 0]))
