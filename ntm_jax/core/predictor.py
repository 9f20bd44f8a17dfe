"""The predictor f_P: a deep transformer with full attention that gives the Gaussian of u_k given u_{k+1} (method, section 4). A third head,
over any flow-matching network, is flow_matching.Posterior.

Symbols: B batch (levels folded in), N tokens, D token channels, W width, s = t_k the target's level and t = t_{k+1} the input's.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ntm_jax.core import layers
from ntm_jax.core.trajectory import per_example, posterior

LOG_SCALE_BOUND = 10.0  # soft; must be wider than the 5 or 6 that a clean level needs (method, section 7)


def bounded(log_scale):
    """A log-scale within LOG_SCALE_BOUND, softly."""
    return LOG_SCALE_BOUND * jnp.tanh(log_scale / LOG_SCALE_BOUND)


class Trunk(nn.Module):
    """The deep transformer, without a head; text tokens, where the model is told texts, stand in front of the image's."""

    config: Any  # core.model.ModelConfig
    attention: Any

    def hidden(self, u, times, tell_steps, steps, y):
        """Last hidden states [B, N, W] of u [B, N, D], told the levels `times`, a tuple of [B], the number of steps, and y."""
        c = self.config
        table, angles = layers.Positions(c.positions, c.grid, c.width, c.head_size, name="positions")()
        hidden = layers.dense(c.width, (None, "embed"), c.dtype, "embed")(u) + table
        keys = None
        if c.text_width:
            hidden, angles, keys = self._after_text(y, hidden, angles)
        modulation = layers.Condition(c.width, c.num_classes, tell_steps, name="condition")(times, steps, y)
        stack = layers.Stack(
            c.predictor_layers, c.head_size, c.kv_heads, c.mlp_ratio, False, c.dtype, self.attention, c.remat, c.scan, c.flat, name="stack")
        hidden, _ = stack(hidden.astype(c.dtype), modulation, angles, keys)
        return layers.norm(c.dtype, "norm", learned=True)(hidden[:, -c.tokens :])

    def spread(self, t):
        """Variance of x_t, and r_t, the deviation of x given x_t, of independent Gaussian data of mean 0 and deviation data_std."""
        variance = jnp.square((1 - t) * self.config.data_std) + jnp.square(t)
        return variance, self.config.data_std * t / jnp.sqrt(variance)

    def _after_text(self, text, hidden, angles):
        """hidden [B, N, W] and its angles behind M text tokens, and which of the M + N may be seen, [B, M + N].

        A text without tokens, the null caption, is one learned token.
        """
        c = self.config
        states = layers.dense(c.width, (None, "embed"), c.dtype, "text")(layers.norm(c.dtype, "text_norm")(text.states))
        nothing = self.param("null_text", nn.with_logical_partitioning(nn.initializers.normal(0.02), ("embed",)), (c.width,))
        first = jnp.arange(text.mask.shape[1])[None] == 0
        empty = ~jnp.any(text.mask, 1, keepdims=True) & first
        states = jnp.where(empty[..., None], nothing.astype(states.dtype)[None, None], states)
        keys = jnp.concatenate([text.mask.astype(bool) | empty, jnp.ones(hidden.shape[:2], bool)], 1)
        if angles is not None:  # the states know their own places
            angles = jnp.concatenate([jnp.zeros((text.mask.shape[1], angles.shape[1])), angles])
        return jnp.concatenate([states.astype(hidden.dtype), hidden], 1), angles, keys


class Predictor(Trunk):
    """Heads: `direct`, mean and log-scale of a projection; `preconditioned`, the posterior of a predicted clean image."""

    @nn.compact
    @layers.at_config_precision
    def __call__(self, u, t, s, steps, y):
        """u [B, N, D] at level t [B] -> mean and log-scale of the latent at level s [B] < t: [B, N, D] each, float32.

        y: labels [B], or Text, whose tokens stand in front of the image's.

        A new predictor with the preconditioned head is exact for independent Gaussian data of mean 0 and deviation data_std.
        """
        c = self.config
        t_, s_ = per_example(t, u), per_example(s, u)
        variance, spread = self.spread(t_)
        hidden = self.hidden(u / jnp.sqrt(variance), (t, s), len(c.steps) > 1, steps, y)
        output = layers.dense(2 * c.dim, ("embed", None), c.dtype, "project", scale=0)(hidden).astype(jnp.float32)
        value, log_scale = jnp.split(output, 2, -1)
        log_scale = bounded(log_scale)
        if c.head == "direct":
            return value, log_scale
        a, b, c_ = posterior(s_, t_)
        clean = (1 - t_) * c.data_std * c.data_std / variance * u + spread * value
        return a * u + b * clean, 0.5 * jnp.log(jnp.square(c_) + jnp.square(b * spread)) + log_scale
