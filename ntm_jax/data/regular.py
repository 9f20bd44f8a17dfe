"""Reads regular files of a bounded size.

Folders that others filled may hold pipes, which block, and devices, which never end. No jax is
imported: grain's worker processes run this.
"""

import os

from etils import epath

from ntm_jax.files import is_remote

LIMIT = 256 * 2**20  # bytes of the largest file, or member of a tar, that is read as an image


def read(path) -> bytes:
    """The content of a regular file of at most LIMIT bytes.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: it is not a regular file, or is larger.
    """
    path = epath.Path(path)
    if path.exists() and not is_remote(path) and not os.path.isfile(path):  # epath takes a pipe
        raise ValueError("not a regular file")
    check_size(path.stat().length)
    return path.read_bytes()


def check_size(size: int) -> None:
    """Raises ValueError if `size` exceeds LIMIT bytes."""
    if size > LIMIT:
        raise ValueError(f"larger than {LIMIT // 2**20} MiB, {size} bytes")
