"""The transformer that all networks are made of: norms, attention, layers, positions, modulation.

Symbols: B batch, N tokens, W width, H heads, G key-value heads, C head size, M keys, L layers.
Parameters and activations carry logical axis names; runtime/sharding.py maps them to a mesh.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ntm_jax.core.conditions import NOTHING

Array = jax.Array
HIDDEN = -1e30  # the score of a key that a query may not attend to
EPSILON = 1e-6  # added to the variance or mean square of a norm


def precision(name: str | None):
    """Context that sets the precision of the float32 matrix products traced in it, by jax's names.

    Their gradients keep it. None changes nothing; jax's own default is the fastest, one bfloat16
    pass on a TPU and TF32 on an NVIDIA GPU.
    """
    return jax.default_matmul_precision(name) if name else contextlib.nullcontext()


def at_config_precision(method):
    """Decorates a module's method to use self.config.precision for float32 products."""
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


def plain_attention(q, k, v, *, causal: bool, keys=None, softmax=jax.nn.softmax):
    """softmax(q k^T / sqrt(C)) v, for q [B, N, H, C], k and v [B, M, G, C], where G divides H.

    keys: [B, M], the keys that queries may attend to; all by default.
    """
    mask = None if keys is None else keys[:, None, None]
    if causal:
        before = jnp.tri(q.shape[1], k.shape[1], dtype=bool)[None, None]
        mask = before if mask is None else mask & before
    return attend(q, jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2), mask, softmax)


def attend_to_cache(q, cache, index):
    """plain_attention of one query [B, 1, H, C] to the keys up to `index` of a cache.

    cache: keys and values, [B, G, M, C] each, in the order in which the products read them.
    """
    k, v = cache
    return attend(q, k, v, (jnp.arange(k.shape[2]) <= index)[None, None, None])


def attend(q, k, v, mask, softmax=jax.nn.softmax):
    """Attention of q [B, N, H, C] to k and v [B, G, M, C]; mask: [B or 1, 1, N or 1, M]."""
    batch, tokens, heads, size = q.shape
    q = jnp.swapaxes(q * size**-0.5, 1, 2).reshape(batch, k.shape[1], -1, tokens, size)
    with precision(own_precision(q.dtype)):
        scores = jnp.einsum("bgrnc,bgmc->bgrnm", q, k, preferred_element_type=jnp.float32)
        if mask is not None:
            scores = jnp.where(mask[:, None], scores, HIDDEN)
        found = jnp.einsum("bgrnm,bgmc->bgrnc", softmax(scores).astype(v.dtype), v)
    return jnp.swapaxes(found.reshape(batch, heads, tokens, size), 1, 2)


