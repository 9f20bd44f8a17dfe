"""Bounds on a log-likelihood from the weights of several trajectories.

See docs/concepts.md, section 9. Symbols: S trajectories of each example, B batch, T steps, K = T+1
levels ascending, N tokens, D token channels. Sums are in nats per example.
"""

import jax
import jax.numpy as jnp
from jax.nn import logsumexp

from ntm_jax.core import likelihood

GROUPS = 16  # jackknife groups of trajectories, for the error of the importance-weighted bound


def reported_counts(trajectories: int) -> list[int]:
    """The numbers of trajectories for which bounds are reported: 1, 4, 16, ... and all."""
    powers = [4**i for i in range(trajectories.bit_length()) if 4**i < trajectories]
    return [*powers, trajectories]


def summarize(log_weights) -> dict:
    """The bounds that the log-weights [S, B] of trajectories give, and their errors, [B] each.

    bound: mean log w, the evidence lower bound. importance_weighted: the tighter log of the mean w
    (Burda et al., arXiv 1509.00519). effective_sample_size: (sum w)^2 / sum w^2, between 1 and S.
    bound_variance and weighted_variance: the bounds' variances over the noise in nats^2, 0 for S =
    1. weighted, [B, counts]: the importance-weighted bound of the first n trajectories, for each n
    of reported_counts(S).
    """
    count = len(log_weights)
    from_first = log_weights - log_weights[:1]  # which float32 resolves better than sums of log w
    weights = jnp.exp(log_weights - log_weights.max(0, keepdims=True))  # the largest is 1
    weighted = [logsumexp(log_weights[:n], 0) - jnp.log(n) for n in reported_counts(count)]
    return {
        "bound": log_weights[0] + from_first.mean(0),
        "importance_weighted": weighted[-1],
        "effective_sample_size": jnp.square(weights.sum(0)) / jnp.square(weights).sum(0),
        "bound_variance": from_first.var(0) / max(count - 1, 1),
        "weighted_variance": _jackknife(log_weights),
        "weighted": jnp.stack(weighted, 1)}


def _jackknife(log_weights):
    """The variance of the log of the mean of w, [B], leaving out each of GROUPS groups in turn.

    Where few weights count the delta method would say at most 1 nat^2; this is right to about a
    fifth (tests/evaluation/test_importance.py).
    """
    count, batch = log_weights.shape
    if count == 1:
        return jnp.zeros(batch)
    groups = min(count, GROUPS)  # trajectory i is in group i mod groups
    padded = jnp.pad(log_weights, ((0, -count % groups), (0, 0)), constant_values=-jnp.inf)
    sums = logsumexp(padded.reshape(-1, groups, batch), 0)  # [groups, B]
    left = jnp.where(jnp.eye(groups, dtype=bool)[..., None], -jnp.inf, sums[None])
    remaining = count - (count - jnp.arange(groups) + groups - 1) // groups
    return (groups - 1) * (logsumexp(left, 1) - jnp.log(remaining)[:, None]).var(0)


def estimate_bounds(terms, draw, t, trajectories: int, x=None, reconstruct=None) -> dict:
    """Bounds on a log-likelihood in nats, from several trajectories of each example.

    draw(i): the i-th trajectories [B, K, N, D] at levels t [B, K]. terms(xs): the model's Terms [B,
    T]. x [B, N, D] and reconstruct(x_0), log p(x | x_0) [B], say what is bounded, see
    core.likelihood.contributions. As there, a trajectory may be the upper part of a longer one.

    Trajectories are drawn and weighed one after the other: only their weights take memory.

    Returns what `summarize` does, and means over trajectories: nll [B, T] by level, clean to noisy,
    and contributions.
    """
    def weigh(number):
        xs = draw(number)
        found = terms(xs)
        given = None if reconstruct is None else reconstruct(xs[:, 0])
        parts = likelihood.contributions(found, xs, t, x, given)
        return {"nll": found.nll} | parts, likelihood.log_weight(parts)

    def add(sums, number):
        found, log_weights = weigh(number)
        return jax.tree.map(jnp.add, sums, found), log_weights

    shapes, _ = jax.eval_shape(weigh, 0)
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    sums, log_weights = jax.lax.scan(add, zeros, jnp.arange(trajectories))
    return summarize(log_weights) | jax.tree.map(lambda s: s / trajectories, sums)
