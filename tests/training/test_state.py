"""The state that a run begins with."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from ntm_jax.training import state
from tests.common import bits, new_run, tiny_config


def test_a_new_state():
    settings = tiny_config()
    run = new_run(settings)
    current = jax.device_get(state.initialize(run))
    assert int(current.step) == 0
    assert bits(current.params) == bits(current.ema)
    assert all(not np.any(a) for a in jax.tree.leaves(current.opt_state))
    shapes = state.abstract(run)
    found, expected = (
        jax.tree.map(lambda a: (a.shape, a.dtype), tree) for tree in (current, shapes))
    assert found == expected
    assert {a.dtype for a in jax.tree.leaves(current.params)} == {jnp.dtype("float32")}
    again = state.initialize(dataclasses.replace(run, config=dataclasses.replace(settings, seed=1)))
    assert bits(again.params) != bits(current.params)