def rotary_2d(grid: tuple[int, int], head_size: int):
    """Rotation angles [N, head_size/2] of a row-major grid of tokens.

    The first half of the angles grows with the row, the second with the column.
    """
    frequencies = 1 / 100 ** (jnp.arange(head_size // 4) / (head_size // 4))
    row, column = jnp.divmod(jnp.arange(grid[0] * grid[1]), grid[1])
    return jnp.concatenate([jnp.outer(row, frequencies), jnp.outer(column, frequencies)], -1)


def rotate(x, angles):
    """Rotary position embedding: x [B, N, H, C], angles [N, C/2]."""
    first, second = jnp.split(x.astype(jnp.float32), 2, -1)
    cos, sin = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
    return turned.astype(x.dtype)


def modulated_norm(x, scale, shift):
    """Layer norm in float32 of x [B, N, W], times 1 + scale, plus shift, [B, 1, W] each.

    The result has the dtype of scale and shift.
    """
    norm = nn.LayerNorm(epsilon=EPSILON, use_bias=False, use_scale=False, parent=None)
    normal = cast(jax.Array, norm.apply({}, x.astype(jnp.float32)))
    return normal.astype(scale.dtype) * (1 + scale) + shift


def rms_norm(x, scale):
    """x [B, N, H, C] / sqrt(mean(x^2) + epsilon) * scale [C]."""
    return x * (inverse_rms(x) * scale[None, None, None])


def inverse_rms(x):
    """1 / sqrt(mean(x^2) + epsilon) of x [..., C], [..., 1]."""
    return jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + EPSILON)


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """Functions given to a model: plain by default, or what a device computes faster. Static.

    Each has the arguments and, up to rounding, the value of its default.
    """

    attention: Callable = plain_attention
    # x [..., I] times kernel [I, O], called as flax.linen.Dense calls jax.lax.dot_general.
    product: Callable = jax.lax.dot_general
    modulated_norm: Callable = modulated_norm
    rms_norm: Callable = rms_norm
    gelu: Callable = nn.gelu


PLAIN = Arithmetic()


@functools.cache
def cached_initializer(make: Callable, *arguments) -> Callable:
    """The initialiser make(*arguments), which jax traces once for each shape.

    flax traces the initialiser of every parameter whenever it traces a module, to check the shape.
    """
    init = jax.jit(make(*arguments), static_argnums=(1, 2))
    return lambda key, shape, *dtype: init(key, tuple(shape), *dtype)  # flax gives lists, too


def partitioned(axes: tuple[str | None, ...], make: Callable, *arguments) -> Callable[..., Array]:
    """The initialiser make(*arguments) of parameters whose axes have logical names.

    Such as partitioned(("embed",), nn.initializers.normal, 0.02).
    """
    # flax boxes and unboxes the arrays
    return cast(Any, nn.with_logical_partitioning(cached_initializer(make, *arguments), axes))


def dense(features: int, axes: tuple[str | None, str | None], dtype, name: str,
          scale: float = 1.0, bias: bool = True, product: Callable = jax.lax.dot_general):
    """A Dense layer with logical axes `axes` and initial variance scale/fan_in of its kernel.

    scale=0 starts at zero. product: see Arithmetic.
    """
    zeros, scaled = nn.initializers.zeros_init, nn.initializers.variance_scaling
    kernel_init = (partitioned(axes, scaled, scale, "fan_in", "truncated_normal") if scale
                   else partitioned(axes, zeros))
    return nn.Dense(
        features, use_bias=bias, dtype=dtype, precision=own_precision(dtype), name=name,
        dot_general=product,
        kernel_init=kernel_init, bias_init=partitioned(axes[1:], zeros),
    )


def norm(dtype, name: str, learned: bool = False):
    """Layer norm in float32, cast to dtype; `learned` adds a scale."""
    scale_init = partitioned(("embed",), nn.initializers.ones_init)
    return nn.LayerNorm(epsilon=EPSILON, use_bias=False, use_scale=learned, dtype=dtype,
                        scale_init=scale_init, name=name)


class RMSNorm(nn.Module):
    """RMS norm of queries or keys [B, N, H, C] in float32, cast to dtype, with a learned scale."""

    dtype: Any
    rms_norm: Callable

    @nn.compact
    def __call__(self, x):
        ones = partitioned((None,), nn.initializers.ones_init)
        scale = self.param("scale", ones, x.shape[-1:])
        return self.rms_norm(x.astype(jnp.float32), scale).astype(self.dtype)


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """The sizes and choices of the layers of a stack. Static."""

    depth: int  # how many; it divides the initial variance of what a layer adds
    head_size: int
    kv_heads: int
    mlp_ratio: int
    causal: bool
    dtype: Any
    arithmetic: Arithmetic


class Attention(nn.Module):
    """Grouped-query self-attention with normalised queries and keys."""

    config: LayerConfig

    @nn.compact
    def __call__(self, x, angles=None, keys=None, cache=None, index=None):
        """x [B, N, W] -> ([B, N, W], cache).

        keys: [B, N], the tokens that may be attended to; all by default. With a cache
        (k, v: [B, G, M, C]) x is the one token at `index` and attends to tokens <= index.
        """
        c, a, width = self.config, self.config.arithmetic, x.shape[-1]

        def heads(name, count):
            y = dense(count * c.head_size, ("embed", "heads"), c.dtype, name, bias=False,
                      product=a.product)(x)
            return checkpoint_name(y, "narrow").reshape(*x.shape[:-1], count, c.head_size)

        q = heads("query", width // c.head_size)
        k, v = heads("key", c.kv_heads), heads("value", c.kv_heads)
        q = RMSNorm(c.dtype, a.rms_norm, name="query_norm")(q)
        k = RMSNorm(c.dtype, a.rms_norm, name="key_norm")(k)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        if cache is None:
            q = nn.with_logical_constraint(q, ("batch", "tokens", "heads", None))
            axes = ("batch", "keys", "heads", None)  # every query attends to all keys
            k, v = (nn.with_logical_constraint(each, axes) for each in (k, v))
            y = a.attention(q, k, v, causal=c.causal, keys=keys)
        else:
            assert index is not None  # the place of x in the cache
            cache = tuple(
                jax.lax.dynamic_update_slice_in_dim(old, jnp.swapaxes(new, 1, 2), index, 2)
                for old, new in zip(cache, (k, v), strict=True))
            y = attend_to_cache(q, cache, index)
        y = checkpoint_name(y.reshape(*x.shape[:-1], -1), "narrow")
        y = dense(width, ("heads", "embed"), c.dtype, "out", scale=1 / c.depth, bias=False,
                  product=a.product)(y)
        return checkpoint_name(y, "narrow"), cache


class Layer(nn.Module):
    """Pre-norm transformer layer: attention, then an MLP, each with a shift, a scale and a gate.

    All layers share one modulation, to which each adds a learned table of its own. Where both are 0
    the layer is a plain one.
    """

    config: LayerConfig

    @nn.compact
    def __call__(self, x, cache, modulation, angles, keys, index):
        """x [B, N, W], modulation [B, 6, W] -> (x, cache), as nn.scan requires."""
        c, a, width = self.config, self.config.arithmetic, x.shape[-1]
        zeros = partitioned((None, "embed"), nn.initializers.zeros_init)
        table = self.param("table", zeros, (6, width))
        own = (modulation + table[None]).astype(c.dtype)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = jnp.split(own, 6, 1)
        x = nn.with_logical_constraint(x, ("batch", "tokens", "embed_activation"))
        h = a.modulated_norm(x, scale_1, shift_1)
        h, cache = Attention(c, name="attention")(h, angles, keys, cache, index)
        x = x + (1 + gate_1) * h
        h = a.modulated_norm(x, scale_2, shift_2)
        h = dense(c.mlp_ratio * width, ("embed", "mlp"), c.dtype, "up",
                  product=a.product)(h)
        h = nn.with_logical_constraint(a.gelu(h), ("batch", "tokens", "mlp"))
        h = dense(width, ("mlp", "embed"), c.dtype, "down", scale=1 / c.depth,
                  product=a.product)(h)
        return x + (1 + gate_2) * checkpoint_name(h, "narrow"), cache


REMAT = {  # which activations are saved for the backward pass; numbers per token and layer
    "none": None,
    # A layer's input: W.
    "full": jax.checkpoint_policies.nothing_saveable,
    # Also its products of width W, but not the MLP's wide one: 7 W.
    "narrow": jax.checkpoint_policies.save_only_these_names("narrow"),
    # Every product with a parameter: 10 W.
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def stacked(layer, depth: int, remat: str, scan: bool, inputs: int, initializing: bool) -> Any:
    """The class `layer`, applied `depth` times, with parameters stacked along an axis `layers`.

    It is scanned or unrolled, with the same numbers. inputs: how many inputs its __call__ has
    beside x, the same for all layers. initializing: whether it makes its parameters.
    """
    policy = REMAT[remat]
    if policy is not None:
        # XLA would merge the recomputation with the forward pass, but not across a scan's loops.
        layer = nn.remat(layer, prevent_cse=not scan, policy=policy)
    return nn.scan(
        layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=depth,
        unroll=1 if scan else depth, in_axes=cast(Any, (nn.broadcast,) * inputs),
        metadata_params={nn.PARTITION_NAME: "layers"},
        # The check traces the layer twice. It stays where it decides initial random numbers.
        check_constancy_invariants=initializing)


class Stack(nn.Module):
    """Layers over [B, N, W], with parameters stacked along a leading axis `layers`.

    Scanned and unrolled layers give the same numbers.
    """

    config: LayerConfig
    remat: str  # see REMAT
    scan: bool

    @nn.compact
    def __call__(self, x, modulation, angles=None, keys=None):
        """x [B, N, W], modulation [B, 6, W], keys [B, N] -> [B, N, W]."""
        stack = stacked(Layer, self.config.depth, self.remat, self.scan, 5, self.is_initializing())
        layers = stack(self.config, name="layers")
        return layers(x, None, modulation, angles, keys, None)[0]

    def weights_by_layer(self) -> list:
        """The parameters of every layer, for `decode`."""
        stacked = nn.unbox(self.variables["params"]["layers"])
        return [jax.tree.map(lambda a, i=i: a[i], stacked) for i in range(self.config.depth)]

    def decode(self, x, weights, modulation, angles, caches, index):
        """One decoding step: x [B, 1, W] at `index` -> ([B, 1, W], caches).

        weights: those of weights_by_layer. caches: (k, v), each [B, G, M, C], by layer. Weights and
        caches stay apart: a scan over layers copies them at every token, four times the work.
        """
        layer, found = Layer(self.config, parent=None), []
        for own, cache in zip(weights, caches, strict=True):
            x, cache = cast(Any, layer.apply({"params": own}, x, cache, modulation, angles, None,
                                             index))
            found.append(cache)
        return x, found


class Positions(nn.Module):
    """Positions of N row-major tokens: a learned table for embeddings, or rotary angles."""

    kind: str
    grid: tuple[int, int]
    width: int
    head_size: int
    std: float = 0.02  # initial standard deviation of the table

    @nn.compact
    def __call__(self):
        """Returns (table [1, N, W] or 0, angles [N, C/2] or None)."""
        if self.kind == "rotary":
            return 0.0, rotary_2d(self.grid, self.head_size)
        init = partitioned((None, "embed"), nn.initializers.normal, self.std)
        return self.param("table", init, (math.prod(self.grid), self.width))[None], None


def sinusoidal(t, width: int):
    """Features [..., width] of t [...]: cosines and sines at `width`/2 frequencies.

    The frequencies fall geometrically from 1 to 1/10,000.
    """
    frequencies = jnp.exp(-math.log(10_000) * jnp.arange(width // 2) / (width // 2))
    angles = jnp.multiply.outer(t, frequencies)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)


class Modulation(nn.Module):
    """Embeds noise levels, step count and the condition into the modulation of all layers.

    The modulation is [B, rows, W]; rows are shift, scale and gate of attention, then of the MLP.
    Embeddings are summed at a width of at most 512.
    """

    width: int
    embed_steps: bool  # the step count, where it varies
    embed: Callable = NOTHING.embed  # adds the condition; see Condition
    rows: int = 6  # 2 for the head flow_matching, a shift and a scale

    @nn.compact
    def __call__(self, times, steps, y):
        """-> [B, rows, W]. times: noise levels, a tuple of [B]; steps [B]; y: the condition."""
        inner = min(self.width, 512)
        scalars = {f"level_{i}": 1000 * t for i, t in enumerate(times)}
        if self.embed_steps:
            scalars["steps"] = 10 * steps
        total = 0
        for name, value in scalars.items():
            features = sinusoidal(value, min(inner, 256))
            h = dense(inner, (None, "embed"), jnp.float32, f"{name}_in")(features)
            total += dense(inner, ("embed", "embed_out"), jnp.float32, f"{name}_out")(nn.silu(h))
        total = self.embed(self, y, total)
        # Without this constraint XLA's partitioner splits the sum over two mesh axes and gets the
        # loss wrong by 1e-4 and gradients by half.
        total = nn.with_logical_constraint(total, ("batch", "embed_activation"))
        project = dense(self.rows * self.width, ("embed", "mlp"), jnp.float32, "modulation",
                        scale=0)
        modulation = project(nn.silu(total))
        return modulation.reshape(-1, self.rows, self.width)
