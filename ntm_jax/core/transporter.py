"""The transporter f_T: a shallow autoregressive flow between levels x_k and latents u_k.

See docs/concepts.md, section 4. The forward pass gives log|det du/dx|, the inverse log|det dx/du|.

Symbols: B batch (levels folded in), N tokens, D token channels, W width.
"""

from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from ntm_jax.core.config import ModelConfig
from ntm_jax.core.transformer import (
    LayerConfig,
    Modulation,
    Positions,
    Stack,
    at_config_precision,
    dense,
    norm,
    partitioned,
)

# parallel inverts all tokens at once, by sweeps; sequential token by token, with a KV cache.
INVERSES = ("parallel", "sequential")
TOLERANCE = 1e-6  # of the parallel inverse: a few float32 roundings
HUGE = 1e15  # the network can square smaller numbers


class Block(nn.Module):
    """One causal block: u_n = (x_n - m_n) exp(-g_n), with m_n and g_n functions of the tokens < n.

    `reverse` orders the tokens from last to first; input and output keep the image's order.
    """

    config: ModelConfig
    reverse: bool

    def setup(self):
        c, width = self.config, self.config.transporter_width
        dtype = c.transporter_dtype
        product = c.arithmetic.product
        self.embed = dense(width, (None, "embed"), dtype, "embed", product=product)
        init = partitioned(("embed",), nn.initializers.normal, 0.02)
        self.start = self.param("start", init, (width,))
        self.positions = Positions(
            c.positions, c.grid, width, c.head_size, c.transporter_positions_std)
        self.stack = Stack(LayerConfig(
            depth=c.transporter_layers, head_size=c.head_size, kv_heads=c.kv_heads,
            mlp_ratio=c.mlp_ratio, causal=True, dtype=dtype, arithmetic=c.arithmetic),
            c.remat, c.scan)
        self.norm = norm(dtype, "norm", learned=True)
        self.project = dense(
            2 * c.dim, ("embed", None), dtype, "project", scale=0, product=product)

    def _order(self, x):
        """x, with its tokens on axis -2, in the block's own order, or back from it."""
        return jnp.flip(x, -2) if self.reverse else x

    def _positions(self):
        table, angles = self.positions()
        table = table if isinstance(table, float) else self._order(table)
        return table, None if angles is None else self._order(angles)

    def _shift_and_log_scale(self, hidden):
        """hidden [B, n, W] -> shift m and bounded log-scale g, [B, n, D] each, float32."""
        m, g = jnp.split(self.project(self.norm(hidden)).astype(jnp.float32), 2, -1)
        bound = self.config.log_scale_bound
        return m, bound * jnp.tanh(g / bound)

    def conditioner(self, x, modulation):
        """x [B, N, D] in the block's order -> (m, g) [B, N, D]; entry n depends on tokens < n."""
        table, angles = self._positions()
        hidden = self.embed(x)
        begin = jnp.broadcast_to(self.start.astype(hidden.dtype), (x.shape[0], 1, hidden.shape[-1]))
        hidden = jnp.concatenate([begin, hidden[:, :-1]], 1)
        hidden = self.stack((hidden + table).astype(hidden.dtype), modulation, angles)
        return self._shift_and_log_scale(hidden)

    def __call__(self, x, modulation):
        """x [B, N, D] -> (u [B, N, D], log|det du/dx| [B] in nats), float32."""
        x = self._order(x)
        m, g = self.conditioner(x, modulation)
        return self._order((x - m) * jnp.exp(-g)), -jnp.sum(g, (1, 2))

    def decode(self, x_previous, weights, modulation, caches, n):
        """One step of the inverse, from x_{n-1} [B, D] and the KV caches -> (m_n, g_n, caches).

        x_{n-1} is ignored at n = 0. weights, caches: by layer; see Stack.decode.
        """
        table, angles = self._positions()
        start = self.start.astype(self.config.transporter_dtype)[None]
        hidden = jnp.where(n == 0, start, self.embed(x_previous))[:, None]
        if not isinstance(table, (int, float)):
            table = jax.lax.dynamic_slice_in_dim(table, n, 1, 1)
        angles = None if angles is None else jax.lax.dynamic_slice_in_dim(angles, n, 1)
        hidden = (hidden + table).astype(hidden.dtype)
        hidden, caches = self.stack.decode(hidden, weights, modulation, angles, caches, n)
        m, g = self._shift_and_log_scale(hidden)
        return m[:, 0], g[:, 0], caches

    def inverse(self, u, modulation, how, tolerance):
        """u [B, N, D] -> (x [B, N, D], sweeps over the tokens [B], int32, log|det dx/du| [B]).

        how: see INVERSES; sequential takes N sweeps.
        """
        block, variables = self.unbind()  # bound modules cannot be used inside lax control flow
        variables = _gathered(block, variables, u, modulation)
        if how == "parallel":
            return block.apply(variables, u, modulation, tolerance, method=Block._all_at_once)
        return block.apply(variables, u, modulation, method=Block._one_by_one)

    def _all_at_once(self, u, modulation, tolerance):
        """The fixed point of x <- m(x) + exp(g(x)) u by sweeps over all tokens, from x = u.

        The k-th sweep makes the k-th token exact, whatever the later tokens are, so at most N
        sweeps are needed. An example stops when a sweep changes no number x by more than tolerance
        max(1, |x|); examples do not depend on each other. The log-determinant is that of the last
        sweep.
        """
        u, tokens = self._order(u), u.shape[1]
        block, variables = self.unbind()

        def conditioner(x) -> tuple[jax.Array, jax.Array]:
            return cast(Any, block.apply(variables, x, modulation, method=Block.conditioner))

        def more(state):
            _, _, going, sweeps = state
            return jnp.any(going) & (jnp.max(sweeps) < tokens)

        def sweep(state):
            x, log_det, going, sweeps = state
            # A NaN in a masked token would spoil earlier ones (0 NaN = NaN), and so would a square
            # that overflows.
            finite = jnp.where(jnp.abs(x) < HUGE, x, 0.0)
            m, g = conditioner(finite)
            new = m + jnp.exp(g) * u
            limit = tolerance * jnp.maximum(1, jnp.abs(new))
            settled = jnp.all(jnp.abs(new - x) <= limit, (1, 2))
            log_det = jnp.where(going, jnp.sum(g, (1, 2)), log_det)
            x = jnp.where(going[:, None, None], new, x)
            return x, log_det, going & ~settled, sweeps + going

        going = jnp.all(jnp.isfinite(u), (1, 2))  # examples with non-finite inputs are not iterated
        state = u, jnp.zeros(len(u)), going, jnp.zeros(len(u), jnp.int32)
        x, log_det, _, sweeps = jax.lax.while_loop(more, sweep, state)
        return self._order(x), sweeps, log_det

    def _one_by_one(self, u, modulation):
        """Token by token with KV caches: x_n = m_n + exp(g_n) u_n."""
        c, (batch, tokens, dim) = self.config, u.shape
        weights = self.stack.weights_by_layer()
        block, variables = self.unbind()

        def step(carry, inputs):
            x_previous, log_det, caches = carry
            n, u_n = inputs
            m, g, caches = cast(Any, block.apply(
                variables, x_previous, weights, modulation, caches, n, method=Block.decode))
            x_n = m + jnp.exp(g) * u_n
            return (x_n, log_det + jnp.sum(g, 1), caches), x_n

        u = jnp.moveaxis(self._order(u), 1, 0)
        empty = jnp.zeros((batch, c.kv_heads, 0, c.head_size), c.transporter_dtype)
        caches, found, begin = [(empty, empty)] * len(weights), [], 0
        carry = jnp.zeros((batch, dim)), jnp.zeros(batch), caches
        for end in cache_sizes(tokens):
            room = (0, 0), (0, 0), (0, end - begin), (0, 0)
            grown = jax.tree.map(lambda cache, room=room: jnp.pad(cache, room), carry[2])
            n = jnp.arange(begin, end)
            carry, x = jax.lax.scan(step, (*carry[:2], grown), (n, u[begin:end]))
            found.append(x)
            begin = end
        x = self._order(jnp.moveaxis(jnp.concatenate(found), 0, 1))
        return x, jnp.full(batch, tokens, jnp.int32), carry[1]


