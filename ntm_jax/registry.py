"""Tables of parts that a configuration names, open to a user's own code.

No jax is imported: grain's worker processes run this.
"""

import importlib
import importlib.util
from collections.abc import Mapping
from typing import Any, Generic, TypeVar, cast

from ntm_jax.errors import UserError, abbreviate

Part = TypeVar("Part")


def present(place: str) -> bool:
    """Whether this copy of the package has the module of MODULE:NAME; imports its folders alone."""
    try:
        return importlib.util.find_spec(place.split(":")[0]) is not None
    except ModuleNotFoundError:
        return False


def absent(place: str) -> str:
    """The line for a module of MODULE:NAME that is not there."""
    return f"this copy of ntm_jax has no {place.split(':')[0]}: install the whole package"


def load(place: str) -> Any:
    """The object at MODULE:NAME, a part of ours that is imported when it is first asked for.

    Raises UserError where this copy of the package was made without the module.
    """
    module, name = place.split(":")
    if not present(place):
        raise UserError(absent(place))
    return getattr(importlib.import_module(module), name)


class Registry(Generic[Part]):
    """A table from names to parts.

    Args:
      what: what errors call a part, such as "data.source".
      entries: {usage: part}. A usage is how errors list the part: `digits` takes no argument,
        `folder:PATH` requires one, and `minilm[:M]` accepts one. A part of ours may be given as
        "module:attribute", which is imported when it is first asked for.
    """

    def __init__(self, what: str, entries: Mapping[str, Part | str]):
        self._what = what
        self._entries = {usage.partition(":")[0].rstrip("["): (usage, part)
                         for usage, part in entries.items()}

    def register(self, name: str, part: Part, argument: str = "") -> None:
        """Adds a part; argument: the end of its usage, such as "[:ARGUMENT]", if it accepts one.

        Raises UserError if the name is taken.
        """
        if name in self._entries:
            raise UserError(
                f"{self._what} {name!r} is registered already: register yours under another name"
            )
        self._entries[name] = (name + argument, part)

    @property
    def names(self) -> list[str]:
        """The names of all parts, in the order of their registration."""
        return list(self._entries)

    def find(self, given: str) -> tuple[Part, str]:
        """The part that `given` names, and the text after its colon, '' if there is none.

        Raises UserError, listing all parts, if there is none of this name.
        """
        name, colon, argument = str(given).partition(":")
        found = self._entries.get(name)
        if found:
            usage, part = found
            required, optional = ":" in usage, "[:" in usage
            if optional or (bool(argument) if required else not colon):
                return (load(part) if isinstance(part, str) else cast(Part, part)), argument
        known = ", ".join(usage for usage, _ in self._entries.values())
        raise UserError(
            f"{self._what} {abbreviate(given)} is not known: expected one of {known}; for one of "
            "your own, import the module that registers it, or give --import=MODULE"
        )
