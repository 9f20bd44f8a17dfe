"""The likelihood of a trajectory: its terms, reconstruction and weight.

See docs/concepts.md, section 9. Symbols: B batch, T steps, K = T+1 levels ascending, N tokens,
D token channels, V pixel levels. Sums are in nats per example.
"""

import math

import jax.numpy as jnp
from jax.scipy.special import log_ndtr

from ntm_jax.core import trajectory
from ntm_jax.core.model import Terms, log_prior

UNBINNED = -1  # in place of V: continuous data, whose decoder p(x | x_0) is a density


def bits_per_dim(nats, dimensions: int):
    """Nats per example -> bits per dimension."""
    return nats / (dimensions * math.log(2))


def log_discretized_normal(x, mean, scale, pixel_levels: int):
    """Elementwise log-probability of the bin of x under N(mean, scale^2), in nats.

    x is one of V values evenly spaced on [-1, 1]. Bins are 2/(V-1) wide and the outermost ones are
    open to infinity, so the V probabilities sum to 1.
    """
    half = 1 / (pixel_levels - 1)
    low = jnp.where(x < half - 1, -jnp.inf, (x - half - mean) / scale)
    high = jnp.where(x > 1 - half, jnp.inf, (x + half - mean) / scale)
    flip = low > 0  # by symmetry work in the lower tail, where log_ndtr keeps its precision
    low, high = jnp.where(flip, -high, low), jnp.where(flip, -low, high)
    log_low, log_high = log_ndtr(low), log_ndtr(high)
    return log_high + jnp.log1p(-jnp.exp(log_low - log_high))


def log_reconstruction(x, x_0, t_0, decoder_levels: int):
    """log p(x | x_0) in nats, [B]: the Gaussian N(x_0/(1-t_0), (t_0/(1-t_0))^2).

    decoder_levels: V, for which it is discretised, or UNBINNED, where it is a density. x and x_0:
    [B, N, D]; t_0: [B].
    """
    t_0 = trajectory.per_example(t_0, x)
    clean, scale = x_0 / (1 - t_0), t_0 / (1 - t_0)
    if decoder_levels == UNBINNED:
        return jnp.sum(trajectory.log_normal(x, clean, scale), (1, 2))
    return jnp.sum(log_discretized_normal(x, clean, scale, decoder_levels), (1, 2))


def contributions(terms: Terms, xs, x, t, decoder_levels: int) -> dict:
    """The contributions to the log-weight of trajectories by level, in nats.

    xs: trajectories [B, K, N, D] of clean x [B, N, D] at levels t [B, K].

    decoder_levels chooses what the weight w bounds:
      V: the probability of discrete pixels x,
        log w = log p(x | x_0) + log p(x_0..x_T) - log q(x_0..x_T | x).
      UNBINNED: the density of continuous x, by the same w, in which p(x | x_0) is a density.
      0: the density of the data noised to t_0, log w = log p(x_0..x_T) - log q(x_1..x_T | x_0). In
        the same way the upper part x_k..x_T of a trajectory bounds the density at t_k.

    Returns prior [B], predictor and log_det [B, T], forward [B, K], and with p(x | x_0)
    reconstruction [B]; log_weight sums them. forward is -log q(x_k | x_{k+1}, x) or, without
    p(x | x_0), -log q(x_k | x_{k+1}, x_0), 0 at level 0; its last level is -log q(x_T), which
    cancels prior.
    """
    prior = log_prior(xs[:, -1])
    predictor = -(terms.quadratic + terms.log_scale + terms.constant)
    parts = {"prior": prior, "predictor": predictor, "log_det": terms.log_det}
    if decoder_levels:
        reverse = trajectory.log_reverse(xs, t, x)
        parts["reconstruction"] = log_reconstruction(x, xs[:, 0], t[:, 0], decoder_levels)
    else:
        reverse = trajectory.log_reverse(xs[:, 1:], t[:, 1:], xs[:, 0], t[:, :1])
        reverse = jnp.pad(reverse, ((0, 0), (1, 0)))
    return parts | {"forward": -jnp.concatenate([reverse, prior[:, None]], 1)}


def log_weight(parts: dict):
    """log w, [B] nats: the sum of contributions."""
    return sum(part.reshape(len(part), -1).sum(1) for part in parts.values())
