"""Transformer layers: attention with an explicit KV cache, MLP, modulation, embeddings, positions. No flow mathematics.

Symbols: B batch, N tokens, W width, H heads, G key-value heads, C head size, L layers.
Parameters and activations carry logical axis names; runtime/sharding.py maps them to a mesh.
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array


def plain_attention(q, k, v, *, causal: bool, mask=None):
    """softmax(q k^T / sqrt(C)) v: q [B, N, H, C], k and v [B, M, G, C], G dividing H; mask broadcastable to [B, H, N, M]."""
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal)


def _rows_dot_general(x, kernel, dimensions, **options):
    """x [B, N, W] times kernel as one matrix of B N rows: on a CPU the gradient is twice as fast."""
    rows = jax.lax.dot_general(x.reshape(-1, x.shape[-1]), kernel, (((1,), (0,)), ((), ())), **options)
    return rows.reshape(*x.shape[:-1], -1)


def dense(features: int, axes: tuple[str, str], dtype, name: str, scale: float = 1.0, bias: bool = True, rows: bool = False):
    """A Dense layer whose kernel has logical axes `axes` and initial variance scale/fan_in; scale 0 starts at zero.

    rows: merges all leading axes into one, faster on a CPU; not for arrays sharded over tokens as well as examples.
    """
    init = nn.initializers.variance_scaling(scale, "fan_in", "truncated_normal") if scale else nn.initializers.zeros
    return nn.Dense(
        features, use_bias=bias, dtype=dtype, name=name, dot_general=_rows_dot_general if rows else None,
        kernel_init=nn.with_logical_partitioning(init, axes),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, axes[1:]),
    )


def norm(dtype, name: str, learned: bool = False):
    """Layer norm in float32, cast to dtype; `learned` adds a scale."""
    scale_init = nn.with_logical_partitioning(nn.initializers.ones, ("embed",))
    return nn.LayerNorm(epsilon=1e-6, use_bias=False, use_scale=learned, dtype=dtype, scale_init=scale_init, name=name)


def sinusoidal(t, width: int):
    """Features [..., width] of t [...]: cosines and sines of t times `width`/2 frequencies falling geometrically from 1 to 1/10,000."""
    frequencies = jnp.exp(-math.log(10_000) * jnp.arange(width // 2) / (width // 2))
    angles = t[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)


def rotary_2d(grid: tuple[int, int], head_size: int):
    """Rotation angles [N, head_size/2] of a row-major grid of tokens: the first half turns with the row, the second with the column."""
    frequencies = 1 / 100 ** (jnp.arange(head_size // 4) / (head_size // 4))
    row, column = jnp.divmod(jnp.arange(grid[0] * grid[1]), grid[1])
    return jnp.concatenate([row[:, None] * frequencies, column[:, None] * frequencies], -1)


def rotate(x, angles):
    """Rotary position embedding: x [B, N, H, C], angles [N, C/2]."""
    first, second = jnp.split(x.astype(jnp.float32), 2, -1)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)


class Attention(nn.Module):
    """Grouped-query self-attention with normalised queries and keys; `depth` scales the output projection's initial variance."""

    head_size: int
    kv_heads: int
    causal: bool
    depth: int
    dtype: Any
    attention: Callable
    rows: bool

    @nn.compact
    def __call__(self, x, angles=None, cache=None, index=None):
        """x [B, N, W] -> ([B, N, W], cache). With a cache (k, v: [B, M, G, C]) x is the one token at `index` and sees tokens <= index."""
        width = x.shape[-1]

        def heads(name, count):
            y = dense(count * self.head_size, ("embed", "heads"), self.dtype, name, bias=False, rows=self.rows)(x)
            return y.reshape(*x.shape[:-1], count, self.head_size)

        q, k, v = heads("query", width // self.head_size), heads("key", self.kv_heads), heads("value", self.kv_heads)
        q = nn.RMSNorm(dtype=self.dtype, scale_init=nn.with_logical_partitioning(nn.initializers.ones, (None,)), name="query_norm")(q)
        k = nn.RMSNorm(dtype=self.dtype, scale_init=nn.with_logical_partitioning(nn.initializers.ones, (None,)), name="key_norm")(k)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        if cache is None:
            y = self.attention(q, k, v, causal=self.causal)
        else:
            k, v = (jax.lax.dynamic_update_slice_in_dim(old, new, index, 1) for old, new in zip(cache, (k, v), strict=True))
            cache = (k, v)
            y = plain_attention(q, k, v, causal=False, mask=(jnp.arange(k.shape[1]) <= index)[None, None, None])
        y = y.reshape(*x.shape[:-1], -1)
        return dense(width, ("heads", "embed"), self.dtype, "out", scale=1 / self.depth, bias=False, rows=self.rows)(y), cache


class Layer(nn.Module):
    """Pre-norm transformer layer. The modulation is shared by all layers, each adding a learned table of its own (method, section 4)."""

    head_size: int
    kv_heads: int
    mlp_ratio: int
    causal: bool
    depth: int
    dtype: Any
    attention: Callable
    rows: bool

    @nn.compact
    def __call__(self, x, cache, modulation, angles, index):
        """x [B, N, W], modulation [B, 6, W] -> (x, cache): the form that nn.scan takes."""
        width = x.shape[-1]
        table = self.param("table", nn.with_logical_partitioning(nn.initializers.zeros, (None, "embed")), (6, width))
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = jnp.moveaxis((modulation + table)[:, :, None].astype(self.dtype), 1, 0)
        x = nn.with_logical_constraint(x, ("batch", "tokens", "embed_activation"))
        h = norm(self.dtype, "norm_1")(x) * (1 + scale_1) + shift_1
        attend = Attention(
            self.head_size, self.kv_heads, self.causal, self.depth, self.dtype, self.attention, self.rows, name="attention")
        h, cache = attend(h, angles, cache, index)
        x = x + (1 + gate_1) * h
        h = norm(self.dtype, "norm_2")(x) * (1 + scale_2) + shift_2
        h = dense(self.mlp_ratio * width, ("embed", "mlp"), self.dtype, "up", rows=self.rows)(h)
        h = nn.with_logical_constraint(nn.gelu(h), ("batch", "tokens", "mlp"))
        h = dense(width, ("mlp", "embed"), self.dtype, "down", scale=1 / self.depth, rows=self.rows)(h)
        return x + (1 + gate_2) * h, cache


REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Stack(nn.Module):
    """`depth` layers over [B, N, W], parameters stacked along a leading axis `layers` whether scanned or unrolled: the same numbers."""

    depth: int
    head_size: int
    kv_heads: int
    mlp_ratio: int
    causal: bool
    dtype: Any
    attention: Callable
    remat: str
    scan: bool

    @nn.compact
    def __call__(self, x, condition, angles=None, cache=None, index=None):
        """x [B, N, W], condition [B, W]; cache (k, v), each [depth, B, M, G, C], makes one decoding step -> (x, cache)."""
        width = x.shape[-1]
        modulation = dense(6 * width, ("embed", "mlp"), jnp.float32, "modulation", scale=0)(nn.silu(condition)).reshape(-1, 6, width)
        layer = Layer if REMAT[self.remat] is None else nn.remat(Layer, prevent_cse=False, policy=REMAT[self.remat])
        layers = nn.scan(
            layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.depth, unroll=1 if self.scan else self.depth,
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast), out_axes=0, metadata_params={nn.PARTITION_NAME: "layers"},
        )(self.head_size, self.kv_heads, self.mlp_ratio, self.causal, self.depth, self.dtype, self.attention, not self.scan,
          name="layers")
        return layers(x, cache, modulation, angles, index)


