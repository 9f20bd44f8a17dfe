"""The pixel likelihood p(x | x_0): the probability of pixel values given the nearly clean x_0.

Any normalised p(x | x_0, y) gives a bound on log p(x); the nearer it is to the posterior of the
data, the tighter. See docs/concepts.md, section 9.

Symbols: B batch, N tokens, D token channels, V pixel values, evenly spaced on [-1, 1]; R rank.
"""

import dataclasses
import math
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import logsumexp
from jax.scipy.special import log_ndtr, ndtr

from ntm_jax.core import trajectory
from ntm_jax.core.predictor import Trunk
from ntm_jax.core.transformer import at_config_precision, dense

KINDS = ("binned", "bayes", "histogram", "network", "learned", "uniform")  # see PixelLikelihood
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


class Noise(NamedTuple):
    """The noise of each pixel value at t_0: q(x_0 | v) = N((1-t_0) m_v, (s_v t_0)^2)."""

    mean: Any  # m, [V]
    rest: Any  # what float32 cannot hold of m, [V]
    scale: Any  # s, [V]


def over_values(table):
    """[V] -> [1, 1, 1, V]."""
    return jnp.asarray(table)[None, None, None]


def fixed_noise(pixel_levels: int) -> Noise:
    """The noise of the forward process (eq. 2.1): m_v = v and s_v = 1."""
    value = pixel_values(pixel_levels)
    exact = 2 * np.arange(pixel_levels) / (pixel_levels - 1) - 1
    return Noise(value, np.float32(exact - value), np.ones_like(value))


def new_noise_params(pixel_levels: int) -> dict:
    """Parameters of learned_noise that is as fixed_noise."""
    return {"shift": jnp.zeros(pixel_levels), "log_scale": jnp.zeros(pixel_levels)}


def learned_noise(params) -> Noise:
    """m_v = v + shift_v and log s_v = 3 tanh(log_scale_v / 3)."""
    mean = params["shift"] + jnp.asarray(pixel_values(len(params["shift"])))
    return Noise(mean, jnp.zeros_like(mean), jnp.exp(3 * jnp.tanh(params["log_scale"] / 3)))


