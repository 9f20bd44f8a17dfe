"""The transporter f_T: a shallow autoregressive flow from a noise level x_k to its latent u_k, and back (method, section 4).

The only file that knows the log-determinant's sign. Symbols: B batch (levels folded in), N tokens, D token channels, W width.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ntm_jax.core import layers

INVERSES = ("auto", "parallel", "sequential")  # of all tokens at once, by sweeps; token by token, with a KV cache
TOLERANCE = 1e-6  # of the parallel inverse: some float32 roundings, below which sweeps only shuffle last bits
HUGE = 1e15  # what the network can square


def fastest(tokens: int, cpu: bool) -> str:
    """The inverse that `auto` takes.

    Images of four levels a second on one CPU core, sequential / parallel, for two trained blocks of two layers of width 128 (of 64 for 16
    tokens) and batches of 1, 8 and 64: 16 tokens 685 / 244, 1,177 / 299, 1,337 / 197; 64 tokens 40 / 25, 52 / 23, 24 / 11; 256 tokens
    4.0 / 0.46, 2.0 / 0.2, 1.55 / 0.11; 1,024 tokens, batches of 1 and 8, 0.14 / 0.043, 0.10 / 0.005. Sweeps over a part of the tokens at a
    time, the earlier ones in a cache, were never the fastest. A CPU pays for every sweep's products; an accelerator rather waits on N
    small steps, so there sweeps are taken from 64 tokens on (not measured).
    """
    return "parallel" if tokens >= 64 and not cpu else "sequential"


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
        self.positions = layers.Positions(c.positions, c.grid, width, c.head_size, c.transporter_positions_std)
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

    def inverse(self, u, modulation, how, tolerance):
        """u [B, N, D] -> (x [B, N, D], sweeps over the tokens [B], int32); how: see INVERSES."""
        block, variables = self.unbind()  # what lax traces may not touch a bound module
        found = {
            "parallel": functools.partial(block.apply, variables, tolerance=tolerance, method=Block._all_at_once),
            "sequential": functools.partial(block.apply, variables, method=Block._one_by_one)}
        here, elsewhere = (fastest(u.shape[1], cpu) if how == "auto" else how for cpu in (True, False))
        if here == elsewhere:
            return found[here](u, modulation)
        return jax.lax.platform_dependent(u, modulation, cpu=found[here], default=found[elsewhere])

    def _all_at_once(self, u, modulation, tolerance):
        """The fixed point of x <- m(x) + exp(g(x)) u by sweeps over all tokens, from x = u.

        The k-th sweep gets the k-th token right whatever the later ones hold, so N are exact, and they are the most that it takes. An
        example stops, for good, when a sweep changes no number x by more than tolerance max(1, |x|): it depends on no other example.
        """
        u, tokens = self._order(u), u.shape[1]
        block, variables = self.unbind()

        def more(state):
            _, going, sweeps = state
            return jnp.any(going) & (jnp.max(sweeps) < tokens)

        def sweep(state):
            x, going, sweeps = state
            # A masked token's NaN would still spoil those before it (0 NaN = NaN), and so would one whose square overflows.
            m, g = block.apply(variables, jnp.where(jnp.abs(x) < HUGE, x, 0.0), modulation, method=Block.conditioner)
            new = m + jnp.exp(g) * u
            settled = jnp.all(jnp.abs(new - x) <= tolerance * jnp.maximum(1, jnp.abs(new)), (1, 2))
            return jnp.where(going[:, None, None], new, x), going & ~settled, sweeps + going

        going = jnp.all(jnp.isfinite(u), (1, 2))  # of the others nothing comes
        x, _, sweeps = jax.lax.while_loop(more, sweep, (u, going, jnp.zeros(len(u), jnp.int32)))
        return self._order(x), sweeps

    def _one_by_one(self, u, modulation):
        """Token by token with a KV cache: x_n = m_n + exp(g_n) u_n."""
        c, (batch, tokens, dim) = self.config, u.shape
        block, variables = self.unbind()
        empty = jnp.zeros((c.transporter_layers, batch, tokens, c.kv_heads, c.head_size), c.transporter_dtype)

        def step(carry, inputs):
            x_previous, cache = carry
            n, u_n = inputs
            m, g, cache = block.apply(variables, x_previous, modulation, cache, n, method=Block.decode)
            x_n = m + jnp.exp(g) * u_n
            return (x_n, cache), x_n

        u = jnp.moveaxis(self._order(u), 1, 0)
        _, x = jax.lax.scan(step, (jnp.zeros((batch, dim)), (empty, empty)), (jnp.arange(tokens), u))
        return self._order(jnp.moveaxis(x, 0, 1)), jnp.full(batch, tokens, jnp.int32)


class Transporter(nn.Module):
    """`transporter_blocks` blocks in alternating order, one set of weights for all levels; a new one is the identity, exactly.

    inverse(forward(x)) == x to float32 rounding with config.exact().
    """

    config: Any
    attention: Any

    def setup(self):
        c = self.config
        self.condition = layers.Condition(c.transporter_width, c.num_classes, len(c.steps) > 1, tell_text=c.transporter_text)
        self.blocks = [Block(c, i % 2 == 1, self.attention) for i in range(c.transporter_blocks)]

    @layers.at_config_precision
    def __call__(self, x, t, steps, y):
        """x [B, N, D] at levels t [B] -> (u [B, N, D], log|det du/dx| [B] in nats)."""
        modulation = self.condition((t,), steps, y)
        log_det = jnp.zeros(x.shape[0])
        for block in self.blocks:
            x, block_log_det = block(x, modulation)
            log_det += block_log_det
        return x, log_det

    @layers.at_config_precision
    def inverse(self, u, t, steps, y, how="auto", tolerance=TOLERANCE):
        """u [B, N, D] -> (x [B, N, D] with forward(x) = u, sweeps over the tokens [B, blocks], int32); how: see INVERSES.

        tolerance: of the parallel inverse, see Block._all_at_once.
        """
        modulation = self.condition((t,), steps, y)
        sweeps = []
        for block in reversed(self.blocks):
            u, taken = block.inverse(u, modulation, how, tolerance)
            sweeps.append(taken)
        return u, jnp.stack(sweeps[::-1], 1)
