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
    def __call__(self, u, t, s, steps, label):
        """u [B, N, D] at level t [B] -> mean and log-scale of the latent at level s [B] < t: [B, N, D] each, float32.

        A new predictor with the preconditioned head is exact for independent Gaussian data of mean 0 and deviation data_std.
        """
        c = self.config
        dtype = c.dtype
        t_, s_ = per_example(t, u), per_example(s, u)
        signal, variance = (1 - t_) * c.data_std, jnp.square((1 - t_) * c.data_std) + jnp.square(t_)
        table, angles = layers.Positions(c.positions, c.grid, c.width, c.head_size, name="positions")()
        hidden = layers.dense(c.width, (None, "embed"), dtype, "embed")(u / jnp.sqrt(variance)) + table
        condition = layers.Condition(c.width, c.num_classes, len(c.steps) > 1, name="condition")((t, s), steps, label)
        hidden, _ = layers.Stack(
            c.predictor_layers, c.head_size, c.kv_heads, c.mlp_ratio, False, dtype, self.attention, c.remat, c.scan, name="stack")(
            hidden.astype(dtype), condition, angles)
        hidden = layers.norm(dtype, "norm", learned=True)(hidden)
        output = layers.dense(2 * c.dim, ("embed", None), dtype, "project", scale=0)(hidden).astype(jnp.float32)
        value, log_scale = jnp.split(output, 2, -1)
        log_scale = LOG_SCALE_BOUND * jnp.tanh(log_scale / LOG_SCALE_BOUND)
        if c.head == "direct":
            return value, log_scale
        a, b, c_ = posterior(s_, t_)
        spread = c.data_std * t_ / jnp.sqrt(variance)  # r_t: deviation of x given x_t for Gaussian data
        clean = signal * c.data_std / variance * u + spread * value
        return a * u + b * clean, 0.5 * jnp.log(jnp.square(c_) + jnp.square(b * spread)) + log_scale