def bayes_logits(x_0, t_0, log_prior, noise: Noise):
    """log of pi(v) N(x_0; (1-t_0) m_v, (s_v t_0)^2) of the values v, up to a constant.

    x_0: [B, N, D]; t_0: [B]; log_prior: log pi, [B or 1, N, D, V], or 0. Returns [B, N, D, V]. With
    r_v = x_0 - (1-t_0) m_v, and c the value whose mean is nearest to x_0, the exponent is
    (r_c/s_c)^2 - (r_v/s_v)^2 over 2 t_0^2. Float32 would lose the difference of two large squares;
    it keeps the product (r_c - r_v) (r_c + r_v).
    """
    t = trajectory.per_example(t_0, x_0)[..., None]
    x_0, (mean, rest, scale) = x_0[..., None], jax.tree.map(over_values, noise)
    nearest = jnp.argmin(jnp.abs(x_0 - (1 - t) * mean), -1, keepdims=True)
    c, rest_c, scale_c = (jnp.asarray(table)[nearest] for table in noise)
    step = (mean - c) + (rest - rest_c)
    total = ((x_0 - mean) + (x_0 - c)) - (rest + rest_c) + t * (mean + c)  # r_v + r_c
    own = (x_0 - c) - rest_c + t * c  # r_c
    squares = (1 - t) * step * total / scale**2 + own**2 * (scale_c**-2 - scale**-2)
    return log_prior - jnp.log(scale) + squares / (2 * t * t)


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
      learned: as histogram, where the noise q(x_0 | x) is trained with the model.
      uniform: 1 in the bin of x. x_0 is x with noise that is uniform in its bin, as a plain flow of
        dequantised pixels has it.
      density: the density of binned's Gaussian, of continuous data, which have no pixel values.
    pixel_levels: V. network: a PixelNetwork of the kind `network`.

    Its parameters are the collection `pixels` of a model's variables: log_prior [N, D, V] for
    histogram, network and learned, and for network also the variables of that module, called
    network. The model's own parameters hold learned noise; see noise.
    """

    kind: str
    pixel_levels: int = 0
    network: PixelNetwork | None = None

    @property
    def forward(self) -> bool:
        """Whether q(x_0 | x) is the forward process's, and not of log_prob's own."""
        return self.kind not in ("learned", "uniform")

    def noise(self, params) -> Noise:
        """q(x_0 | v) of every value v."""
        if self.kind == "learned":
            return learned_noise(params["params"]["pixels"])
        return fixed_noise(self.pixel_levels)

    def _index(self, x):
        return jnp.rint((x + 1) * ((self.pixel_levels - 1) / 2)).astype(int)

    def embed(self, params, x):
        """The means m of clean tokens x [B, N, D], of which x_0 and all levels are noisy."""
        return self.noise(params).mean[self._index(x)] if self.kind == "learned" else x

    def simulate(self, params, x, t, noise):
        """Trajectories [B, K, N, D] of clean tokens x [B, N, D] at levels t [B, K].

        noise: standard normal, [B, K, N, D].
        """
        first = noise[:, 0]
        if self.kind == "uniform":
            x_0 = x + 2 / (self.pixel_levels - 1) * (ndtr(first) - 0.5)
            return trajectory.noise_forward(x_0, t, noise[:, 1:])
        if self.kind == "learned":
            first = first * self.noise(params).scale[self._index(x)]
        x_0 = trajectory.noise_first_level(self.embed(params, x), t[:, 0], first)
        return trajectory.noise_forward(x_0, t, noise[:, 1:])

    def variance(self, params, x_0, t_0, y):
        """The mean of s^2 given x_0, [B, N, D], or 1: x_0's variance given x, over t_0^2."""
        if self.kind != "learned":
            return 1.0
        weights = jax.nn.softmax(self.logits(params, x_0, t_0, y), -1)
        return jnp.sum(weights * over_values(self.noise(params).scale) ** 2, -1)

    def nearest(self, params, m):
        """The values whose means are nearest to m [B, N, D]; m itself where the noise is fixed."""
        if self.kind != "learned":
            return m
        best = jnp.argmin(jnp.abs(m[..., None] - over_values(self.noise(params).mean)), -1)
        return jnp.asarray(pixel_values(self.pixel_levels))[best]

    def logits(self, params, x_0, t_0, y):
        """log p(v | x_0, y) of every value v, up to a constant, by Bayes' rule, [B, N, D, V] nats.

        x_0: [B, N, D] at levels t_0 [B]; y: their condition.
        """
        log_prior = 0.0 if self.kind == "bayes" else params["pixels"]["log_prior"][None]
        if self.network is not None:
            own = {"params": params["pixels"]["network"]}
            log_prior = log_prior + cast(Any, self.network.apply(own, x_0, t_0, y))
        return bayes_logits(x_0, t_0, log_prior, self.noise(params))

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
        """log p(x | x_0, y) in nats, [B]; where q is not the forward process's, -log q(x_0 | x).

        x and x_0: [B, N, D]; t_0: [B]; y: condition.
        """
        t = trajectory.per_example(t_0, x)
        clean, scale = x_0 / (1 - t), t / (1 - t)
        if self.kind == "uniform":
            return jnp.full(len(x), x[0].size * math.log(2 / (self.pixel_levels - 1)))
        if self.kind == "density":
            found = trajectory.log_normal(x, clean, scale)
        elif self.kind == "binned":
            found = log_discretized_normal(x, clean, scale, self.pixel_levels)
        else:
            logits, index = self.logits(params, x_0, t_0, y), self._index(x)
            own = np.arange(self.pixel_levels)[None, None, None] == index[..., None]
            found = jnp.where(own, logits, 0).sum(-1) - logsumexp(logits, -1)
        if self.kind == "learned":
            noise = self.noise(params)
            found -= trajectory.log_normal(x_0, (1 - t) * noise.mean[index], t * noise.scale[index])
        return jnp.sum(found, (1, 2))
