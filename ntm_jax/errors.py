"""The one exception that a user's mistake raises: the programs print its single line and exit with status 2."""


class UserError(ValueError):
    """A mistake in what the user gave. The message is one line: the thing, what was found, what was expected, how to mend it."""


def first_line(error: Exception) -> str:
    """What another library's error says first, to stand within a line of ours."""
    return (str(error) or repr(error)).splitlines()[0][:200]
