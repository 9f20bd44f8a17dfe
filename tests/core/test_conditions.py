"""Conditions: a vector's features by their formula, and a vector or its absence."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ntm_jax.core.conditions import Vector
from ntm_jax.core.transformer import Modulation
from ntm_jax.data.conditions.vector import VectorCondition, VectorNetwork
from tests.core.conftest import compiled, random_parameters


def test_the_features_of_a_vector_by_their_formula():
    """Pre-norm residual MLPs, and a norm; a condition reads them in place of the vector."""
    values = np.array([[0.5, -1.0], [2.0, 0.1]], np.float32)
    params = random_parameters(VectorNetwork(8, 2), values)

    def linear(name, h):
        own = jax.device_get(nn.unbox(params)["params"][name])
        return h @ own["kernel"] + own["bias"]

    def norm(h):
        return (h - h.mean(1, keepdims=True)) / np.sqrt(h.var(1, keepdims=True) + 1e-6)

    h = linear("in", values)
    for i in range(2):
        wide = linear(f"up_{i}", norm(h))
        h = h + linear(f"down_{i}", wide / (1 + np.exp(-wide)))
    features = compiled(VectorNetwork(8, 2))(params, values)
    np.testing.assert_allclose(features, norm(h), atol=1e-5)
    module, rest = Modulation(16, False, VectorCondition(2).embed), ((jnp.full(2, 0.1),), None)
    y = Vector(values, np.ones(2, bool), features)
    both = random_parameters(module, *rest, y)
    found = compiled(module)(both, *rest, y)
    np.testing.assert_array_equal(found, compiled(module)(both, *rest, y._replace(values=-values)))


def test_a_condition_distinguishes_vectors_and_their_absence():
    kind, times, steps = VectorCondition(2), (jnp.full(3, 0.1),), None
    module = Modulation(16, False, kind.embed)
    y = Vector(jnp.array([[0.5, -1], [0.5, 2], [0.5, 2]]), jnp.array([True, True, False]))
    params = random_parameters(module, times, steps, y)
    first, second, absent = compiled(module)(params, times, steps, y)
    for one, other in ((first, second), (first, absent), (second, absent)):
        assert jnp.abs(one - other).max() > 1e-3
    nothing = compiled(module)(params, times, steps, kind.null_condition(y))
    np.testing.assert_allclose(nothing, jnp.broadcast_to(absent, nothing.shape), atol=1e-6)