def _gathered(block: Block, variables, *inputs):
    """A block's variables, no longer split over devices along the logical axis `embed`.

    A loop that reads split parameters gathers them in every round; these are gathered once, before
    it. inputs: arguments of the block, for the names of its parameters' axes.
    """
    if jax.sharding.get_abstract_mesh().size <= 1:
        return variables
    names = nn.get_partition_spec(jax.eval_shape(block.init, jax.random.key(0), *inputs))
    return jax.tree.map(
        lambda a, axes: nn.with_logical_constraint(
            a, tuple(None if axis == "embed" else axis for axis in axes)), variables, names)


def cache_sizes(tokens: int) -> list[int]:
    """The sizes of the KV cache in turn: attention reads all of it, so a long one grows in four."""
    stages = 4 if tokens >= 256 else 1
    return [-(-tokens * i // stages) for i in range(1, stages + 1)]


class Transporter(nn.Module):
    """`transporter_blocks` blocks in alternating order, with one set of weights for all levels.

    A new one is exactly the identity. inverse(forward(x)) == x to float32 rounding at
    model.full_precision.
    """

    config: ModelConfig

    def setup(self):
        c = self.config
        self.condition = Modulation(
            c.transporter_width, len(c.steps) > 1, c.condition.embed_in_transporter)
        self.blocks = [Block(c, i % 2 == 1) for i in range(c.transporter_blocks)]

    @at_config_precision
    def __call__(self, x, t, steps, y):
        """x [B, N, D] at levels t [B] -> (u [B, N, D], log|det du/dx| [B] in nats)."""
        modulation = self.condition((t,), steps, y)
        log_det = jnp.zeros(x.shape[0])
        for block in self.blocks:
            x, block_log_det = block(x, modulation)
            log_det += block_log_det
        return x, log_det

    @at_config_precision
    def inverse(self, u, t, steps, y, how="sequential", tolerance=TOLERANCE):
        """u [B, N, D] -> (x [B, N, D], sweeps [B, blocks], int32, log|det dx/du| [B] in nats).

        forward(x) = u, and forward's log-determinant at x is the negative of this one. how: see
        INVERSES. tolerance: of the parallel inverse; see Block._all_at_once.
        """
        modulation = self.condition((t,), steps, y)
        sweeps, log_det = [], jnp.zeros(u.shape[0])
        for block in reversed(self.blocks):
            u, taken, block_log_det = cast(Any, block.inverse(u, modulation, how, tolerance))
            sweeps.append(taken)
            log_det += block_log_det
        return u, jnp.stack(sweeps[::-1], 1), log_det
