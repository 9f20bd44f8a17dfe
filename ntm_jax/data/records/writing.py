"""Writes prepared records: shards of ArrayRecord, each under its name only when it is complete."""

import contextlib
import itertools
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import safetensors.numpy
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from ntm_jax import files
from ntm_jax.data.records.layout import MANIFEST, Layout, write_manifest
from ntm_jax.data.records.reading import sha256
from ntm_jax.errors import UserError, first_line


def write_records(
    path: str,
    splits: Mapping[str, Iterable[Mapping[str, Any]]],
    layout: Layout,
    shard_size: int = 10_000,
) -> None:
    """Writes the examples of each split, and their manifest, to the folder `path`.

    Args:
      splits: {name: examples}, taken one at a time. An example is a dict of "image", "label",
        "text" and "caption" (a str), those that `layout` has, with dtypes and shapes as in a
        record.
      shard_size: the number of records in a shard.
    Raises:
      UserError: the folder has a manifest already, an example does not fit the layout, or the disk
        is full.
    """
    root = epath.Path(path).expanduser()
    if (root / MANIFEST).exists():
        raise UserError(
            f"{root} holds prepared records already: choose another folder, or remove it"
        )
    root.mkdir(parents=True, exist_ok=True)
    written = {}
    for split, examples in splits.items():
        examples, shards, counts = iter(examples), [], []
        for first in examples:
            shards.append(f"{split}-{len(shards):05}.arrayrecord")
            shard = itertools.chain([first], itertools.islice(examples, shard_size - 1))
            counts.append(write_shard(root / shards[-1], shard, layout))
        digests = [sha256(root / shard) for shard in shards]
        written[split] = {"shards": shards, "counts": counts, "sha256": digests}
    # Written last; its presence marks the records as complete.
    write_manifest(path, layout, written)


def write_shard(file: epath.PathLike, examples: Iterable[Mapping[str, Any]], layout: Layout) -> int:
    """Writes one shard and returns the number of its records. UserError as `write_records`."""
    name = epath.Path(file).name
    with files.atomic_writer(file) as target:
        if not files.is_remote(file):
            return _write_array_records(target.name, name, examples, layout)
        # array_record reads object storage, but writes only to a disk.
        with tempfile.TemporaryDirectory() as folder:
            count = _write_array_records(f"{folder}/shard", name, examples, layout)
            with open(f"{folder}/shard", "rb") as complete:
                shutil.copyfileobj(complete, target)
        return count


def _write_array_records(
    path: str, name: str, examples: Iterable[Mapping[str, Any]], layout: Layout
) -> int:
    """Writes examples to the file `path`, which errors call `name`, and returns their number."""
    count = 0
    # Compression would save 8% of latents, and halve the rate at which they are read.
    compression = "" if layout.pixel_levels else ",uncompressed"
    writer = ArrayRecordWriter(path, f"group_size:1{compression}")
    try:
        for example in examples:
            try:
                arrays = {key: _array(key, value) for key, value in example.items()}
                layout.check(arrays)
            except ValueError as error:
                raise UserError(f"example {count} of {name} does not fit: {error}") from None
            with _write_errors(name):
                writer.write(safetensors.numpy.save(arrays))
            count += 1
    except BaseException:
        with contextlib.suppress(RuntimeError):  # the first error counts
            writer.close()
        raise
    with _write_errors(name):
        writer.close()
    return count


@contextlib.contextmanager
def _write_errors(name: str) -> Iterator[None]:
    """Turns array_record's error, the same for every failure of the disk, into a UserError."""
    try:
        yield
    except RuntimeError as error:
        raise UserError(
            f"the shard {name} cannot be written ({first_line(error)}): free space there, raise "
            "ulimit -f or make it writable; complete shards stay, and the same command goes on"
        ) from None


def _array(key: str, value) -> np.ndarray:
    if key == "caption":
        return np.frombuffer(value.encode(), np.uint8)
    return np.asarray(value, np.int32 if key == "label" else None, order="C")
