"""A CPU's arithmetic has the values and derivatives of the plain one; where it is chosen."""

import functools
import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntm_jax.core.transformer import PLAIN, Arithmetic, plain_attention
from ntm_jax.runtime import arithmetic, config, cpu_arithmetic, sharding
from ntm_jax.runtime.attention import Attention

CPU = cpu_arithmetic.arithmetic(tokens=16)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def product(function):
    return lambda x, kernel: function(x, kernel, (((2,), (0,)), ((), ())), precision=None)


def attention(function, keys, **options):
    return lambda q, k, v: function(q, k, v, keys=keys, **options)


def attentions():
    """Full, causal and masked attention of 6 tokens."""
    arrays = [(2, 6, 4, 4), (2, 6, 2, 4), (2, 6, 2, 4)]
    seen = np.arange(6)[None] < np.array([[5], [2]])
    for causal, keys in ((False, None), (True, None), (False, seen), (True, seen)):
        for found in (CPU.attention, cpu_arithmetic.blockwise_attention):
            yield (attention(found, keys, causal=causal),
                   attention(plain_attention, keys, causal=causal), arrays)


CASES = [
    (product(CPU.product), product(PLAIN.product), [(2, 3, 5), (5, columns)])
    for columns in (3, 5, 7)  # kernels with fewer, as many and more columns than rows
] + [
    (CPU.modulated_norm, PLAIN.modulated_norm, [(2, 3, 4), (2, 1, 4), (2, 1, 4)]),
    (CPU.rms_norm, PLAIN.rms_norm, [(2, 3, 2, 4), (4,)]),
    (CPU.gelu, PLAIN.gelu, [(3, 8)]),
    (cpu_arithmetic.softmax, jax.nn.softmax, [(3, 5)]),
    *attentions(),
]


@pytest.mark.parametrize(("function", "expected", "shapes"), CASES)
def test_values_and_derivatives_are_those_of_the_plain_form(function, expected, shapes):
    arrays = [2 * normal(i, *shape) for i, shape in enumerate(shapes)]
    weight = normal(9, *jax.eval_shape(expected, *arrays).shape)

    def derivatives(function):
        def loss(*arrays):
            return jnp.sum(weight * function(*arrays) ** 2)

        def compute(*arrays):
            every = tuple(range(len(arrays)))
            single = [jax.grad(loss, i)(*arrays) for i in every]  # the others are constant
            gradients, second = jax.grad(loss, every), jax.jacfwd(jax.grad(loss))
            return jax.jvp(function, arrays, arrays), single, gradients(*arrays), second(*arrays)

        compiled = jax.jit(compute).lower(*arrays).compile()
        named = re.search('op_name="[^"]*cpu_arithmetic', compiled.as_text())
        return compiled(*arrays), bool(named)

    (found, named), (desired, plain) = derivatives(function), derivatives(expected)
    assert (named, plain) == (function is not cpu_arithmetic.softmax, False)  # a part of attention
    # float32 sums, of up to 40 terms of up to 100, in another order
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=3e-4),
                 found, desired)


def test_gelu_and_its_gradient_are_exact_at_zero_and_far_from_it():
    x = np.array([-1e6, -100, -20, -6, -1e-30, 0, 1e-30, 6, 20, 100, 1e6])
    c = math.sqrt(2 / math.pi)
    tanh = np.tanh(c * (x + 0.044715 * x**3))  # in float64
    value = 0.5 * x * (1 + tanh)
    gradient = 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh**2) * c * (1 + 3 * 0.044715 * x**2)
    found = jax.vmap(jax.value_and_grad(CPU.gelu))(jnp.asarray(x, jnp.float32))
    for actual, desired in zip(found, (value, gradient), strict=True):
        np.testing.assert_allclose(actual, desired, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("platform", "kind"), [("tpu", "splash"), ("gpu", "cudnn")])
def test_an_accelerator_has_an_attention_of_its_own_and_plain_functions(platform, kind):
    mesh = SimpleNamespace(devices=np.array([SimpleNamespace(platform=platform)]))
    assert arithmetic.choose(mesh, 64) == Arithmetic(attention=Attention(kind, mesh))


def test_a_cpu_has_its_own_unless_tokens_are_sharded():
    mesh = sharding.make_mesh(config.Mesh(1, -1, 1, 1, 1))
    assert arithmetic.choose(mesh, 255) == CPU
    assert arithmetic.choose(mesh, 256).attention is cpu_arithmetic.blockwise_attention
    sequence = SimpleNamespace(devices=mesh.devices, shape={"sequence": 2})
    assert arithmetic.choose(sequence, 16) == PLAIN
