"""Attention as functions of queries, keys and values, its cache, and rotary positions.

Symbols: B batch, N tokens, H heads, G key-value heads, C head size, M keys.
"""

import jax
import jax.numpy as jnp

from ntm_jax.core.transformer.precision import own_precision, precision

HIDDEN = -1e30  # the score of a key that a query may not attend to


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
