"""Writes files so that none is ever found half-written, and reads JSON that may be damaged.

Errors of the file system stay OSErrors that name the file; the programs turn them into one line.
No jax is imported: data workers run this.
"""

import contextlib
import errno
import hashlib
import io
import json
import logging
import os
import uuid
from collections.abc import Iterator
from stat import S_ISREG
from typing import Any, BinaryIO

import fsspec.config
from etils import epath

from ntm_jax.errors import UserError, first_line, from_object_storage

PART = ".part-"  # the prefix of a file's name while it is being written
LIMIT = 256 * 2**20  # bytes of the largest file that `read` returns
SEAL = "content_sha256"  # the key of the digest of all other keys, in config.json and older files

# Otherwise gcsfs shows a folder as it first listed it for ever, without what other processes write.
fsspec.config.conf.setdefault("gcs", {}).setdefault("cache_timeout", 1)  # in seconds
for _library in ("gcsfs", "fsspec"):  # they log a page on each error that they raise
    logging.getLogger(_library).setLevel(logging.CRITICAL)


def is_remote(path) -> bool:
    """Whether a path is on object storage, such as gs://BUCKET/run, rather than on a disk."""
    return "://" in os.fspath(path)


def expanded(path) -> str:
    """A path with the home folder in place of a leading ~, which shells leave in --workdir=~/x."""
    return os.fspath(path) if is_remote(path) else os.path.expanduser(path)


def stat(path) -> tuple[int, int]:
    """The size in bytes of a regular file, and the second of its last change.

    Folders that others filled may hold pipes, which block, and devices, which never end. Raises
    UserError for these, FileNotFoundError without a file.
    """
    if is_remote(path):
        with naming(path):
            remote = epath.Path(path).stat()
        return remote.length, remote.mtime
    local = os.stat(path)  # epath would ask for the owner's name, which a container may not know
    if not S_ISREG(local.st_mode):
        raise UserError(f"{path} is not a regular file: remove it, or put the file there")
    return local.st_size, int(local.st_mtime)


def regular(path) -> epath.Path:
    """A path, for whatever opens the file there. Raises UserError for a local pipe or device."""
    with contextlib.suppress(FileNotFoundError):
        if not is_remote(path):
            stat(path)
    return epath.Path(path)


def read(path) -> bytes:
    """The content of a regular file of at most 256 MiB.

    Raises FileNotFoundError without the file, UserError if it is not regular or is larger.
    """
    check_size(stat(path)[0], path)
    with naming(path), epath.Path(path).open("rb") if is_remote(path) else open(path, "rb") as file:
        return file.read()


def check_size(size: int, name) -> None:
    """Raises UserError if `size`, in bytes, exceeds 256 MiB."""
    if size > LIMIT:
        raise UserError(f"{name} has {size} bytes: expected at most {LIMIT // 2**20} MiB")


@contextlib.contextmanager
def naming(path) -> Iterator[None]:
    """Adds the name `path` to an OSError of the block, as a failed write or flush lacks it.

    What object storage raises, of several kinds and without a number, becomes such an OSError.
    """
    try:
        yield
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        said = getattr(error, "strerror", None) or first_line(error)
        if number is None and isinstance(error, FileNotFoundError):
            number, said = errno.ENOENT, "there is no such file, or no such bucket"
        elif number is None and from_object_storage(error):
            refused = isinstance(error, OSError) or getattr(error, "code", None) == 401
            number = errno.EACCES if refused else errno.EIO
        elif number is None:
            raise
        raise OSError(number, said, os.fspath(path)) from error


@contextlib.contextmanager
def atomic_writer(path) -> Iterator[BinaryIO]:
    """Yields a binary file that becomes `path` when the block ends, and is removed if it raises.

    On a local disk the content is flushed to the disk before the rename; on object storage it is
    uploaded in one piece. Raises OSError, naming `path`.
    """
    path = epath.Path(path)
    if is_remote(path):
        buffer = io.BytesIO()
        yield buffer
        with naming(path):
            path.write_bytes(buffer.getvalue())
        return
    part = path.parent / f"{PART}{path.name[:150]}-{uuid.uuid4().hex[:12]}"
    try:
        with naming(path):
            with open(part, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(part)


def write(path, content: bytes | str) -> None:
    """Writes `content` to `path` as `atomic_writer` does."""
    with atomic_writer(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def to_json(content) -> Any:
    """A value after a round trip through JSON: tuples become lists, keys become strings."""
    return json.loads(json.dumps(content))


def digest(content) -> str:
    """SHA-256, in hexadecimal, of a JSON value, for any order of its keys."""
    return hashlib.sha256(json.dumps(to_json(content), sort_keys=True).encode()).hexdigest()


def write_json(path, content: dict) -> None:
    """Writes a JSON object."""
    write(path, json.dumps(content, indent=2) + "\n")


def parse_object(text: bytes | str) -> dict:
    """The JSON object in a text. Raises ValueError, in one line, for anything else."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, nested too deeply
        raise ValueError(f"it is not JSON: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    return content


def read_json(path, remedy: str) -> dict:
    """The JSON object in an existing file, without its checksum.

    Raises UserError if it cannot be read or parsed, or does not match its checksum. The line names
    the file; where the content is damaged it ends with `remedy`.
    """
    text = read(path)
    try:
        content = parse_object(text)
        seal = content.pop(SEAL, None)
        if seal is not None and seal != digest(content):
            raise ValueError("it was damaged or edited: its content does not match its checksum")
        return content
    except ValueError as error:
        raise UserError(f"{path} cannot be used ({error}): {remedy}") from None


def read_lines(path) -> list[dict]:
    """The objects in a file with one JSON object on each line; [] if there is no file.

    Lines that are damaged or cut short are left out.
    """
    path, found = regular(path), []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            found.append(parse_object(line))
    return found
