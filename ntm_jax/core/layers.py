"""Transformer layers: attention with an explicit KV cache, MLP, modulation, embeddings, positions. No flow mathematics.

Symbols: B batch, N tokens, W width, H heads, G key-value heads, C head size, L layers.
Parameters and activations carry logical axis names; runtime/sharding.py maps them to a mesh.
"""

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

Array = jax.Array


class Text(NamedTuple):
    """A condition: states [B, M, E] of text tokens and which of them are there, mask [B, M]. An empty mask is the null caption."""

    states: Array
    mask: Array


def null(y, num_classes: int):
    """The null condition in the shape of y, labels [B] or Text: what guidance contrasts with, and dropout puts in y's place."""
    return y._replace(mask=jnp.zeros_like(y.mask)) if isinstance(y, Text) else jnp.full_like(y, num_classes)


def precision(name: str | None):
    """Context that sets the precision of the float32 matrix products traced in it, by jax's names.

    Their gradients keep it. None changes nothing; jax's own default is the fastest, one bfloat16
    pass on a TPU and TF32 on an NVIDIA GPU.
    """
    return jax.default_matmul_precision(name) if name else contextlib.nullcontext()


def at_config_precision(method):
    """Decorates a module's method: its float32 products have the precision `self.config.precision`."""
    @functools.wraps(method)
    def precise(self, *args, **options):
        with precision(self.config.precision):
            return method(self, *args, **options)

    return precise


def own_precision(dtype) -> str | None:
    """The precision that products of a dtype need: None, the one set around them, for float32.

    Products of bfloat16 numbers are exact at the lowest precision. At a higher one XLA has fewer
    kernels for GPUs, and a Pallas kernel for TPUs does not compile.
    """
    return None if jnp.dtype(dtype) == jnp.float32 else "default"


def plain_attention(q, k, v, *, causal: bool, keys=None):
    """softmax(q k^T / sqrt(C)) v: q [B, N, H, C], k and v [B, M, G, C], G dividing H; keys [B, M]: which of them may be seen."""
    mask = None if keys is None else keys[:, None, None]
    with precision(own_precision(q.dtype)):
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal)


def _rows_dot_general(x, kernel, dimensions, **options):
    """x [B, N, W] times kernel as one matrix of B N rows: on a CPU the gradient is twice as fast."""
    rows = jax.lax.dot_general(x.reshape(-1, x.shape[-1]), kernel, (((1,), (0,)), ((), ())), **options)
    return rows.reshape(*x.shape[:-1], -1)


def dense(features: int, axes: tuple[str, str], dtype, name: str, scale: float = 1.0, bias: bool = True, rows: bool = False):
    """A Dense layer whose kernel has logical axes `axes` and initial variance scale/fan_in; scale 0 starts at zero.

    rows: merges all leading axes into one.
    """
    init = nn.initializers.variance_scaling(scale, "fan_in", "truncated_normal") if scale else nn.initializers.zeros
    return nn.Dense(
        features, use_bias=bias, dtype=dtype, precision=own_precision(dtype), name=name,
        dot_general=_rows_dot_general if rows else None,
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
    angles = jnp.multiply.outer(t, frequencies)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)


