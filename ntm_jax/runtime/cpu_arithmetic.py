"""Arithmetic that XLA's CPU backend computes faster, above all in the backward pass.

Matrix products merge examples and tokens into one axis, which tokens sharded over a mesh axis would
have to be gathered for. Everything here is traced under the name `cpu_arithmetic`, which compiled
texts show.

Symbols: B batch, N tokens, W width, H heads, G key-value heads, C head size, M keys.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ntm_jax.core.transformer import EPSILON, Arithmetic, attend, inverse_rms, plain_attention

BLOCKWISE_TOKENS = 256  # from which blocks are faster
named = jax.named_scope("cpu_arithmetic")


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _product(x, kernel, options: tuple):
    """x [R, I] times kernel [I, O], with a fast gradient of the kernel.

    The gradient of a small square kernel is a product with a transposed copy of x, which query, key
    and value share: 1.4 times as fast for 64 x 64, but slower for 256 x 256. With more rows than
    columns it is computed transposed: 1.7 times as fast for 1024 x 256. options: of
    jax.lax.dot_general, as pairs.
    """
    return jax.lax.dot_general(x, kernel, (((1,), (0,)), ((), ())), **dict(options))


@functools.partial(_product.defjvp, symbolic_zeros=True)
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


@named
def product(x, kernel, dimensions, **options):
    """x [..., I] times kernel [I, O], as a matrix of all rows: twice as fast a gradient."""
    rows = _product(x.reshape(-1, x.shape[-1]), kernel, tuple(options.items()))
    return rows.reshape(*x.shape[:-1], -1)


@jax.custom_jvp
def layer_norm(x):
    """Layer norm with a faster gradient.

    Ending in a subtraction, it is computed once for the gradient's sums. XLA merges a final product
    into each of them and copies the factor 1 / sqrt to the size of x.
    """
    inverse, mean = _statistics(x)
    return x * inverse - mean * inverse


def _statistics(x):
    mean = jnp.mean(x, -1, keepdims=True)
    variance = jnp.mean(jnp.square(x), -1, keepdims=True) - jnp.square(mean)
    return jax.lax.rsqrt(jnp.maximum(variance, 0) + EPSILON), mean


@layer_norm.defjvp
def _layer_norm_jvp(values, tangents):
    (x,), (x_tangent,) = values, tangents
    (inverse, _), found = _statistics(x), layer_norm(x)
    along = jnp.mean(found * x_tangent, -1, keepdims=True)
    return found, inverse * (x_tangent - jnp.mean(x_tangent, -1, keepdims=True) - found * along)


@named
@jax.checkpoint
def modulated_norm(x, scale, shift):
    """Layer norm with modulation, computed again for the gradient instead of kept in memory."""
    return layer_norm(x.astype(jnp.float32)).astype(scale.dtype) * (1 + scale) + shift


@jax.custom_jvp
def _rms_norm(x, scale):
    """RMS norm of x [B, N, H, C] with a learned scale [C].

    Its gradient's sums over features are products with a vector, which XLA computes in half the
    time. They share x / rms times the gradient with its sums over rows.
    """
    return x * (inverse_rms(x) * scale[None, None, None])


@_rms_norm.defjvp
def _rms_norm_jvp(values, tangents):
    (x, scale), (x_tangent, scale_tangent) = values, tangents
    inverse = inverse_rms(x)
    shrink = -(inverse**2) * jnp.mean(x * x_tangent, -1, keepdims=True)
    # The transpose of this outer product is the product with a vector.
    change = jnp.einsum("bnh,c->bnhc", shrink[..., 0], scale, precision="highest")
    change += scale_tangent[None, None, None]
    tangent = x_tangent * (inverse * scale[None, None, None]) + x * inverse * change
    return _rms_norm(x, scale), tangent


rms_norm = named(_rms_norm)


_GELU = 2 * math.sqrt(2 / math.pi), 2 * math.sqrt(2 / math.pi) * 0.044715


@jax.custom_jvp
def _gelu(x):
    """flax.linen.gelu with a gradient computed from x and the value.

    It ends in a division, so that XLA computes it once: cheaper ends are repeated in every use.
    """
    return x / (1 + jnp.exp(-x * (_GELU[0] + _GELU[1] * x**2)))


@_gelu.defjvp
def _gelu_jvp(values, tangents):
    (x,), (x_tangent,) = values, tangents
    found = checkpoint_name(_gelu(x), "gelu")
    share = jnp.where(x == 0, 0.5, found / x)  # 1 / (1 + exp(...)) of the value
    slope = share + found * (1 - share) * (_GELU[0] + 3 * _GELU[1] * x**2)
    return found, x_tangent * slope


gelu = named(jax.checkpoint(
    _gelu, policy=jax.checkpoint_policies.save_only_these_names("gelu")))


@jax.custom_jvp
def softmax(scores):
    """jax.nn.softmax, with a gradient computed in a third of the time.

    Its derivative is written so that its transpose is y g - y sum(y g), which shares a product.
    """
    return jax.nn.softmax(scores)


@softmax.defjvp
def _softmax_jvp(values, tangents):
    probabilities, (tangent,) = softmax(*values), tangents
    mean = jnp.sum(probabilities * tangent, -1, keepdims=True)
    return probabilities, probabilities * (tangent - mean)


@named
def _attention(q, k, v, *, causal: bool, keys=None):
    return plain_attention(q, k, v, causal=causal, keys=keys, softmax=softmax)


@named
def blockwise_attention(q, k, v, *, causal: bool, keys=None):
    """Attention in four blocks of queries, for causal attention to many tokens.

    Each block attends to the keys up to its end only, so later ones are not computed and masked.
    """
    tokens, blocks = q.shape[1], 4
    if not causal or tokens != k.shape[1]:
        return plain_attention(q, k, v, causal=causal, keys=keys, softmax=softmax)
    k, v, found = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2), []
    for i in range(blocks):
        begin, end = tokens * i // blocks, tokens * (i + 1) // blocks
        mask = jnp.tri(end - begin, end, begin, dtype=bool)[None, None]
        if keys is not None:
            mask &= keys[:, None, None, :end]
        found.append(attend(q[:, begin:end], k[:, :, :end], v[:, :, :end], mask, softmax))
    return jnp.concatenate(found, 1)


def arithmetic(tokens: int) -> Arithmetic:
    """The arithmetic for images of this number of tokens."""
    attention = blockwise_attention if tokens >= BLOCKWISE_TOKENS else _attention
    return Arithmetic(attention, product, modulated_norm, rms_norm, gelu)
