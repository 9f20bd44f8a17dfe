"""The likelihood of a trajectory: its terms, reconstruction and weight.

See docs/concepts.md, section 9. Symbols: B batch, T steps, K = T+1 levels ascending, N tokens,
D token channels, V pixel levels. Sums are in nats per example.
"""

import math

import jax.numpy as jnp

from ntm_jax.core import trajectory
from ntm_jax.core.model import Terms, log_prior


def bits_per_dim(nats, dimensions: int):
    """Nats per example -> bits per dimension."""
    return nats / (dimensions * math.log(2))


def contributions(terms: Terms, xs, t, x=None, reconstruction=None) -> dict:
    """The contributions to the log-weight of trajectories by level, in nats.

    xs: trajectories [B, K, N, D] at levels t [B, K].

    The weight w bounds
      with x [B, N, D] and reconstruction, log p(x | x_0) [B] of core.pixels, the probability or
        density of clean x: log w = log p(x | x_0) + log p(x_0..x_T) - log q(x_0..x_T | x).
      with neither, the density of x_0: log w = log p(x_0..x_T) - log q(x_1..x_T | x_0). In the
        same way the upper part x_k..x_T of a trajectory bounds the density at t_k.
      with reconstruction alone, log p(x | x_0) - log q(x_0 | x), the same of x.

    Returns prior [B], predictor and log_det [B, T], forward [B, K], and reconstruction [B] if
    given; log_weight sums them. forward is -log q(x_k | x_{k+1}, x) or, without x,
    -log q(x_k | x_{k+1}, x_0), 0 at level 0; its last level is -log q(x_T), which cancels prior.
    """
    prior = log_prior(xs[:, -1])
    predictor = -(terms.quadratic + terms.log_scale + terms.constant)
    parts = {"prior": prior, "predictor": predictor, "log_det": terms.log_det}
    if reconstruction is not None:
        parts["reconstruction"] = reconstruction
    if x is not None:
        reverse = trajectory.log_reverse(xs, t, x)
    else:
        reverse = trajectory.log_reverse(xs[:, 1:], t[:, 1:], xs[:, 0], t[:, :1])
        reverse = jnp.pad(reverse, ((0, 0), (1, 0)))
    return parts | {"forward": -jnp.concatenate([reverse, prior[:, None]], 1)}


def log_weight(parts: dict):
    """log w, [B] nats: the sum of contributions."""
    return sum(part.reshape(len(part), -1).sum(1) for part in parts.values())
