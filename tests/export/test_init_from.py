"""New runs that start from the parameters of an export or of another run."""

import dataclasses

import jax
import pytest

from ntm_jax.data import pipeline, sources
from ntm_jax.errors import UserError
from ntm_jax.runtime import config_file
from ntm_jax.runtime.checkpoint import Checkpoints
from ntm_jax.training import loop, state
from tests.common import as_run, bits, randomised, setup, tiny_config
from tests.export.common import SETTINGS, refused_by_training


@pytest.fixture(scope="module")
def new():
    """The state of a run that starts from nothing."""
    _, model, mesh = setup(SETTINGS)
    return state.initialize(as_run(SETTINGS, model, mesh))


@pytest.mark.parametrize("kind", ["export", "workdir", "checkpoint"])
def test_a_new_run_starts_from_an_export_or_a_run(workdir, exported, new, tmp_path, started, kind):
    source = {"export": exported, "workdir": workdir, "checkpoint": workdir / "checkpoints/2"}[kind]
    settings = dataclasses.replace(SETTINGS, init_from=str(source))
    current, start = started(settings, tmp_path / "new")
    expected = bits(randomised(new.params, 2 if kind == "checkpoint" else 4))
    assert (start, bits(current.params), bits(current.ema)) == (0, expected, expected)
    assert bits((current.step, current.opt_state)) == bits((new.step, new.opt_state))
    pointers = [{a.unsafe_buffer_pointer() for a in jax.tree.leaves(tree)}
                for tree in (current.params, current.ema)]
    assert not pointers[0] & pointers[1]  # a step donates both
    assert config_file.load(str(tmp_path / "new"))[0].init_from == str(source)


def test_a_resumed_run_goes_on_from_its_own_checkpoint(new, tmp_path, started):
    settings = dataclasses.replace(SETTINGS, init_from="exports/gone")
    source = sources.open_source("digits", "train")
    config_file.write(str(tmp_path), settings, pipeline.spec(source, 2))
    with Checkpoints(tmp_path) as checkpoints:
        position = pipeline.TrainIterator(source, 2, 16, 0, 0).get_state()
        checkpoints.save(2, new, position)
    current, start = started(settings, tmp_path)
    assert (start, bits(current.params)) == (2, bits(new.params))
    with pytest.raises(UserError, match="holds a run with init_from = 'exports/gone', and this one "
                                        "has ''"):
        loop.train(SETTINGS, str(tmp_path), progress=False)


@pytest.mark.parametrize(("name", "message"), [
    ("export", "array params/predictor/"),
    ("", "there is no such export or run"),
    ("checkpoints/2", "is of another model: array ema/")])
def test_a_missing_run_or_another_model_is_refused(workdir, exported, tmp_path, name, message):
    source = {"export": exported, "": tmp_path}.get(name, workdir / name)
    refused_by_training(tiny_config(**{"model.width": 32}), source, tmp_path, message)
