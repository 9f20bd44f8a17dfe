"""The state that a run begins with."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from ntm_jax.training import state
from tests.common import as_run, bits, setup, tiny_config


def test_a_new_state():
    settings = tiny_config()
    _, model, mesh = setup(settings)
    current = jax.device_get(state.initialize(as_run(settings, model, mesh)))
    assert int(current.step) == 0
    assert bits(current.params) == bits(current.ema)
    assert all(not np.any(a) for a in jax.tree.leaves(current.opt_state))
    shapes = state.abstract(as_run(settings, model, mesh))
    found, expected = (
        jax.tree.map(lambda a: (a.shape, a.dtype), tree) for tree in (current, shapes))
    assert found == expected
    assert {a.dtype for a in jax.tree.leaves(current.params)} == {jnp.dtype("float32")}
    again = state.initialize(as_run(dataclasses.replace(settings, seed=1), model, mesh))
    assert bits(again.params) != bits(current.params)
