"""Likelihoods from a trajectory's terms: reconstruction, importance weights, bounds.

See docs/concepts.md, section 9. Symbols: B batch, T steps, K = T+1 levels ascending, N tokens,
D token channels, V pixel levels. Sums are in nats per example.
"""

import math

import flax.struct
import jax
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

    decoder_levels: V of the discretised decoder p(x | x_0), UNBINNED for its density, or 0 for no
    decoder. With V, log w = log p(x | x_0) + log p(x_0..x_T) - log q(x_0..x_T | x), a bound on the
    probability of discrete pixels. Without a decoder, for continuous x, it is without p(x | x_0)
    and with q(x_1..x_T | x_0), a bound on the density of the data noised to t_0. The upper part
    x_k..x_T of a trajectory gives a bound on the density at t_k. With UNBINNED the weight of
    continuous x has p(x | x_0) as that of pixels has: a bound on the density of x itself.

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


GROUPS = 16  # of trajectories, which the error of the importance-weighted bound leaves out in turn


@flax.struct.dataclass
class Importance:
    """Running sums over the trajectories of each example, in constant memory."""

    count: jax.Array  # [] trajectories so far
    log_sums: jax.Array  # [B, GROUPS] log sum w; trajectory i is in group i mod GROUPS
    log_sum_squares: jax.Array  # [B] log sum w^2
    bound: jax.Array  # [B] mean log w, nats: the evidence lower bound
    deviations: jax.Array  # [B] sum of (log w - bound)^2

    @classmethod
    def empty(cls, batch: int):
        """The sums before the first trajectory."""
        none, zero = jnp.full((batch, GROUPS), -jnp.inf), jnp.zeros(batch)
        return cls(jnp.zeros(()), none, none[:, 0], zero, zero)

    def add(self, log_weight):
        """The sums with one more trajectory for each example, of log-weights [B]."""
        change = log_weight - self.bound
        bound = self.bound + change / (self.count + 1)
        mine = jnp.arange(GROUPS)[None] == self.count % GROUPS
        with_it = jnp.logaddexp(self.log_sums, log_weight[:, None])
        return Importance(
            self.count + 1, jnp.where(mine, with_it, self.log_sums),
            jnp.logaddexp(self.log_sum_squares, 2 * log_weight),
            bound, self.deviations + change * (log_weight - bound))

    @property
    def importance_weighted(self):
        """The tighter bound log of the mean w, [B] nats (Burda et al., arXiv 1509.00519)."""
        return self._log_sum - jnp.log(self.count)

    @property
    def _log_sum(self):
        return jax.nn.logsumexp(self.log_sums, 1)

    @property
    def effective_sample_size(self):
        """(sum w)^2 / sum w^2, [B], between 1 and the number of trajectories."""
        return jnp.exp(2 * self._log_sum - self.log_sum_squares)

    @property
    def bound_variance(self):
        """Variance of `bound` over the noise, [B] nats^2; 0 with one trajectory."""
        return self.deviations / (self.count * jnp.maximum(self.count - 1, 1))

    @property
    def weighted_variance(self):
        """Variance of `importance_weighted` over the noise, [B] nats^2, by the jackknife.

        It leaves out each group of trajectories in turn, or each trajectory where there are no more
        than GROUPS. Where few weights count the delta method would say at most 1 nat^2; this is
        right to about a fifth (tests/core/test_likelihood.py). 0 with one trajectory.
        """
        number = jnp.arange(GROUPS)[None]
        sizes = jnp.maximum(jnp.ceil((self.count - number) / GROUPS), 0)
        left = jnp.where(jnp.eye(GROUPS, dtype=bool)[None], -jnp.inf, self.log_sums[:, None])
        without = jax.nn.logsumexp(left, 2) - jnp.log(self.count - sizes)  # [B, GROUPS]
        groups, used = jnp.minimum(self.count, GROUPS), (sizes > 0) & (self.count > 1)
        mean = jnp.sum(without, 1, where=used, keepdims=True) / groups
        return jnp.sum((without - mean) ** 2, 1, where=used) * (groups - 1) / groups


def reported_counts(trajectories: int) -> list[int]:
    """The numbers of trajectories for which bounds are reported: 1, 4, 16, ... and all."""
    powers = [4**i for i in range(trajectories.bit_length()) if 4**i < trajectories]
    return [*powers, trajectories]


def estimate_bounds(terms, draw, x, t, decoder_levels: int, trajectories: int) -> dict:
    """Bounds on the log-likelihood of examples x [B, N, D] in nats, from several trajectories each.

    draw(i): the i-th trajectories [B, K, N, D] at levels t [B, K]. terms(xs): the model's Terms [B,
    T]. decoder_levels: see contributions.

    Trajectories are drawn and weighed one after the other, so that memory does not grow with their
    number. As in contributions, a trajectory may be the upper part of a longer one.

    Returns bound, importance_weighted, effective_sample_size, and the bounds' variances over noise,
    bound_variance and weighted_variance: [B]; weighted, the importance-weighted bound of the first
    n trajectories for each n of reported_counts(trajectories), [B, counts]; means over
    trajectories: nll [B, T] by level, clean to noisy, and contributions.
    """
    at, (n, count) = jnp.array(reported_counts(trajectories)), t.shape

    def add(carry, number):
        importance, sums, weighted = carry
        xs = draw(number)
        found = terms(xs)
        parts = contributions(found, xs, x, t, decoder_levels)
        sums = jax.tree.map(jnp.add, sums, {"nll": found.nll} | parts)
        importance = importance.add(log_weight(parts))
        so_far = importance.importance_weighted[:, None]
        weighted = jnp.where(at[None] == importance.count, so_far, weighted)
        return (importance, sums, weighted), None

    zeros = {name: jnp.zeros((n, count - 1)) for name in ("nll", "predictor", "log_det")}
    zeros |= {"forward": jnp.zeros((n, count)), "prior": jnp.zeros(n)}
    if decoder_levels:
        zeros["reconstruction"] = jnp.zeros(n)
    carry = Importance.empty(n), zeros, jnp.zeros((n, len(at)))
    (importance, sums, weighted), _ = jax.lax.scan(add, carry, jnp.arange(trajectories))
    names = ("bound", "importance_weighted", "effective_sample_size", "bound_variance",
             "weighted_variance")
    means = jax.tree.map(lambda s: s / trajectories, sums)
    return {name: getattr(importance, name) for name in names} | {"weighted": weighted} | means
