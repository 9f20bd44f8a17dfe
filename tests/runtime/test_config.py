"""Configurations: the shipped experiments are read, and each mistake is one line with its key."""

import json

import pytest

from ntm_jax.errors import UserError
from ntm_jax.runtime import config
from ntm_jax.training import objectives
from tests.common import TINY, experiment, tiny_config


def changed(**overrides) -> dict:
    """The digits experiment as a plain dict, so that config.read alone checks the values."""
    values = experiment().to_dict()
    for key, value in overrides.items():
        section, _, name = key.rpartition(".")
        (values[section] if section else values)[name] = value
    return values


def refusal(values) -> str:
    with pytest.raises(UserError) as error:
        config.read(values)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", [
    ("digits",), ("digits", "gaussian"), ("mnist",), ("mnist", "gaussian"), ("toy2d",),
    ("toy2d", "moons,no-transporter"), ("digits_fm",),
    ("mnist_fm",), ("digits_finetune", "free"), ("mnist_finetune", "free"), ("flux2_klein",),
    ("flux2_klein", "runlocal"), ("shapes",), ("shapes", "gaussian"), ("shapes", "runlocal"),
    ("sbi",), ("sbi", "slcp,no-transporter"), ("sbi", "slcp_moments")])
def test_the_shipped_experiments_are_read(name):
    read = config.read(experiment(*name))
    objectives.checked(read)
    assert config.read(read.raw) == read
    assert json.loads(json.dumps(read.raw)) == read.raw
    assert hash(read) == hash(config.read(read.raw))  # a static argument of compiled functions
    none = name[-1] == "gaussian" or name[-1].endswith(("no-transporter", "_fm"))
    assert (read.model.transporter_blocks == 0) == none


def test_an_integer_is_taken_for_a_float():
    read = config.read(changed(**{"optimizer.clip": 1, "trajectory.t_min_range": [0.02, 0.04]}))
    assert type(read.optimizer.clip) is float
    assert read.trajectory.t_min_range == (0.02, 0.04)


