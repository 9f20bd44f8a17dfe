"""The predictor f_P: a deep transformer that gives the Gaussian of u_k given u_{k+1}.

See docs/concepts.md, section 4. A third head, over any flow-matching network, is
flow_matching.Posterior.

Symbols: B batch (levels folded in), N tokens, D token channels, W width, M text tokens; s = t_k the
target's level, t = t_{k+1} the input's.
"""

import flax.linen as nn
import jax.numpy as jnp

from ntm_jax.core.config import ModelConfig
from ntm_jax.core.trajectory import per_example, posterior
from ntm_jax.core.transformer import (
    LayerConfig,
    Modulation,
    Positions,
    Stack,
    at_config_precision,
    dense,
    norm,
)

LOG_SCALE_BOUND = 10.0  # soft; a clean level needs 5 or 6


def bounded(log_scale):
    """A log-scale within LOG_SCALE_BOUND, softly."""
    return LOG_SCALE_BOUND * jnp.tanh(log_scale / LOG_SCALE_BOUND)


class Trunk(nn.Module):
    """The deep transformer without a head. Tokens of the condition precede those of the image."""

    config: ModelConfig

    def hidden(self, u, times, embed_steps, steps, y):
        """Last hidden states [B, N, W] of u [B, N, D] at the levels `times`, a tuple of [B].

        They are conditioned on y and, with embed_steps, on the number of steps [B]. Called in a
        compact method, whose module gets the parameters.
        """
        c = self.config
        positions = Positions(c.positions, c.grid, c.width, c.head_size, name="positions")
        table, angles = positions()
        embed = dense(c.width, (None, "embed"), c.dtype, "embed", product=c.arithmetic.product)
        hidden = embed(u) + table
        hidden, angles, keys = c.condition.prepend(self, y, hidden, angles)
        condition = Modulation(c.width, embed_steps, c.condition.embed, name="condition")
        modulation = condition(times, steps, y)
        stack = Stack(LayerConfig(
            depth=c.predictor_layers, head_size=c.head_size, kv_heads=c.kv_heads,
            mlp_ratio=c.mlp_ratio, causal=False, dtype=c.dtype, arithmetic=c.arithmetic),
            c.remat, c.scan, name="stack")
        hidden = stack(hidden.astype(c.dtype), modulation, angles, keys)
        return norm(c.dtype, "norm", learned=True)(hidden[:, -c.tokens :])

    def spread(self, t):
        """The variance of x_t, and the deviation of x given x_t, for independent Gaussian data.

        The data have mean 0 and deviation data_std.
        """
        variance = jnp.square((1 - t) * self.config.data_std) + jnp.square(t)
        return variance, self.config.data_std * t / jnp.sqrt(variance)


class Predictor(Trunk):
    """The trunk with a head: `direct` projects mean and log-scale; `preconditioned` a clean image.

    The preconditioned head's mean is the posterior's at the predicted clean image. When new, it is
    exact for independent Gaussian data of mean 0 and deviation data_std.
    """

    @nn.compact
    @at_config_precision
    def __call__(self, u, t, s, steps, y):
        """u [B, N, D] at level t [B] -> mean and log-scale of the latent at level s [B] < t.

        Both are [B, N, D], float32. y: the condition.
        """
        c = self.config
        t_, s_ = per_example(t, u), per_example(s, u)
        variance, spread = self.spread(t_)
        hidden = self.hidden(u / jnp.sqrt(variance), (t, s), len(c.steps) > 1, steps, y)
        project = dense(
            2 * c.dim, ("embed", None), c.dtype, "project", scale=0,
            product=c.arithmetic.product)
        output = project(hidden).astype(jnp.float32)
        value, log_scale = jnp.split(output, 2, -1)
        log_scale = bounded(log_scale)
        if c.head == "direct":
            return value, log_scale
        # preconditioned; also the denoiser of a model whose head is flow_matching
        a, b, c_ = posterior(s_, t_)
        clean = (1 - t_) * c.data_std * c.data_std / variance * u + spread * value
        prior = 0.5 * jnp.log(jnp.square(c_) + jnp.square(b * spread))
        return a * u + b * clean, prior + log_scale
