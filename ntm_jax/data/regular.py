"""Reads regular files of a bounded size.

Folders that others filled may hold pipes, which block, and devices, which never end. No jax is
imported: grain's worker processes run this.
"""

import os

from etils import epath

from ntm_jax.files import is_remote

LIMIT = 256 * 2**20  # bytes of the largest file, or member of a tar, that is read as an image


def is_regular(path) -> bool:
    """Whether `path` is a regular file or a symbolic link to one."""
    path = os.fspath(path)
    return epath.Path(path).is_file() if is_remote(path) else os.path.isfile(path)


def read(path, limit: int = LIMIT) -> bytes:
    """The content of a regular file of at most `limit` bytes.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: it is not a regular file, is larger than `limit`, or grew while it was read.
    """
    path = epath.Path(path)
    if not is_regular(path):
        if path.exists():
            raise ValueError("not a regular file")
        raise FileNotFoundError(f"{path} is not there")
    size = path.stat().length
    check_size(size, limit)
    with path.open("rb") as file:
        data = file.read(size + 1)
    if len(data) > size:
        raise ValueError("it grew while it was read")
    return data


def check_size(size: int, limit: int = LIMIT) -> None:
    """Raises ValueError if `size` exceeds `limit` bytes."""
    if size > limit:
        raise ValueError(f"larger than {limit // 2**20} MiB, {size} bytes")