@pytest.mark.parametrize(("key", "value", "message"), [
    ("model.widht", 3,
     "config.model.widht is not a setting; expected one of width, head_size"),
    ("colour", 3,
     "config.colour is not a setting; expected one of seed, data"),
    ("model.width", "64",
     "config.model.width is '64', of type str: expected int"),
    ("model.width", 64.0,
     "config.model.width is 64.0, of type float: expected int"),
    ("model.width", True,
     "config.model.width is True, of type bool: expected int"),
    ("optimizer.clip", True,
     "config.optimizer.clip is True, of type bool: expected float"),
    ("optimizer.clip", "1",
     "config.optimizer.clip is '1', of type str: expected float"),
    ("optimizer.clip", None,
     "config.optimizer.clip is None, of type NoneType: expected float"),
    ("model.scan", 0,
     "config.model.scan is 0, of type int: expected bool"),
    ("data.source", 3,
     "config.data.source is 3, of type int: expected str"),
    ("trajectory.shift", "a",
     "config.trajectory.shift is 'a', of type str: expected float | None"),
    ("trajectory.steps", 4,
     "config.trajectory.steps is 4: expected a tuple of int"),
    ("trajectory.steps", (4, 8.0),
     "config.trajectory.steps is 8.0, of type float: expected int"),
    ("trajectory.steps", (4, True),
     "config.trajectory.steps is True, of type bool: expected int"),
    ("trajectory.steps", (),
     "config.trajectory.steps is empty: give the numbers of steps, such as (4,)"),
    ("trajectory.steps", (4, 0),
     "config.trajectory.steps is 0: expected at least 1 and at most 10000"),
    ("trajectory.shift", 1000.0,
     "config.trajectory.shift is 1000.0: expected at least -50 and at most 50"),
    ("trajectory.t_min_range", (0.1,),
     "config.trajectory.t_min_range is (0.1,): expected a tuple of float, 2 long"),
    ("trajectory.t_min_range", (0.1, 0.2, 0.3),
     "expected a tuple of float, 2 long"),
    ("trajectory.t_min_range", (0.04, 0.02),
     "expected 0 <= lo <= hi < 1"),
    ("trajectory.t_min", 0.0,
     "0 < t_min < 1"),
    ("sample.steps", 64,
     "config.sample.steps is 64: the first level of so many steps, 0.0245, does not lie above "
     "config.trajectory.t_min, 0.04; take fewer steps, or train with a lower t_min"),
    ("data", 3,
     "config.data is 3: expected a section"),
    ("data.batch_size", -4,
     "config.data.batch_size is -4: expected more than 0"),
    ("data.batch_size", 0,
     "config.data.batch_size is 0: expected more than 0"),
    ("train.steps", 0,
     "config.train.steps is 0: expected more than 0"),
    ("optimizer.weight_decay", -1e-4,
     "config.optimizer.weight_decay is -0.0001: expected a number that is not negative"),
    ("sample.guidance", -1.0,
     "config.sample.guidance is -1.0: expected a number that is not negative"),
    ("sample.guidance", (0.0, 0.5, -1.0, 0.0),
     "config.sample.guidance is -1.0: expected a number that is not negative"),
    ("sample.guidance", (0.0, 0.5, 1.0),
     "config.sample.guidance has 3 scales, and there are 4 steps: give one scale, or 4, from pure"),
    ("sample.guidance", (0.0, "a", 1.0, 1.0),
     "config.sample.guidance is 'a', of type str: expected float"),
    ("sample.guidance", "a",
     "config.sample.guidance is 'a', of type str: expected float | tuple[float, ...]"),
    ("model.head", "gaussian",
     "config.model.head is 'gaussian': expected one of direct, preconditioned, posterior"),
    ("trajectory.schedule", "cosine",
     "config.trajectory.schedule is 'cosine': expected one of linear, shifted"),
    ("model.condition", "words",
     "config.model.condition is 'words': expected one of none, class, text"),
    ("model.condition_layers", 2,
     "config.model.condition is class: set it to vector, or leave them at 0"),
    ("model.condition_shift", True,
     "config.model.condition is class: set it to vector, or leave it out"),
    ("model.transporter_text", True,
     "config.model.condition is class: set that to text, or transporter_text to False"),
    ("train.condition_dropout", 1.0,
     "config.train.condition_dropout is 1.0: expected less than 1"),
    ("optimizer.learning_rate", float("nan"),
     "config.optimizer.learning_rate is nan: expected a finite number"),
    ("trajectory.t_min_range", (0.02, float("inf")),
     "config.trajectory.t_min_range is inf: expected a finite number"),
])
def test_a_mistake_is_one_line_that_names_the_key(key, value, message):
    assert message in refusal(changed(**{key: value}))


@pytest.mark.parametrize(("key", "value"), [
    ("seed", 2**32), ("seed", -1), ("optimizer.ema_decay", 1.0), ("optimizer.floor", 0.1),
    ("model.width", 2**31), ("data.batch_size", 2**40), ("data.workers", 10**6),
    ("evaluate.trajectories", 10**9), ("sample.percentile", 101.0), ("train.steps", 2**31),
    ("trajectory.steps", (10**6,)), ("sample.num", 2**31), ("mesh.fsdp", 2**33),
    ("optimizer.learning_rate", 1e300), ("trajectory.shift", -1e300),
])
def test_a_number_out_of_range_is_refused(key, value):
    values = experiment()
    values.update_from_flattened_dict(TINY | {key: value})
    with pytest.raises(UserError, match=rf"config\.{key} is"):
        config.read(values)


def test_the_overrides_of_these_tests_are_settings():
    assert set(TINY) <= set(config.flatten(tiny_config().raw))


