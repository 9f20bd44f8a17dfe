"""Declares settings as fields of dataclasses, and reads dataclasses from JSON or a ConfigDict."""

import dataclasses
import inspect
import math
import operator
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from ntm_jax.errors import UserError, abbreviate

_BOUNDS = {"low": ("at least", operator.ge), "above": ("more than", operator.gt),
           "high": ("at most", operator.le), "below": ("less than", operator.lt)}


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a setting means, in one sentence, and the values that it takes."""

    meaning: str
    choices: tuple[str, ...]
    bounds: dict[str, float]  # see `setting`

    @property
    def expected(self) -> str:
        """The values that it takes, such as "at least 0 and less than 1"; '' for any."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        return " and ".join(f"{words} {self.bounds[name]}" for name, (words, _) in _BOUNDS.items()
                            if name in self.bounds)

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
        return value is None or all(
            _BOUNDS[name][1](value, bound) for name, bound in self.bounds.items())


def setting(default, meaning: str, compare: bool = True, choices: tuple[str, ...] = (),
            **bounds: float) -> Any:
    """A dataclass field that is a setting: its default, its meaning and the values that it takes.

        width: int = setting(128, "Width of the predictor.", low=1)

    compare: as of dataclasses.field. choices: of a text. bounds: of a number, `low` and `high`
    inclusive, `above` and `below` exclusive. They hold for each element of a tuple.
    """
    metadata = {"setting": Setting(meaning, choices, bounds)}
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
    if not isinstance(values, Mapping):
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
    is_bool = isinstance(value, bool)
    for option in typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,):
        plain = typing.get_origin(option) or option
        if plain is tuple:
            element, *rest = typing.get_args(option)
            if isinstance(value, (tuple, list)) and (rest == [...] or len(value) == 1 + len(rest)):
                return tuple(_value(element, v, name) for v in value)
        elif plain is list and isinstance(value, list) and typing.get_args(option):
            element, = typing.get_args(option)
            return [_value(element, v, name) for v in value]
        elif plain is float:
            if isinstance(value, (int, float)) and not is_bool and math.isfinite(value):
                return float(value)
        elif isinstance(value, plain) and is_bool == (plain is bool):
            return value
    expected = "a finite number" if kind is float else inspect.formatannotation(kind)
    raise UserError(
        f"{name} is {abbreviate(value)}, of type {type(value).__name__}: expected {expected}")