def rotary_2d(grid: tuple[int, int], head_size: int):
    """Rotation angles [N, head_size/2] of a row-major grid of tokens: the first half turns with the row, the second with the column."""
    frequencies = 1 / 100 ** (jnp.arange(head_size // 4) / (head_size // 4))
    row, column = jnp.divmod(jnp.arange(grid[0] * grid[1]), grid[1])
    return jnp.concatenate([jnp.outer(row, frequencies), jnp.outer(column, frequencies)], -1)


def rotate(x, angles):
    """Rotary position embedding: x [B, N, H, C], angles [N, C/2]."""
    first, second = jnp.split(x.astype(jnp.float32), 2, -1)
    cos, sin = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]
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
    def __call__(self, x, angles=None, keys=None, cache=None, index=None):
        """x [B, N, W] -> ([B, N, W], cache); keys [B, N]: the tokens that may be seen, by default all.

        With a cache (k, v: [B, M, G, C]) x is the one token at `index` and sees tokens <= index.
        """
        width = x.shape[-1]

        def heads(name, count):
            y = dense(count * self.head_size, ("embed", "heads"), self.dtype, name, bias=False, rows=self.rows)(x)
            return checkpoint_name(y, "narrow").reshape(*x.shape[:-1], count, self.head_size)

        q, k, v = heads("query", width // self.head_size), heads("key", self.kv_heads), heads("value", self.kv_heads)
        q = nn.RMSNorm(dtype=self.dtype, scale_init=nn.with_logical_partitioning(nn.initializers.ones, (None,)), name="query_norm")(q)
        k = nn.RMSNorm(dtype=self.dtype, scale_init=nn.with_logical_partitioning(nn.initializers.ones, (None,)), name="key_norm")(k)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        if cache is None:
            q = nn.with_logical_constraint(q, ("batch", "tokens", "heads", None))
            k, v = (nn.with_logical_constraint(a, ("batch", "keys", "heads", None)) for a in (k, v))  # every query sees all keys
            y = self.attention(q, k, v, causal=self.causal, keys=keys)
        else:
            k, v = cache = tuple(jax.lax.dynamic_update_slice_in_dim(old, new, index, 1) for old, new in zip(cache, (k, v), strict=True))
            y = plain_attention(q, k, v, causal=False, keys=(jnp.arange(k.shape[1]) <= index)[None])
        y = checkpoint_name(y.reshape(*x.shape[:-1], -1), "narrow")
        y = dense(width, ("heads", "embed"), self.dtype, "out", scale=1 / self.depth, bias=False, rows=self.rows)(y)
        return checkpoint_name(y, "narrow"), cache


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
    def __call__(self, x, cache, modulation, angles, keys, index):
        """x [B, N, W], modulation [B, 6, W] -> (x, cache): the form that nn.scan takes."""
        width = x.shape[-1]
        table = self.param("table", nn.with_logical_partitioning(nn.initializers.zeros, (None, "embed")), (6, width))
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = jnp.moveaxis((modulation + table[None])[:, :, None].astype(self.dtype), 1, 0)
        x = nn.with_logical_constraint(x, ("batch", "tokens", "embed_activation"))
        h = norm(self.dtype, "norm_1")(x) * (1 + scale_1) + shift_1
        attend = Attention(
            self.head_size, self.kv_heads, self.causal, self.depth, self.dtype, self.attention, self.rows, name="attention")
        h, cache = attend(h, angles, keys, cache, index)
        x = x + (1 + gate_1) * h
        h = norm(self.dtype, "norm_2")(x) * (1 + scale_2) + shift_2
        h = dense(self.mlp_ratio * width, ("embed", "mlp"), self.dtype, "up", rows=self.rows)(h)
        h = nn.with_logical_constraint(nn.gelu(h), ("batch", "tokens", "mlp"))
        h = dense(width, ("mlp", "embed"), self.dtype, "down", scale=1 / self.depth, rows=self.rows)(h)
        return x + (1 + gate_2) * checkpoint_name(h, "narrow"), cache


REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,  # a layer's input alone is kept: W numbers a token and layer
    "narrow": jax.checkpoint_policies.save_only_these_names("narrow"),  # and its products of width W, not the MLP's wide one: 7 W
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # and every product with a parameter: 10 W
}


class Stack(nn.Module):
    """`depth` layers over [B, N, W], parameters stacked along a leading axis `layers` whether scanned or unrolled: the same numbers.

    flat: the matrix products merge examples and tokens into one axis, faster on a CPU; not for tokens sharded over a mesh axis.
    """

    depth: int
    head_size: int
    kv_heads: int
    mlp_ratio: int
    causal: bool
    dtype: Any
    attention: Callable
    remat: str
    scan: bool
    flat: bool

    @nn.compact
    def __call__(self, x, modulation, angles=None, keys=None, cache=None, index=None):
        """x [B, N, W], modulation [B, 6, W], keys [B, N] -> (x, cache); cache (k, v), each [depth, B, M, G, C]: one decoding step."""
        layer = Layer if REMAT[self.remat] is None else nn.remat(Layer, prevent_cse=False, policy=REMAT[self.remat])
        layers = nn.scan(
            layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.depth, unroll=1 if self.scan else self.depth,
            in_axes=(0, *(nn.broadcast,) * 4), out_axes=0, metadata_params={nn.PARTITION_NAME: "layers"},
        )(self.head_size, self.kv_heads, self.mlp_ratio, self.causal, self.depth, self.dtype, self.attention, self.flat, name="layers")
        return layers(x, cache, modulation, angles, keys, index)


class Condition(nn.Module):
    """What a network is told, as the modulation of its layers, [B, rows, W]: noise levels, the number of steps where it varies, the class,
    and with tell_text the mean of a function of each text token; of the null caption it is zero.

    Their embeddings are summed at a width of at most 512; one modulation serves all layers of a network (method, section 4).
    """

    width: int
    num_classes: int  # 0: none; label num_classes is the null class of guidance
    tell_steps: bool
    rows: int = 6
    tell_text: bool = False

    @nn.compact
    def __call__(self, times, steps, y):
        """times: tuple of [B] noise levels; steps [B]; y, labels [B] in 0..num_classes or Text (ignored where none is told)."""
        inner = min(self.width, 512)
        scalars = {f"level_{i}": 1000 * t for i, t in enumerate(times)}
        if self.tell_steps:
            scalars["steps"] = 10 * steps
        total = 0
        for name, value in scalars.items():
            h = dense(inner, (None, "embed"), jnp.float32, f"{name}_in")(sinusoidal(value, min(inner, 256)))
            total += dense(inner, ("embed", "embed_out"), jnp.float32, f"{name}_out")(nn.silu(h))
        if self.num_classes:
            init = nn.with_logical_partitioning(nn.initializers.normal(0.02 * math.sqrt(inner)), (None, "embed"))
            total += nn.Embed(self.num_classes + 1, inner, embedding_init=init, name="class")(y)
        if self.tell_text:
            h = nn.silu(dense(inner, (None, "embed"), jnp.float32, "text_in")(norm(jnp.float32, "text_norm")(y.states)))
            mean = jnp.sum(h, 1, where=y.mask[..., None]) / jnp.maximum(jnp.sum(y.mask, 1, keepdims=True), 1)
            total += dense(inner, ("embed", "embed_out"), jnp.float32, "text_out")(mean)
        # Left to itself, XLA's partitioner splits this sum over two mesh axes and gets loss and gradients wrong, by 1e-4 and by half.
        total = nn.with_logical_constraint(total, ("batch", "embed_activation"))
        modulation = dense(self.rows * self.width, ("embed", "mlp"), jnp.float32, "modulation", scale=0)(nn.silu(total))
        return modulation.reshape(-1, self.rows, self.width)


class Positions(nn.Module):
    """Positions of N row-major tokens: a learned table added to the embeddings, or rotary angles for the attention."""

    kind: str
    grid: tuple[int, int]
    width: int
    head_size: int
    std: float = 0.02  # of a new table

    @nn.compact
    def __call__(self):
        """-> (table [1, N, W] or 0, angles [N, C/2] or None)."""
        if self.kind == "rotary":
            return 0.0, rotary_2d(self.grid, self.head_size)
        init = nn.with_logical_partitioning(nn.initializers.normal(self.std), (None, "embed"))
        return self.param("table", init, (math.prod(self.grid), self.width))[None], None