def test_a_missing_key_is_named():
    values = changed()
    del values["optimizer"]["clip"]
    assert "config.optimizer.clip is missing" in refusal(values)


def test_dropout_without_a_condition_is_refused():
    message = refusal(changed(**{"model.condition": "none"}))
    assert ("config.train.condition_dropout is 0.1: expected less than 1, and 0 where "
            "config.model.condition is none") in message


def test_guidance_without_dropout_is_refused():
    values = changed(**{"sample.guidance": 1.0, "train.condition_dropout": 0.0})
    assert "set config.train.condition_dropout to 0.1" in refusal(values)
    values["sample"]["guidance"] = (0.0, 0.0, 0.0, 1.0)
    assert "set config.train.condition_dropout to 0.1" in refusal(values)
    values["sample"]["guidance"] = (0.0, 0.0, 0.0, 0.0)
    config.read(values)
    config.read(changed(**{"sample.guidance": 1.0}))


def test_guidance_is_a_number_or_one_for_each_step():
    experiment_file = experiment()
    schedule = (1, 0.5, 0, 0), (1.0, 0.5, 0.0, 0.0)
    for value, expected in ((1, 1.0), schedule, ([0.0, 0.0, 0.0, 2.0], (0.0, 0.0, 0.0, 2.0))):
        experiment_file.sample.guidance = value
        read = config.read(experiment_file)
        assert read.sample.guidance == expected
        assert config.read(json.loads(json.dumps(read.raw))) == read
        hash(read)


def test_a_scale_that_vanishes_with_t_min_is_refused():
    values = changed(**{"trajectory.t_min_range": (0.0, 0.04)})
    assert "config.trajectory.t_min_range starts at 0.0" in refusal(values)
    values["model"]["head"] = "direct"
    assert config.read(values).trajectory.t_min_range == (0.0, 0.04)


def test_the_range_of_t_min_ends_below_the_first_shifted_level():
    # s_1 = 1 / (1 + (T - 1) e^-m): 1/16 for m = 0, T = 16
    values = changed(**{"trajectory.schedule": "shifted", "trajectory.shift": 0.0,
                        "trajectory.steps": (4, 16)})
    config.read(values)
    values["trajectory"]["t_min_range"] = (0.02, 0.065)
    message = refusal(values)
    assert "config.trajectory.t_min_range ends at 0.065" in message
    assert "0.0625 of 16 steps" in message
    values["trajectory"]["t_min_range"] = (0.02, 0.06)
    config.read(values)
    values["trajectory"]["t_min"] = 0.07
    assert "does not lie above config.trajectory.t_min, 0.07" in refusal(values)


def test_the_steps_of_an_ode_have_levels_of_their_own():
    config.read(changed(**{"sample.steps": 64, "sample.decoder": "euler"}))


def test_levels_that_float32_does_not_tell_apart_are_refused():
    """At a shift of 14 the scale C of the last of 4 steps was 1.1, above 1; at 17 it was NaN."""
    values = changed(**{"trajectory.schedule": "shifted", "trajectory.shift": 14.0})
    message = refusal(values)
    assert "config.trajectory.steps is 4: the last of so many steps goes up to level 1" in message
    assert "by 2.8e-07, too little for float32; take fewer steps, or train with a lower" in message
    values["trajectory"]["shift"] = 10.0
    config.read(values)
    values["sample"]["steps"] = 16
    assert "config.sample.steps is 16: the last of so many steps" in refusal(values)


def test_features_that_a_velocity_does_not_see_are_refused():
    values = changed(**{"model.condition": "vector", "model.condition_layers": 1})
    config.read(values)
    values["model"]["head"] = "posterior"
    assert "config.model.condition_layers compute features, which the velocity" in refusal(values)


def test_the_shift_may_have_any_sign():
    shifted = tiny_config(**{"trajectory.schedule": "shifted", "trajectory.shift": -0.8})
    assert shifted.trajectory.shift == -0.8
