"""The one exception that a user's mistake raises: the programs print its single line and exit with status 2."""


class UserError(ValueError):
    """A mistake in what the user gave. The message is one line: the thing, what was found, what was expected, how to mend it."""


def first_line(error: Exception) -> str:
    """What another library's error says first, to stand within a line of ours."""
    return (str(error) or repr(error)).splitlines()[0][:200]


def shown(value, show=repr) -> str:
    """A value to stand within a line of an error: its repr, or another text of it, cut to 80 characters that can be printed."""
    try:
        text = show(value)
    except ValueError:  # an integer of thousands of digits
        return "a number of thousands of digits"
    text = text if len(text) <= 80 else f"{text[:77]}..."
    return text if text.isprintable() else text.encode("unicode_escape").decode()
