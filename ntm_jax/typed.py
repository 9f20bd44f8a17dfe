"""Reads plain values, from JSON or a ConfigDict, into dataclasses, and checks their types."""

import collections.abc
import dataclasses
import math
import types
import typing
from typing import Any

from ntm_jax.errors import UserError, shown

LARGEST = 2**63 - 1  # the largest integer that libraries outside Python represent


def read(cls, values, name: str) -> Any:
    """A dataclass `cls` from a dict of its fields.

    Args:
      values: fields without a default are required; nested dataclasses are dicts, tuples are lists.
      name: what errors call the dict, such as config or config.data.
    Raises:
      UserError: a key that is unknown or missing, a value of another type, an integer beyond
        +-LARGEST, a number that is not finite.
    """
    if not isinstance(values, collections.abc.Mapping):
        raise UserError(f"{name} is {shown(values)}: expected a section")
    kinds = typing.get_type_hints(cls)
    unknown = next((key for key in values if key not in kinds), None)
    if unknown is not None:
        raise UserError(
            f"{name}.{shown(unknown, str)} is not a setting; expected one of {', '.join(kinds)}"
        )
    for field in dataclasses.fields(cls):
        defaults = (field.default, field.default_factory)
        required = all(default is dataclasses.MISSING for default in defaults)
        if required and field.name not in values:
            raise UserError(f"{name}.{field.name} is missing: give it")
    given = {key: kind for key, kind in kinds.items() if key in values}
    return cls(**{key: _value(kind, values[key], f"{name}.{key}") for key, kind in given.items()})


def _value(kind, value, name: str):
    if dataclasses.is_dataclass(kind):
        return read(kind, value, name)
    if kind is Any:
        return value
    origin = typing.get_origin(kind)
    if origin is tuple:
        element, *rest = typing.get_args(kind)
        if not isinstance(value, (tuple, list)) or (rest != [...] and len(value) != 1 + len(rest)):
            length = "" if rest == [...] else f", {1 + len(rest)} long"
            raise UserError(
                f"{name} is {shown(value)}: expected a tuple of {_name(element)}{length}"
            )
        return tuple(_value(element, v, name) for v in value)
    if origin in (list, dict, collections.abc.Mapping):
        kind = origin
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    several = next((option for option in options if typing.get_origin(option) is tuple), None)
    if several and isinstance(value, (tuple, list)):
        return _value(several, value, name)
    accepted = tuple(option for option in options if option is not several)
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    limit = LARGEST if int in accepted else 10**300 if float in accepted else math.inf
    if is_integer and abs(value) > limit:
        raise UserError(f"{name} is {shown(value)}: expected a number of at most {LARGEST}")
    if float in accepted and is_integer:
        value = float(value)
    if (isinstance(value, bool) and bool not in accepted) or not isinstance(value, accepted):
        raise UserError(
            f"{name} is {shown(value)}, of type {type(value).__name__}: expected {_name(kind)}"
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name} is {value}: expected a finite number")
    return value


def _name(kind) -> str:
    return str(kind) if isinstance(kind, types.UnionType) else kind.__name__
