"""From a trajectory's terms to likelihoods: reconstruction, importance weights, bounds, bits per dimension (method, section 9).

Symbols: B batch, T steps, K = T+1 levels ascending, N tokens, D token channels, V levels of a pixel. Sums are nats of a whole example.
"""

import math

import flax.struct
import jax
import jax.numpy as jnp
from jax.scipy.special import log_ndtr

from ntm_jax.core import trajectory
from ntm_jax.core.model import Terms, log_prior


def bits_per_dim(nats, dimensions: int):
    """Nats of a whole example -> bits per dimension."""
    return nats / (dimensions * math.log(2))


def log_discretized_normal(x, mean, scale, pixel_levels: int):
    """Elementwise log of the probability that N(mean, scale^2) gives to the bin of x, one of V values evenly spaced on [-1, 1].

    Bins are 2/(V-1) wide and the outermost are open to infinity, so the V probabilities sum to 1.
    """
    half = 1 / (pixel_levels - 1)
    low = jnp.where(x < half - 1, -jnp.inf, (x - half - mean) / scale)
    high = jnp.where(x > 1 - half, jnp.inf, (x + half - mean) / scale)
    flip = low > 0  # by symmetry work in the lower tail, where log_ndtr keeps its precision
    low, high = jnp.where(flip, -high, low), jnp.where(flip, -low, high)
    log_low, log_high = log_ndtr(low), log_ndtr(high)
    return log_high + jnp.log1p(-jnp.exp(log_low - log_high))


def log_reconstruction(x, x_0, t_0, pixel_levels: int):
    """log p(x | x_0) [B], the discretised Gaussian N(x_0/(1-t_0), (t_0/(1-t_0))^2): x, x_0 [B, N, D], t_0 [B]."""
    t_0 = trajectory.per_example(t_0, x)
    return jnp.sum(log_discretized_normal(x, x_0 / (1 - t_0), t_0 / (1 - t_0), pixel_levels), (1, 2))


def contributions(terms: Terms, xs, x, t, pixel_levels: int) -> dict:
    """What each term adds to the log-weight of trajectories xs [B, K, N, D] of clean x [B, N, D] at levels t [B, K]: nats, [B] each.

    pixel_levels > 0: log w = log p(x | x_0) + log p(x_0..x_T) - log q(x_0..x_T | x), a bound on the probability of discrete pixels.
    pixel_levels = 0, continuous x: without p(x | x_0) and with q(x_1..x_T | x_0), a bound on the density of the data noised to t_0.
    """
    forward = jnp.sum(trajectory.log_forward(xs, t), -1)
    parts = {
        "prior": log_prior(xs[:, -1]),
        "predictor": -jnp.sum(terms.quadratic + terms.log_scale + terms.constant, -1),
        "log_det": jnp.sum(terms.log_det, -1),
    }
    if pixel_levels:
        forward += trajectory.log_start(xs[:, 0], x, t[:, 0])
        parts["reconstruction"] = log_reconstruction(x, xs[:, 0], t[:, 0], pixel_levels)
    return parts | {"forward": -forward}


@flax.struct.dataclass
class Importance:
    """Running sums over the trajectories of each example, so that memory does not grow with their number."""

    count: jax.Array  # [] trajectories so far
    log_sum: jax.Array  # [B] log sum w
    log_sum_squares: jax.Array  # [B] log sum w^2
    total: jax.Array  # [B] sum log w

    @classmethod
    def empty(cls, batch: int):
        """Before the first trajectory."""
        return cls(jnp.zeros(()), jnp.full(batch, -jnp.inf), jnp.full(batch, -jnp.inf), jnp.zeros(batch))

    def add(self, log_weight):
        """With one more trajectory an example, of log-weights [B]."""
        return Importance(self.count + 1, jnp.logaddexp(self.log_sum, log_weight),
                          jnp.logaddexp(self.log_sum_squares, 2 * log_weight), self.total + log_weight)

    @property
    def bound(self):
        """Mean log w, [B] nats: the evidence lower bound."""
        return self.total / self.count

    @property
    def importance_weighted(self):
        """log of the mean w, [B] nats: the tighter bound."""
        return self.log_sum - jnp.log(self.count)

    @property
    def effective_sample_size(self):
        """(sum w)^2 / sum w^2, [B]: between 1 and the number of trajectories."""
        return jnp.exp(2 * self.log_sum - self.log_sum_squares)
