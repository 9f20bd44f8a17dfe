"""The model of a configuration, the state it begins with, keys by name and record, and parameters read back from a run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntm_jax.core import trajectory
from ntm_jax.core.model import exact
from ntm_jax.data.pipeline import DataSpec
from ntm_jax.errors import UserError
from ntm_jax.runtime import build
from ntm_jax.runtime.checkpoint import Checkpoints
from ntm_jax.runtime.run import restore_params
from ntm_jax.training import state
from tests.common import as_run, bits, setup, tiny_config

pytestmark = pytest.mark.usefixtures("quick_compilation")
SETTINGS = tiny_config()


@pytest.fixture(scope="module")
def begun():
    _, model, mesh = setup(SETTINGS)
    return model, mesh, state.initialize(as_run(SETTINGS, model, mesh))


def test_the_model_fits_the_data():
    model = build.make_model(tiny_config(**{"model.dtype": "bfloat16"}), DataSpec((8, 4, 3), 2, 256, 7, 10))
    assert (model.config.grid, model.config.dim, model.config.num_classes, model.config.steps) == ((4, 2), 12, 7, (2,))
    assert model.config.dtype == model.config.transporter_dtype == jnp.bfloat16
    assert exact(model).config.transporter_dtype == jnp.float32
    assert exact(model).config.dtype == jnp.bfloat16
    unlabelled = tiny_config(**{"model.condition": "none", "train.condition_dropout": 0.0})
    assert build.make_model(unlabelled, DataSpec((8, 8, 1), 2, 17, 7, 10)).config.num_classes == 0


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match=r"config\.model\.condition is class, and digits has no labels: set it to none"):
        build.make_model(SETTINGS, DataSpec((8, 8, 1), 2, 17, 0, 10))
    with pytest.raises(UserError, match=r"config\.model\.width = 20 must be a multiple of head_size x kv_heads = 8 x 2"):
        build.make_model(tiny_config(**{"model.width": 20}), DataSpec((8, 8, 1), 2, 17, 10, 10))


def test_a_new_state(begun):
    model, mesh, current = begun
    assert int(current.step) == 0
    assert bits(current.params) == bits(current.ema)
    assert all(not np.any(a) for a in jax.tree.leaves(current.opt_state))
    shapes = state.abstract(as_run(SETTINGS, model, mesh))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), current) == jax.tree.map(lambda a: (a.shape, a.dtype), shapes)
    assert {a.dtype for a in jax.tree.leaves(current.params)} == {jnp.dtype("float32")}
    again = state.initialize(as_run(dataclasses.replace(SETTINGS, seed=1), model, mesh))
    assert bits(again.params) != bits(current.params)


def test_keys_differ_by_name_and_record_and_do_not_depend_on_the_row():
    root, index = jax.random.key(0), jnp.array([5, 2, 9])
    data = {name: np.asarray(jax.random.key_data(trajectory.example_keys(root, name, index))) for name in ("noise", "t_min")}
    assert len({key.tobytes() for keys in data.values() for key in keys}) == 6
    reordered = jax.random.key_data(trajectory.example_keys(root, "noise", index[::-1]))
    np.testing.assert_array_equal(reordered, data["noise"][::-1])


def test_the_average_or_the_raw_parameters_are_read_back(tmp_path, begun):
    model, mesh, current = begun
    current = current.replace(ema=jax.tree.map(lambda a: a + 1, current.params))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, current, {})
        checkpoints.save(5, current.replace(ema=jax.tree.map(lambda a: a + 2, current.params)), {})
    for step, raw, expected in ((3, False, current.ema), (None, True, current.params)):
        found, params = restore_params(as_run(SETTINGS, model, mesh), step, raw, tmp_path)
        assert found == (step or 5)
        assert bits(params) == bits(expected)
