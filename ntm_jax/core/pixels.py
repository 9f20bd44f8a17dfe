"""The pixel likelihood p(x | x_0): the probability of pixel values given the nearly clean x_0.

Any normalised p(x | x_0, y) gives a bound on log p(x); the nearer it is to the posterior of the
data, the tighter. See docs/concepts.md, section 9.

Symbols: B batch, N tokens, D token channels, V pixel values, evenly spaced on [-1, 1]; R rank.
"""

import dataclasses
import math
from typing import Any, cast

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.nn import logsumexp
from jax.scipy.special import log_ndtr

from ntm_jax.core import trajectory
from ntm_jax.core.predictor import Trunk
from ntm_jax.core.transformer import at_config_precision, dense

KINDS = ("binned", "bayes", "histogram", "network", "uniform")  # see PixelLikelihood
RANK = 16  # of the network's logits over the values


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


def pixel_values(pixel_levels: int) -> np.ndarray:
    """The values of pixels, [V] float32, evenly spaced from -1 to 1."""
    return (2 * np.arange(pixel_levels) / (pixel_levels - 1) - 1).astype(np.float32)


def bayes_logits(x_0, t_0, log_prior, pixel_levels: int):
    """log of pi(v) N(x_0; (1-t_0) v, t_0^2) of every value v, up to a constant, [B, N, D, V].

    x_0: [B, N, D]; t_0: [B]; log_prior: log pi, [B or 1, N, D, V], or 0. With
    r(v) = x_0 - (1-t_0) v the exponent is r(c)^2 - r(v)^2 over 2 t_0^2, c the value nearest to x_0.
    Float32 would lose the difference of two large squares; it keeps their product.
    """
    t, count = trajectory.per_example(t_0, x_0), pixel_levels - 1
    index = np.arange(pixel_levels)[None, None, None]
    value = pixel_values(pixel_levels)[None, None, None]
    rest = np.float32(2 * index / count - 1 - value)  # what float32 cannot hold of the values
    place = jnp.rint((x_0 / (1 - t) + 1) * (count / 2))
    nearest = place.clip(0, count).astype(int)[..., None]
    c, rest_c = (jnp.asarray(table.ravel())[nearest] for table in (value, rest))
    x_0, t = x_0[..., None], t[..., None]
    step = (index - nearest) * np.float32(2 / count)  # v - c
    total = ((x_0 - value) + (x_0 - c)) - (rest + rest_c) + t * (value + c)  # r(v) + r(c)
    return log_prior + (1 - t) * step * total / (2 * t * t)


class PixelNetwork(Trunk):
    """A small transformer over the tokens of x_0. Its logits multiply Bayes' rule; 0 when new."""

    pixel_levels: int = 0

    @nn.compact
    @at_config_precision
    def __call__(self, x_0, t_0, y):
        """x_0 [B, N, D] at levels t_0 [B] on condition y -> logits [B, N, D, V], float32.

        They are combinations of R < V learned functions of the value, at first cosines.
        """
        c, count = self.config, self.pixel_levels
        rank = min(RANK, count - 1)
        variance, _ = self.spread(trajectory.per_example(t_0, x_0))
        hidden = self.hidden(x_0 / jnp.sqrt(variance), (t_0,), False, None, y)
        weights = dense(c.dim * rank, ("embed", None), c.dtype, "project", scale=0)(hidden)
        angles = np.outer(np.arange(1, rank + 1), (np.arange(count) + 0.5) * np.pi / count)
        functions = self.param("functions", lambda _: jnp.cos(jnp.asarray(angles, jnp.float32)))
        weights = weights.astype(jnp.float32).reshape(*x_0.shape, rank)
        return jnp.einsum("bndr,rv->bndv", weights, functions)


@dataclasses.dataclass(frozen=True)
class PixelLikelihood:
    """p(x | x_0, y), and the noise q(x_0 | x) that it inverts. Static.

    kind:
      binned: the Gaussian N(x_0/(1-t_0), (t_0/(1-t_0))^2) over the bins of the values.
      bayes: Bayes' rule, pi(v) N(x_0; (1-t_0) v, t_0^2) over its sum, where pi is flat.
      histogram: the same, where pi is a histogram of the training data by pixel and channel.
      network: the same times a network's exp(logits), normalised.
      uniform: 1 in the bin of x. x_0 is x with noise that is uniform in its bin, as a plain flow of
        dequantised pixels has it.
      density: for continuous x, the density of binned's Gaussian.
    pixel_levels: V. network: a PixelNetwork of the kind `network`.

    Its parameters are the collection `pixels` of a model's variables: log_prior [N, D, V] for
    histogram and network, and for network also the variables of that module, called network.
    """

    kind: str
    pixel_levels: int = 0
    network: PixelNetwork | None = None

    @property
    def bin_width(self) -> float:
        """The width of the bins in which x_0 is uniform; 0 where it is Gaussian."""
        return 2 / (self.pixel_levels - 1) if self.kind == "uniform" else 0.0

    def logits(self, params, x_0, t_0, y):
        """log p(v | x_0, y) of every value v, up to a constant, by Bayes' rule, [B, N, D, V] nats.

        x_0: [B, N, D] at levels t_0 [B]; y: their condition.
        """
        log_prior = 0.0 if self.kind == "bayes" else params["pixels"]["log_prior"][None]
        if self.network is not None:
            own = {"params": params["pixels"]["network"]}
            log_prior = log_prior + cast(Any, self.network.apply(own, x_0, t_0, y))
        return bayes_logits(x_0, t_0, log_prior, self.pixel_levels)

    def mode(self, params, x_0, t_0, y):
        """The most probable clean x, [B, N, D], not yet rounded to a value for binned and uniform.

        x_0: [B, N, D] at levels t_0 [B]; y: condition.
        """
        if self.kind == "uniform":
            return x_0
        if self.kind in ("binned", "density"):
            return x_0 / (1 - trajectory.per_example(t_0, x_0))
        best = jnp.argmax(self.logits(params, x_0, t_0, y), -1)
        return jnp.asarray(pixel_values(self.pixel_levels))[best]

    def log_prob(self, params, x, x_0, t_0, y):
        """log p(x | x_0, y) in nats, [B]; of `uniform`, with -log q(x_0 | x).

        x and x_0: [B, N, D]; t_0: [B]; y: condition.
        """
        t = trajectory.per_example(t_0, x)
        clean, scale = x_0 / (1 - t), t / (1 - t)
        if self.kind == "uniform":
            return jnp.full(len(x), x[0].size * math.log(self.bin_width))
        if self.kind == "density":
            found = trajectory.log_normal(x, clean, scale)
        elif self.kind == "binned":
            found = log_discretized_normal(x, clean, scale, self.pixel_levels)
        else:
            logits = self.logits(params, x_0, t_0, y)
            index = jnp.rint((x + 1) * ((self.pixel_levels - 1) / 2))[..., None]
            own = np.arange(self.pixel_levels)[None, None, None] == index
            chosen = jnp.where(own, logits, 0).sum(-1)
            found = chosen - logsumexp(logits, -1)
        return jnp.sum(found, (1, 2))
