"""Layers: masked attention against a plain formula, its cache, scan and remat."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntm_jax.core import transformer
from ntm_jax.core.transformer import PLAIN, plain_attention, rotary_2d
from tests.core.conftest import compiled, random_parameters


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def attend(q, k, v, seen):
    """Attention of one example by its formula in float64.

    q: [N, H, C]; k and v: [M, G, C]; seen: [M].
    """
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    group = q.shape[1] // k.shape[1]
    out = np.zeros_like(q)
    for n, h in np.ndindex(q.shape[:2]):
        weights = np.exp(k[:, h // group] @ q[n, h] / math.sqrt(q.shape[2])) * seen
        out[n, h] = weights @ v[:, h // group] / weights.sum()
    return out


def test_masked_attention_by_its_formula():
    """Full and causal attention, rotations and embeddings are in tests/test_reference.py."""
    q, k, v = normal(0, 2, 5, 4, 8), normal(1, 2, 5, 2, 8), normal(2, 2, 5, 2, 8)
    seen = np.arange(5) < np.array([[3], [5]])
    out = jax.jit(functools.partial(plain_attention, causal=False))(q, k, v, keys=seen)
    for i in range(2):
        # float32 sums of 5 to 8 terms of size 1
        np.testing.assert_allclose(out[i], attend(q[i], k[i], v[i], seen[i]), atol=2e-6)


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
