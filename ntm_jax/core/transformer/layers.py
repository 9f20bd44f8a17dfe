"""Transformer layers: attention with an explicit KV cache, MLP, modulation, positions.

Symbols: B batch, N tokens, W width, H heads, G key-value heads, C head size, L layers.
Parameters and activations carry logical axis names; runtime/sharding.py maps them to a mesh.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ntm_jax.core.transformer.attention import attend_to_cache, rotary_2d, rotate
from ntm_jax.core.transformer.precision import own_precision

Array = jax.Array


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _product(x, kernel, options: tuple):
    """x [R, I] times kernel [I, O], with a fast gradient of the kernel on XLA's CPU backend.

    The gradient of a small square kernel is a product with a transposed copy of x, which query, key
    and value share: 1.4 times as fast for 64 x 64, but slower for 256 x 256. With more rows than
    columns it is computed transposed: 1.7 times as fast for 1024 x 256. options: of
    jax.lax.dot_general, as pairs.
    """
    return jax.lax.dot_general(x, kernel, (((1,), (0,)), ((), ())), **dict(options))


def _product_jvp(options: tuple, values, tangents):
    (x, kernel), (x_tangent, kernel_tangent) = values, tangents

    def product(left, left_axis: int, right, right_axis: int):
        dimensions = (((left_axis,), (right_axis,)), ((), ()))
        return jax.lax.dot_general(left, right, dimensions, **dict(options))

    # Without the barriers XLA merges the transpositions into the products.
    barrier, terms, (rows, columns) = jax.lax.optimization_barrier, [], kernel.shape
    if not _is_zero(x_tangent):
        terms.append(product(x_tangent, 1, kernel, 0))
    if not _is_zero(kernel_tangent):  # the transpose of this term is the kernel's gradient
        if rows > columns:
            terms.append(product(x, 1, barrier(kernel_tangent.T), 1))
        elif rows == columns <= 128:
            terms.append(product(barrier(x.T), 0, kernel_tangent, 0))
        else:
            terms.append(product(x, 1, kernel_tangent, 0))
    return product(x, 1, kernel, 0), sum(terms[1:], terms[0])


def _is_zero(tangent) -> bool:
    return isinstance(tangent, jax.custom_derivatives.SymbolicZero)


_product.defjvp(_product_jvp, symbolic_zeros=True)


def _rows_dot_general(x, kernel, dimensions, **options):
    """x [B, N, W] times kernel, as a matrix of B N rows: twice as fast a gradient on a CPU."""
    rows = _product(x.reshape(-1, x.shape[-1]), kernel, tuple(options.items()))
    return rows.reshape(*x.shape[:-1], -1)


@functools.cache
def _traced_once(make: Callable, *arguments) -> Callable:
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
    return cast(Any, nn.with_logical_partitioning(_traced_once(make, *arguments), axes))


def dense(features: int, axes: tuple[str | None, str | None], dtype, name: str,
          scale: float = 1.0, bias: bool = True, rows: bool = False):
    """A Dense layer with logical axes `axes` and initial variance scale/fan_in of its kernel.

    scale=0 starts at zero. rows: merges all leading axes into one.
    """
    zeros, scaled = nn.initializers.zeros_init, nn.initializers.variance_scaling
    kernel_init = (partitioned(axes, scaled, scale, "fan_in", "truncated_normal") if scale
                   else partitioned(axes, zeros))
    return nn.Dense(
        features, use_bias=bias, dtype=dtype, precision=own_precision(dtype), name=name,
        dot_general=_rows_dot_general if rows else None,
        kernel_init=kernel_init, bias_init=partitioned(axes[1:], zeros),
    )


def norm(dtype, name: str, learned: bool = False):
    """Layer norm in float32, cast to dtype; `learned` adds a scale."""
    scale_init = partitioned(("embed",), nn.initializers.ones_init)
    return nn.LayerNorm(epsilon=1e-6, use_bias=False, use_scale=learned, dtype=dtype,
                        scale_init=scale_init, name=name)


def _modulated_norm(layer_norm: Callable, x, scale, shift):
    """layer_norm in float32 of x [B, N, W], times 1 + scale, plus shift, [B, 1, W] each."""
    return layer_norm(x.astype(jnp.float32)).astype(scale.dtype) * (1 + scale) + shift


def _layer_norm(x):
    return nn.LayerNorm(epsilon=1e-6, use_bias=False, use_scale=False, parent=None).apply({}, x)


@jax.custom_jvp
def _layer_norm_on_cpu(x):
    """_layer_norm with a gradient that XLA's CPU backend computes faster.

    Ending in a subtraction, it is computed once for the gradient's sums. XLA's CPU backend merges a
    final product into each of them and copies the factor 1 / sqrt to the size of x.
    """
    inverse, mean = _statistics(x)
    return x * inverse - mean * inverse


def _statistics(x):
    mean = jnp.mean(x, -1, keepdims=True)
    variance = jnp.mean(jnp.square(x), -1, keepdims=True) - jnp.square(mean)
    return jax.lax.rsqrt(jnp.maximum(variance, 0) + 1e-6), mean


@_layer_norm_on_cpu.defjvp
def _layer_norm_on_cpu_jvp(values, tangents):
    (x,), (x_tangent,) = values, tangents
    (inverse, _), found = _statistics(x), _layer_norm_on_cpu(x)
    along = jnp.mean(found * x_tangent, -1, keepdims=True)
    return found, inverse * (x_tangent - jnp.mean(x_tangent, -1, keepdims=True) - found * along)


@jax.custom_jvp
def _rms_norm(x, scale):
    """x [B, N, H, C] / sqrt(mean(x^2) + 1e-6) * scale [C], as flax's RMSNorm.

    Its gradient's sums over features are products with a vector, which XLA's CPU backend computes
    in half the time. They share x / rms times the gradient with its sums over rows.
    """
    return x * (_inverse_rms(x) * _row(scale))


def _inverse_rms(x):
    return jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6)


def _row(scale):
    return scale[None, None, None]


@_rms_norm.defjvp
def _rms_norm_jvp(values, tangents):
    (x, scale), (x_tangent, scale_tangent) = values, tangents
    inverse = _inverse_rms(x)
    shrink = -(inverse**2) * jnp.mean(x * x_tangent, -1, keepdims=True)
    # The transpose of this outer product is the product with a vector.
    change = jnp.einsum("bnh,c->bnhc", shrink[..., 0], scale, precision="highest")
    change += _row(scale_tangent)
    return _rms_norm(x, scale), x_tangent * (inverse * _row(scale)) + x * inverse * change


class RMSNorm(nn.Module):
    """RMS norm of queries or keys [B, N, H, C] in float32, cast to dtype, with a learned scale."""

    dtype: Any

    @nn.compact
    def __call__(self, x):
        ones = partitioned((None,), nn.initializers.ones_init)
        scale = self.param("scale", ones, x.shape[-1:])
        return _rms_norm(x.astype(jnp.float32), scale).astype(self.dtype)


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """The sizes and choices of the layers of a stack. Static."""

    depth: int  # how many; it divides the initial variance of what a layer adds
    head_size: int
    kv_heads: int
    mlp_ratio: int
    causal: bool
    dtype: Any
    attention: Callable  # a function like plain_attention
    # Matrix products merge examples and tokens into one axis, and gradients compute norms and
    # GELU's slope again: faster on a CPU, but not for tokens sharded over a mesh axis.
    flat: bool


class Attention(nn.Module):
    """Grouped-query self-attention with normalised queries and keys."""

    config: LayerConfig

    @nn.compact
    def __call__(self, x, angles=None, keys=None, cache=None, index=None):
        """x [B, N, W] -> ([B, N, W], cache).

        keys: [B, N], the tokens that may be attended to; all by default. With a cache
        (k, v: [B, G, M, C]) x is the one token at `index` and attends to tokens <= index.
        """
        c, width = self.config, x.shape[-1]

        def heads(name, count):
            y = dense(count * c.head_size, ("embed", "heads"), c.dtype, name, bias=False,
                      rows=c.flat)(x)
            return checkpoint_name(y, "narrow").reshape(*x.shape[:-1], count, c.head_size)

        q = heads("query", width // c.head_size)
        k, v = heads("key", c.kv_heads), heads("value", c.kv_heads)
        q = RMSNorm(c.dtype, name="query_norm")(q)
        k = RMSNorm(c.dtype, name="key_norm")(k)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        if cache is None:
            q = nn.with_logical_constraint(q, ("batch", "tokens", "heads", None))
            axes = ("batch", "keys", "heads", None)  # every query attends to all keys
            k, v = (nn.with_logical_constraint(a, axes) for a in (k, v))
            y = c.attention(q, k, v, causal=c.causal, keys=keys)
        else:
            assert index is not None  # the place of x in the cache
            cache = tuple(
                jax.lax.dynamic_update_slice_in_dim(old, jnp.swapaxes(new, 1, 2), index, 2)
                for old, new in zip(cache, (k, v), strict=True))
            y = attend_to_cache(q, cache, index)
        y = checkpoint_name(y.reshape(*x.shape[:-1], -1), "narrow")
        y = dense(width, ("heads", "embed"), c.dtype, "out", scale=1 / c.depth, bias=False,
                  rows=c.flat)(y)
        return checkpoint_name(y, "narrow"), cache


_GELU = 2 * math.sqrt(2 / math.pi), 2 * math.sqrt(2 / math.pi) * 0.044715


@jax.custom_jvp
def _gelu_on_cpu(x):
    """nn.gelu with a gradient that XLA's CPU backend computes faster, from x and the value.

    It ends in a division, so that XLA computes it once: cheaper ends are repeated in every use.
    """
    return x / (1 + jnp.exp(-x * (_GELU[0] + _GELU[1] * x**2)))


@_gelu_on_cpu.defjvp
def _gelu_on_cpu_jvp(values, tangents):
    (x,), (x_tangent,) = values, tangents
    found = checkpoint_name(_gelu_on_cpu(x), "gelu")
    share = jnp.where(x == 0, 0.5, found / x)  # 1 / (1 + exp(...)) of the value
    slope = share + found * (1 - share) * (_GELU[0] + 3 * _GELU[1] * x**2)
    return found, x_tangent * slope


class Layer(nn.Module):
    """Pre-norm transformer layer (docs/concepts.md, section 4).

    All layers share one modulation, to which each adds a learned table of its own.
    """

    config: LayerConfig

    @nn.compact
    def __call__(self, x, cache, modulation, angles, keys, index):
        """x [B, N, W], modulation [B, 6, W] -> (x, cache), as nn.scan requires."""
        c, width = self.config, x.shape[-1]
        modulated_norm, gelu = functools.partial(_modulated_norm, _layer_norm), nn.gelu
        if c.flat:
            modulated_norm = jax.checkpoint(functools.partial(_modulated_norm, _layer_norm_on_cpu))
            gelu = jax.checkpoint(
                _gelu_on_cpu, policy=jax.checkpoint_policies.save_only_these_names("gelu"))
        zeros = partitioned((None, "embed"), nn.initializers.zeros_init)
        table = self.param("table", zeros, (6, width))
        own = (modulation + table[None]).astype(c.dtype)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = jnp.split(own, 6, 1)
        x = nn.with_logical_constraint(x, ("batch", "tokens", "embed_activation"))
        h = modulated_norm(x, scale_1, shift_1)
        h, cache = Attention(c, name="attention")(h, angles, keys, cache, index)
        x = x + (1 + gate_1) * h
        h = modulated_norm(x, scale_2, shift_2)
        h = dense(c.mlp_ratio * width, ("embed", "mlp"), c.dtype, "up", rows=c.flat)(h)
        h = nn.with_logical_constraint(gelu(h), ("batch", "tokens", "mlp"))
        h = dense(width, ("mlp", "embed"), c.dtype, "down", scale=1 / c.depth, rows=c.flat)(h)
        return x + (1 + gate_2) * checkpoint_name(h, "narrow"), cache


REMAT = {  # what the backward pass finds saved, in numbers for each token and layer
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
