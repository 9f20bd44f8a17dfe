"""FLUX.2's network by itself: its outputs, masks, and a checkpoint on a mesh."""

import dataclasses
import functools
import json
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from ntm_jax.core.conditions import Text
from ntm_jax.data.conditions.text import TextCondition
from ntm_jax.projects.flux2 import network as flux2
from ntm_jax.projects.flux2 import weights as flux2_weights
from ntm_jax.runtime import config, sharding
from tests.common import python
from tests.projects.flux2.common import TINY, abstract, inputs, random_tensors, weights

# float32 sums in another order, through four layers, of values and gradients up to about 10
ATOL = 2e-5
NARROW = dataclasses.replace(TINY, scan=True, remat="narrow")


@functools.partial(jax.jit, static_argnums=0)
def forward(settings, params, x, t, text):
    return flux2.Flux2(settings).apply({"params": params}, x, t, text)


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.value_and_grad, argnums=(1, 2), has_aux=True)
def loss(settings, params, x, t, text):
    velocity, hidden = flux2.Flux2(settings).apply({"params": params}, x, t, text)
    return jnp.sum(jnp.sin(velocity)), (velocity, hidden)


def test_outputs_are_a_velocity_and_the_states_that_it_projects():
    settings, params = dataclasses.replace(NARROW, dtype=jnp.bfloat16), weights()
    velocity, hidden = forward(settings, params, *inputs())
    assert velocity.shape == (2, 15, 6)
    assert velocity.dtype == jnp.float32
    assert hidden.shape == (2, 15, 32)
    assert hidden.dtype == jnp.bfloat16
    product = hidden.astype(jnp.float32) @ params["project"]["kernel"].astype(jnp.bfloat16).astype(
        jnp.float32)
    # bfloat16 keeps 8 bits, values up to 4
    np.testing.assert_allclose(velocity, product, atol=0.03)
    assert velocity.std() > 0.3


def test_an_empty_mask_is_no_text_at_all():
    x, t, text = inputs()
    nothing = TextCondition().null_condition(text)
    (_, (velocity, hidden)), gradients = loss(NARROW, weights(), x, t, nothing)
    assert all(np.isfinite(a).all() for a in jax.tree.leaves((velocity, hidden, gradients)))
    none = Text(text.states[:, :0], text.mask[:, :0])
    np.testing.assert_allclose(velocity, forward(NARROW, weights(), x, t, none)[0], atol=ATOL)
    assert np.abs(velocity - loss(NARROW, weights(), x, t, text)[0][1][0]).max() > 0.1


def main(path, out):
    """Reads a checkpoint onto 8 devices, and writes the parameters and the shapes of their shards.

    To OUT.npz and OUT.json.
    """
    boxed = jax.eval_shape(flux2.Flux2(TINY).init, jax.random.key(0), *inputs(TINY, 1))["params"]
    mesh = sharding.make_mesh(config.Mesh(1, 1, 2, 2, 2))
    homes = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
                         nn.unbox(boxed), sharding.shardings(boxed, mesh))
    leaves = {jax.tree_util.keystr(at, simple=True, separator="/"): leaf for at, leaf in
              jax.tree_util.tree_leaves_with_path(flux2_weights.read(path, homes))}
    np.savez(f"{out}.npz", **{name: np.asarray(leaf) for name, leaf in leaves.items()})
    with open(f"{out}.json", "w") as file:
        json.dump({name: [leaf.shape, leaf.addressable_shards[0].data.shape]
                   for name, leaf in leaves.items()}, file)


@pytest.mark.slow
def test_a_checkpoint_is_read_onto_a_mesh(tmp_path):
    """That a step is the same there is in tests/runtime/test_sharding.py."""
    path, out = str(tmp_path / "tiny.safetensors"), str(tmp_path / "out")
    safetensors.numpy.save_file(random_tensors(flux2_weights.ORIGINAL), path)
    python(__file__, path, out, devices=8)
    one = flux2_weights.read(path, abstract())
    found, shards = np.load(f"{out}.npz"), json.loads((tmp_path / "out.json").read_text())
    assert len(found) == len(jax.tree.leaves(one))
    for at, leaf in jax.tree_util.tree_leaves_with_path(one):
        name = jax.tree_util.keystr(at, simple=True, separator="/")
        np.testing.assert_array_equal(found[name], leaf)
    assert shards["double/text_query/kernel"] == [[2, 32, 32], [2, 16, 16]]
    assert shards["single/mlp_down/kernel"] == [[2, 96, 32], [2, 48, 16]]


if __name__ == "__main__":
    main(*sys.argv[1:])
