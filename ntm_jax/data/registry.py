"""Tables of parts that a configuration names, open to a user's own code.

No jax is imported: grain's worker processes run this.
"""

import re
from collections.abc import Callable

from ntm_jax.errors import UserError, shown


class Registry:
    """A table from names to functions that open a part.

    Args:
      what: what errors call a part, such as "data.source".
      entries: {usage: open function}. A usage is how errors list the part: `digits` takes no
        argument, `folder:PATH` requires one, and `minilm[:M]` accepts one. An open function's first
        argument is the text after the colon, '' if there is none.
    """

    def __init__(self, what: str, entries: dict[str, Callable]):
        self._what = what
        self._entries = {_name(usage): (usage, function) for usage, function in entries.items()}

    def register(self, name: str, open_function: Callable) -> None:
        """Adds a part that opens as `name` or `name:ARGUMENT`.

        Raises UserError if the name is taken or not valid.
        """
        if not isinstance(name, str) or not name or _name(name) != name:
            raise UserError(
                f"{self._what} cannot be registered as {shown(name)}: expected letters, digits, _, "
                "- and ."
            )
        if name in self._entries:
            raise UserError(
                f"{self._what} {name!r} is registered already: register yours under another name"
            )
        self._entries[name] = (f"{name}[:ARGUMENT]", open_function)

    def find(self, given: str) -> tuple[Callable, str]:
        """The open function and the argument of `given`, which is `name` or `name:ARGUMENT`.

        Raises UserError, listing all parts, if there is none of this name.
        """
        name, colon, argument = given.partition(":")
        usage, function = self._entries.get(name, ("", None))
        required, optional = ":" in usage, "[:" in usage
        if function is None or not (optional or (bool(argument) if required else not colon)):
            known = ", ".join(usage for usage, _ in self._entries.values())
            raise UserError(
                f"{self._what} {shown(given)} is not known: expected one of {known}; one of your "
                "own needs --import=MODULE, the module that registers it"
            )
        return function, argument


def _name(usage: str) -> str:
    """The name that a usage begins with: `folder` in `folder:PATH`, `minilm` in `minilm[:M]`."""
    match = re.match(r"[\w.-]*", usage)
    assert match  # of no characters at least
    return match[0]
