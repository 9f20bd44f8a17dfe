"""Declares settings as fields of dataclasses, and reads dataclasses from JSON or a ConfigDict."""

import collections.abc
import dataclasses
import math
import types
import typing
from collections.abc import Iterator
from typing import Any

from ntm_jax.errors import UserError, abbreviate


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a setting means, in one sentence, and the values that it takes."""

    meaning: str
    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()

    @property
    def expected(self) -> str:
        """The values that it takes, such as "at least 0 and less than 1"; '' for any."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        bounds = (("at least", self.low), ("more than", self.above),
                  ("at most", self.high), ("less than", self.below))
        return " and ".join(f"{words} {bound}" for words, bound in bounds if bound is not None)

    @property
    def documentation(self) -> str:
        """The meaning and the values that it takes, as sentences."""
        expected = self.expected
        return f"{self.meaning} {expected[0].upper()}{expected[1:]}." if expected else self.meaning

    def allows(self, value) -> bool:
        """Whether a value of the right type, or each element of a tuple, is one that it takes."""
        if isinstance(value, tuple):
            return all(map(self.allows, value))
        if self.choices:
            return value in self.choices
        return value is None or not (
            (self.low is not None and value < self.low)
            or (self.high is not None and value > self.high)
            or (self.above is not None and value <= self.above)
            or (self.below is not None and value >= self.below))


def setting(default, meaning: str, compare: bool = True, **values) -> Any:
    """A dataclass field that is a setting: its default, its meaning and the values that it takes.

        width: int = setting(128, "Width of the predictor.", low=1)

    values: `low` and `high`, inclusive bounds of a number; `above` and `below`, exclusive ones; or
    `choices` of a text. They hold for each element of a tuple. compare: as of dataclasses.field.
    """
    metadata = {"setting": Setting(meaning, **values)}
    return dataclasses.field(default=default, compare=compare, metadata=metadata)


def settings(cls, prefix: str = "") -> Iterator[tuple[str, Any, dataclasses.Field]]:
    """(section.key, type, field) of each setting of a dataclass and of those that it holds."""
    kinds = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind = kinds[field.name]
        if dataclasses.is_dataclass(kind):
            yield from settings(kind, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", kind, field


def parse_dataclass(cls, values, name: str) -> Any:
    """A dataclass `cls` from a dict of its fields.

    Args:
      values: fields without a default are required; nested dataclasses are dicts, tuples are lists.
      name: what errors call the dict, such as config or config.data.
    Raises:
      UserError: a key that is unknown or missing, a value of another type, a number that is not
        finite, a value that its setting does not take.
    """
    if not isinstance(values, collections.abc.Mapping):
        raise UserError(f"{name} is {abbreviate(values)}: expected a section")
    kinds = typing.get_type_hints(cls)
    unknown = next((key for key in values if key not in kinds), None)
    if unknown is not None:
        raise UserError(
            f"{name}.{abbreviate(unknown, str)} is not a setting; expected one of "
            f"{', '.join(kinds)}")
    given = {}
    for field in dataclasses.fields(cls):
        full = f"{name}.{field.name}"
        if field.name in values:
            value = _value(kinds[field.name], values[field.name], full)
            declared = field.metadata.get("setting")
            if declared and not declared.allows(value):
                raise UserError(f"{full} is {abbreviate(value)}: expected {declared.expected}")
            given[field.name] = value
        elif dataclasses.MISSING is field.default is field.default_factory:
            raise UserError(f"{full} is missing: give it")
    return cls(**given)


def _value(kind, value, name: str):
    if dataclasses.is_dataclass(kind):
        return parse_dataclass(kind, value, name)
    if kind is Any:
        return value
    origin = typing.get_origin(kind)
    if origin is tuple:
        element, *rest = typing.get_args(kind)
        if not isinstance(value, (tuple, list)) or (rest != [...] and len(value) != 1 + len(rest)):
            length = "" if rest == [...] else f", {1 + len(rest)} long"
            raise UserError(
                f"{name} is {abbreviate(value)}: expected a tuple of {element.__name__}{length}")
        return tuple(_value(element, v, name) for v in value)
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (origin or kind,)
    several = next((option for option in options if typing.get_origin(option) is tuple), None)
    if several and isinstance(value, (tuple, list)):
        return _value(several, value, name)
    accepted = tuple(option for option in options if option is not several)
    is_bool = isinstance(value, bool)
    if float in accepted and isinstance(value, int) and not is_bool:
        value = float(value)
    if (is_bool and bool not in accepted) or not isinstance(value, accepted):
        expected = kind if isinstance(kind, types.UnionType) else accepted[0].__name__
        raise UserError(
            f"{name} is {abbreviate(value)}, of type {type(value).__name__}: expected {expected}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name} is {value}: expected a finite number")
    return value
