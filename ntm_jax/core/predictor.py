"""The predictor f_P: a deep transformer with full attention that gives the Gaussian of u_k given u_{k+1} (method, section 4).

Symbols: B batch (levels folded in), N tokens, D token channels, W width, s = t_k the target's level and t = t_{k+1} the input's.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ntm_jax.core import layers
from ntm_jax.core.trajectory import per_example, posterior

LOG_SCALE_BOUND = 10.0  # soft; must be wider than the 5 or 6 that a clean level needs (method, section 7)


class Predictor(nn.Module):
    """Heads: `direct`, mean and log-scale of a projection; `preconditioned`, the posterior of a predicted clean image."""

    config: Any  # core.model.ModelConfig
    attention: Any

    @nn.compact
    def __call__(self, u, t, s, steps, y):
        """u [B, N, D] at level t [B] -> mean and log-scale of the latent at level s [B] < t: [B, N, D] each, float32.

        y: labels [B], or Text, whose tokens stand in front of the image's.

        A new predictor with the preconditioned head is exact for independent Gaussian data of mean 0 and deviation data_std.
        """
        c = self.config
        dtype = c.dtype
        t_, s_ = per_example(t, u), per_example(s, u)
        signal, variance = (1 - t_) * c.data_std, jnp.square((1 - t_) * c.data_std) + jnp.square(t_)
        table, angles = layers.Positions(c.positions, c.grid, c.width, c.head_size, name="positions")()
        hidden = layers.dense(c.width, (None, "embed"), dtype, "embed")(u / jnp.sqrt(variance)) + table
        keys = None
        if c.text_width:
            hidden, angles, keys = self._after_text(y, hidden, angles)
        modulation = layers.Condition(c.width, c.num_classes, len(c.steps) > 1, name="condition")((t, s), steps, y)
        hidden, _ = layers.Stack(
            c.predictor_layers, c.head_size, c.kv_heads, c.mlp_ratio, False, dtype, self.attention, c.remat, c.scan, c.flat, name="stack")(
            hidden.astype(dtype), modulation, angles, keys)
        hidden = layers.norm(dtype, "norm", learned=True)(hidden[:, -c.tokens :])
        output = layers.dense(2 * c.dim, ("embed", None), dtype, "project", scale=0)(hidden).astype(jnp.float32)
        value, log_scale = jnp.split(output, 2, -1)
        log_scale = LOG_SCALE_BOUND * jnp.tanh(log_scale / LOG_SCALE_BOUND)
        if c.head == "direct":
            return value, log_scale
        a, b, c_ = posterior(s_, t_)
        spread = c.data_std * t_ / jnp.sqrt(variance)  # r_t: deviation of x given x_t for Gaussian data
        clean = signal * c.data_std / variance * u + spread * value
        return a * u + b * clean, 0.5 * jnp.log(jnp.square(c_) + jnp.square(b * spread)) + log_scale

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
