"""UserError for a user's mistake, and MachineFault for what a restart may mend.

The programs print the single line of either, and exit with status 2 or 75.
"""

import errno
import numbers
import os
from collections.abc import Sequence

import numpy as np


class UserError(ValueError):
    """A mistake of the user: a flag, a setting, an argument, a file.

    The message is one line: the thing, what was found, what was expected, and how to mend it.
    """


class MachineFault(Exception):
    """A fault of the machines that a restart may mend, such as a failed write to a bucket.

    The message is one line: what failed, and what is intact.
    """


# What a restart does not mend: full or read-only storage, and missing permissions.
_LASTING = (*map(os.strerror, (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM,
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.EMFILE)),
    "PERMISSION_DENIED", "UNAUTHENTICATED", "HTTP response code: 403", "HTTP response code: 401",
    "Forbidden: ", "Permanent error, with a last message")
# What says that object storage does not answer or refuses: libraries, and texts of others.
_LIBRARIES = "gcsfs", "aiohttp", "google", "requests", "fsspec", "s3fs", "botocore"
_ANSWERS = ("Forbidden: ", "UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED",
            "PERMISSION_DENIED", "UNAUTHENTICATED", "HTTP response code: ",
            "Permanent error, with a last message", "Retry policy exhausted")  # array_record's


def from_object_storage(error: BaseException) -> bool:
    """Whether an error, or its cause, says that object storage did not answer or refused.

    Then the file that was read may well be there and undamaged.
    """
    if type(error).__name__ == "JaxRuntimeError":  # of a device, whose memory may be exhausted
        return False
    return any(type(one).__module__.partition(".")[0] in _LIBRARIES
               or any(text in str(one) for text in _ANSWERS) for one in (error, error.__cause__))


def of_storage(error: Exception, line: str) -> UserError | MachineFault:
    """The exception, with a line, for an error of a file system or of object storage."""
    lasting = isinstance(error, PermissionError | FileNotFoundError) or any(
        text in str(error) for text in _LASTING)
    return UserError(line) if lasting else MachineFault(line)


def check_count(name: str, count: int) -> None:
    """Raises UserError for a number of things that is not a whole number, or below 1."""
    if not isinstance(count, numbers.Integral) or count < 1:
        raise UserError(f"{name} is {abbreviate(count)}: expected a whole number, 1 or more")


def as_array(name: str, values, expected: str) -> np.ndarray:
    """Values as a NumPy array. Raises UserError for what is none, such as rows of two lengths."""
    try:
        return np.asarray(values)
    except (TypeError, ValueError):
        raise UserError(f"{name} is {abbreviate(values)}: expected {expected}") from None


def first_line(error: Exception) -> str:
    """The first line of another library's error, at most 200 characters, to quote in a message."""
    return (str(error) or repr(error)).splitlines()[0][:200]


def abbreviate(value, show=repr) -> str:
    """The text `show(value)` cut to 80 printable characters, to quote in a message."""
    text = show(value)
    text = text if len(text) <= 80 else f"{text[:77]}..."
    return text if text.isprintable() else text.encode("unicode_escape").decode()


def few(names: Sequence[str], most: int) -> str:
    """The first `most` of some names, separated by commas, to quote in a message."""
    listed = ", ".join(abbreviate(name, str) for name in names[:most])
    return listed + (", ..." if len(names) > most else "")