class Condition(nn.Module):
    """What a network is told, as one vector [B, W]: noise levels, the number of steps where it varies, the class. Summed embeddings."""

    width: int
    num_classes: int  # 0: none; label num_classes is the null class of guidance
    tell_steps: bool

    @nn.compact
    def __call__(self, times, steps, label):
        """times: tuple of [B] noise levels; steps [B]; label [B] in 0..num_classes."""
        scalars = {f"level_{i}": 1000 * t for i, t in enumerate(times)}
        if self.tell_steps:
            scalars["steps"] = 10 * steps
        total = 0
        for name, value in scalars.items():
            h = dense(self.width, (None, "embed"), jnp.float32, f"{name}_in")(sinusoidal(value, 256 if self.width > 256 else self.width))
            total += dense(self.width, ("embed", "embed_out"), jnp.float32, f"{name}_out")(nn.silu(h))
        if self.num_classes:
            init = nn.with_logical_partitioning(nn.initializers.normal(0.02 * math.sqrt(self.width)), (None, "embed"))
            total += nn.Embed(self.num_classes + 1, self.width, embedding_init=init, name="class")(label)
        # Left to itself, XLA's partitioner splits this sum over two mesh axes and gets loss and gradients wrong, by 1e-4 and by half.
        return nn.with_logical_constraint(total, ("batch", "embed_activation"))


class Positions(nn.Module):
    """Positions of N row-major tokens: a learned table added to the embeddings, or rotary angles for the attention."""

    kind: str
    grid: tuple[int, int]
    width: int
    head_size: int

    @nn.compact
    def __call__(self):
        """-> (table [N, W] or 0, angles [N, C/2] or None)."""
        if self.kind == "rotary":
            return 0.0, rotary_2d(self.grid, self.head_size)
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), (None, "embed"))
        return self.param("table", init, (math.prod(self.grid), self.width)), None
