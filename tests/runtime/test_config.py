"""Configurations: the shipped experiments are read, and each mistake is one line with its key."""

import dataclasses
import json

import pytest

from ntm_jax.errors import UserError
from ntm_jax.runtime import config
from ntm_jax.training import objectives
from ntm_jax.typed import setting
from tests.common import experiment


def changed(**overrides) -> dict:
    """The digits experiment as a plain dict, so that config.read alone checks the values."""
    values = experiment().to_dict()
    for key, value in overrides.items():
        section, _, name = key.rpartition(".")
        (values[section] if section else values)[name] = value
    return values


def refusal(**overrides) -> str:
    with pytest.raises(UserError) as error:
        config.read(changed(**overrides))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", [
    ("digits", "gaussian"), ("toy2d", "moons,no-transporter"), ("mnist_fm",), ("shapes",),
    ("sbi", "slcp")])
def test_the_shipped_experiments_are_read(name):
    read = config.read(experiment(*name))
    objectives.checked(read)
    assert json.loads(json.dumps(read.raw)) == read.raw
    assert config.read(read.raw) == read
    assert hash(read) == hash(config.read(read.raw))  # a static argument of compiled functions


@dataclasses.dataclass(frozen=True)
class Own:
    """A section of a project."""

    rate: float = setting(0.5, "A rate.", above=0)


def test_a_project_declares_a_section_of_its_own(monkeypatch):
    monkeypatch.setitem(config.SECTIONS, "own", f"{__name__}:Own")
    assert config.read(changed()).own == Own()
    assert config.read(changed(own={"rate": 1})).own.rate == 1.0
    assert refusal(own={"rate": 0}) == "config.own.rate is 0.0: expected more than 0"


@pytest.mark.parametrize(("key", "value", "message"), [
    ("model.widht", 3, "config.model.widht is not a setting; expected one of width, head_size"),
    ("data", 3, "config.data is 3: expected a section"),
    ("model.width", "64", "config.model.width is '64', of type str: expected int"),
    ("optimizer.clip", float("nan"), "clip is nan, of type float: expected a finite number"),
    ("seed", 2**32, "config.seed is 4294967296: expected at least 0 and at most 4294967295"),
    ("model.head", "gaussian",
     "config.model.head is 'gaussian': expected one of direct, preconditioned, flow_matching"),
    ("model.pixel_likelihood", "uniform",
     "uniform is a plain flow's, whose config.trajectory.steps is (1,), found (4,)"),
    ("sample.steps", 64,
     "config.sample.steps is 64: level 1 of so many steps, 0.0245, is not above "
     "level 0, 0.08; take fewer steps, or train with a higher config.trajectory.shift"),
    ("trajectory.steps", (), "config.trajectory.steps is (): expected one or more step counts"),
    ("sample.guidance", (0.0, 0.5, 1.0),
     "config.sample.guidance has 3 scales, and there are 4 steps: give one scale, or 4, from pure"),
    ("model.condition", "none",
     "config.train.condition_dropout is 0.1: expected 0 where config.model.condition is none"),
    ("train.condition_dropout", 0.0, "set config.train.condition_dropout to 0.1"),
    ("sample.decoder", "denoiser", "config.sample.decoder=denoiser needs a learned denoiser"),
])
def test_a_mistake_is_one_line_that_names_the_key(key, value, message):
    assert message in refusal(**{"sample.guidance": 1.0, key: value})


@pytest.mark.parametrize(("given", "expected"), [
    (1, 1.0), ((1, 0.5, 0, 0), (1.0, 0.5, 0.0, 0.0))])
def test_guidance_is_a_number_or_one_for_each_step(given, expected):
    read = config.read(changed(**{"sample.guidance": given}))
    assert repr(read.sample.guidance) == repr(expected)
    assert config.read(json.loads(json.dumps(read.raw))) == read


def test_a_scale_that_vanishes_with_t_min_is_refused():
    config.read(changed(**{"sample.steps": 64, "sample.decoder": "euler"}))  # levels of an ODE
    values = {"trajectory.t_min_range": (0.0, 0.04)}
    assert "config.trajectory.t_min_range starts at 0.0" in refusal(**values)
    config.read(changed(**values, **{"model.head": "direct"}))


