"""Layers: attention against a plain formula, its cache, rotations, scan and remat."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntm_jax.core import transformer
from ntm_jax.core.transformer import PLAIN, plain_attention, rotary_2d, rotate
from tests.core.conftest import compiled, random_parameters


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def attend(q, k, v, allowed):
    """Attention of one example by its formula in float64.

    q: [N, H, C]; k and v: [M, G, C]; allowed: [N, M].
    """
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    group = q.shape[1] // k.shape[1]
    out = np.zeros_like(q)
    for n, h in np.ndindex(q.shape[:2]):
        weights = np.exp(k[:, h // group] @ q[n, h] / math.sqrt(q.shape[2])) * allowed[n]
        out[n, h] = weights @ v[:, h // group] / weights.sum()
    return out


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("kind", ["full", "causal", "masked"])
def test_attention_by_its_formula(kv_heads, kind):
    q, k, v = normal(0, 2, 5, 4, 8), normal(1, 2, 5, kv_heads, 8), normal(2, 2, 5, kv_heads, 8)
    allowed = {"full": np.ones((5, 5)), "causal": np.tri(5),
               "masked": np.tile(np.arange(5) < 3, (5, 1))}[kind]
    keys = jnp.asarray(allowed[:1], bool) if kind == "masked" else None
    out = jax.jit(plain_attention, static_argnames="causal")(
        q, k, v, causal=kind == "causal", keys=keys)
    for i in range(2):
        # float32 sums of 5 to 8 terms of size 1
        np.testing.assert_allclose(out[i], attend(q[i], k[i], v[i], allowed), atol=2e-6)


def test_rotation_keeps_lengths_and_depends_only_on_relative_positions():
    grid, size = (4, 5), 8
    angles = rotary_2d(grid, size)
    assert angles.shape == (20, size // 2)
    q, k = (np.broadcast_to(normal(seed, 1, 1, 1, size), (1, 20, 1, size)) for seed in (0, 1))
    q, k = (np.asarray(jax.jit(rotate)(a, angles))[0, :, 0] for a in (q, k))
    # float32 cosines of angles up to 5 and sums of eight products of size 1
    np.testing.assert_allclose(np.linalg.norm(q, axis=-1), np.full(20, np.linalg.norm(q[0])),
                               rtol=1e-6)
    scores = (q @ k.T).reshape(*grid, *grid)
    np.testing.assert_allclose(scores[1:, 1:, 1:, 1:], scores[:-1, :-1, :-1, :-1], atol=2e-6)
    offsets = np.stack([scores[1, 2, 1, 2], scores[1, 2, 1, 3], scores[1, 2, 2, 2],
                        scores[1, 2, 2, 3], scores[1, 2, 0, 2]])
    assert (np.abs(offsets[:, None] - offsets)[~np.eye(5, dtype=bool)] > 1e-3).all()


def stack(remat="none", scan=False):
    """A causal stack of two layers."""
    config = transformer.LayerConfig(depth=2, head_size=4, kv_heads=2, mlp_ratio=2, causal=True,
                                dtype=jnp.float32, arithmetic=PLAIN)
    return transformer.Stack(config, remat, scan)


@pytest.fixture(scope="module")
def stacked():
    """(parameters, input [B, N, W], modulation [B, 6, W], angles) of a causal stack."""
    x, modulation, angles = normal(0, 2, 6, 16), 0.3 * normal(1, 2, 6, 16), rotary_2d(
        (2, 3), 4)
    return random_parameters(stack(), x, modulation, angles), x, modulation, angles


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.value_and_grad, argnums=(1, 2))
def loss(module, params, x, *args):
    return jnp.sum(jnp.sin(module.apply(params, x, *args)))


@pytest.mark.parametrize(("scan", "remat"), [
    (False, "dots"), *((True, remat) for remat in ("none", "full", "narrow", "dots"))])
def test_scan_and_remat_change_no_number(stacked, scan, remat):
    assert set(transformer.REMAT) == {"none", "full", "narrow", "dots"}
    expected, found = (jax.device_get(loss(module, *stacked))
                       for module in (stack(), stack(scan=scan, remat=remat)))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        # float32 sums in another order: of the largest entry, as single entries cancel
        np.testing.assert_allclose(a, b, atol=3e-6 * max(1, np.abs(b).max()))


def test_cached_steps_equal_the_full_sequence(stacked):
    params, x, modulation, angles = stacked
    expected = compiled(stack())(params, x, modulation, angles)
    weights = stack().apply(params, method=transformer.Stack.weights_by_layer)
    decode = jax.jit(functools.partial(stack().apply, method=transformer.Stack.decode))
    caches = [(np.zeros((2, 2, 6, 4), np.float32),) * 2] * 2
    for n in range(6):
        y, caches = decode(params, x[:, n : n + 1], weights, modulation, angles[n : n + 1],
                           caches, n)
        # float32 sums in another order, through two layers
        np.testing.assert_allclose(y[:, 0], expected[:, n], atol=1e-5)


