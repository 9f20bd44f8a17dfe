"""The functions that devices compute in ways of their own, and their plain forms."""

import dataclasses
from collections.abc import Callable
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from ntm_jax.core.transformer.attention import plain_attention

EPSILON = 1e-6  # added to the variance or mean square of a norm


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
