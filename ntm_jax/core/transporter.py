"""The transporter f_T: a shallow autoregressive flow from a noise level x_k to its latent u_k, and back (method, section 4).

The only file that knows the log-determinant's sign. Symbols: B batch (levels folded in), N tokens, D token channels, W width.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ntm_jax.core import layers


class Block(nn.Module):
    """One causal block: u_n = (x_n - m_n) exp(-g_n), where m_n and g_n are functions of the tokens < n in the block's own order.

    `reverse` runs over the tokens from last to first; input and output are in the image's order either way.
    """

    config: Any  # core.model.ModelConfig
    reverse: bool
    attention: Any

    def setup(self):
        c, width = self.config, self.config.transporter_width
        dtype = c.transporter_dtype
        self.embed = layers.dense(width, (None, "embed"), dtype, "embed")
        self.start = self.param("start", nn.with_logical_partitioning(nn.initializers.normal(0.02), ("embed",)), (width,))
        self.positions = layers.Positions(c.positions, c.grid, width, c.head_size)
        self.stack = layers.Stack(
            c.transporter_layers, c.head_size, c.kv_heads, c.mlp_ratio, True, dtype, self.attention, c.remat, c.scan, c.flat)
        self.norm = layers.norm(dtype, "norm", learned=True)
        self.project = layers.dense(2 * c.dim, ("embed", None), dtype, "project", scale=0)

    def _order(self, x):
        """To the block's own order of tokens, and back: axis -2."""
        return jnp.flip(x, -2) if self.reverse else x

    def _positions(self):
        table, angles = self.positions()
        return (table if isinstance(table, float) else self._order(table)), (None if angles is None else self._order(angles))

    def _shift_and_log_scale(self, hidden):
        """hidden [B, n, W] -> shift m and bounded log-scale g, [B, n, D] each, float32."""
        m, g = jnp.split(self.project(self.norm(hidden)).astype(jnp.float32), 2, -1)
        bound = self.config.log_scale_bound
        return m, bound * jnp.tanh(g / bound)

    def conditioner(self, x, modulation):
        """x [B, N, D] in the block's own order -> (m, g) [B, N, D], of which entry n depends on the tokens < n."""
        table, angles = self._positions()
        hidden = self.embed(x)
        begin = jnp.broadcast_to(self.start.astype(hidden.dtype), (x.shape[0], 1, hidden.shape[-1]))
        hidden = jnp.concatenate([begin, hidden[:, :-1]], 1)
        hidden, _ = self.stack((hidden + table).astype(hidden.dtype), modulation, angles)
        return self._shift_and_log_scale(hidden)

    def __call__(self, x, modulation):
        """x [B, N, D] -> (u [B, N, D], log|det du/dx| [B] in nats), float32."""
        x = self._order(x)
        m, g = self.conditioner(x, modulation)
        return self._order((x - m) * jnp.exp(-g)), -jnp.sum(g, (1, 2))

    def decode(self, x_previous, modulation, cache, n):
        """One step of the inverse: x_{n-1} [B, D] (ignored at n = 0) and the KV cache -> (m_n, g_n, cache)."""
        table, angles = self._positions()
        hidden = jnp.where(n == 0, self.start.astype(self.config.transporter_dtype), self.embed(x_previous))[:, None]
        table = 0.0 if isinstance(table, float) else jax.lax.dynamic_slice_in_dim(table, n, 1, 1)
        angles = None if angles is None else jax.lax.dynamic_slice_in_dim(angles, n, 1)
        hidden, cache = self.stack((hidden + table).astype(hidden.dtype), modulation, angles, None, cache, n)
        m, g = self._shift_and_log_scale(hidden)
        return m[:, 0], g[:, 0], cache

    def inverse(self, u, modulation):
        """u [B, N, D] -> x [B, N, D], token by token with a KV cache: x_n = m_n + exp(g_n) u_n."""
        c, (batch, tokens, dim) = self.config, u.shape
        block, variables = self.unbind()  # a lax.scan body may not touch a bound module
        empty = jnp.zeros((c.transporter_layers, batch, tokens, c.kv_heads, c.head_size), c.transporter_dtype)

        def step(carry, inputs):
            x_previous, cache = carry
            n, u_n = inputs
            m, g, cache = block.apply(variables, x_previous, modulation, cache, n, method=Block.decode)
            x_n = m + jnp.exp(g) * u_n
            return (x_n, cache), x_n

        u = jnp.moveaxis(self._order(u), 1, 0)
        _, x = jax.lax.scan(step, (jnp.zeros((batch, dim)), (empty, empty)), (jnp.arange(tokens), u))
        return self._order(jnp.moveaxis(x, 0, 1))


class Transporter(nn.Module):
    """`transporter_blocks` blocks in alternating order, one set of weights for all levels; a new one is the identity, exactly.

    inverse(forward(x)) == x to float32 rounding when transporter_dtype is float32.
    """

    config: Any
    attention: Any

    def setup(self):
        c = self.config
        self.condition = layers.Condition(c.transporter_width, c.num_classes, len(c.steps) > 1)
        self.blocks = [Block(c, i % 2 == 1, self.attention) for i in range(c.transporter_blocks)]

    def __call__(self, x, t, steps, label):
        """x [B, N, D] at levels t [B] -> (u [B, N, D], log|det du/dx| [B] in nats)."""
        modulation = self.condition((t,), steps, label)
        log_det = jnp.zeros(x.shape[0])
        for block in self.blocks:
            x, block_log_det = block(x, modulation)
            log_det += block_log_det
        return x, log_det

    def inverse(self, u, t, steps, label):
        """u [B, N, D] -> x [B, N, D] with forward(x) = u."""
        modulation = self.condition((t,), steps, label)
        for block in reversed(self.blocks):
            u = block.inverse(u, modulation)
        return u
