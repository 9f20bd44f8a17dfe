"""Prepared records: sharded ArrayRecord files under one manifest, written once, read at random.

PATH/manifest.json names the shards of every split, the number of records and the SHA-256 of each
shard's file, and the layout that all records share. A record is the bytes of a safetensors file:

    "image"    [H, W, C], uint8 pixels, or latents in float16, bfloat16 or float32
    "label"    int32, if there are classes
    "text"     [m, E] float16, the states of the record's own m <= M tokens, if there is text
    "caption"  UTF-8 bytes, if there are captions

H, W, C image height, width, channels; V pixel levels; M, E text tokens and width. No jax is
imported: grain's worker processes run this.
"""

import bisect
import contextlib
import dataclasses
import hashlib
import itertools
import os
import pathlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import ml_dtypes
import numpy as np
import safetensors.numpy
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from etils import epath

from ntm_jax import files, typed
from ntm_jax.data.text import pad_text
from ntm_jax.errors import (
    UserError,
    abbreviate,
    few,
    first_line,
    from_object_storage,
    of_storage,
)

MANIFEST = "manifest.json"
_FORMAT = 1
_DTYPES = {  # safetensors' names of the types that records hold
    "U8": np.uint8,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F32": np.float32,
    "I32": np.int32,
}
_REMEDY = (
    "copy it there again, or remove it and give the same ntm-jax prepare command, which makes it "
    "anew and keeps complete shards"
)
# For random access; without the last option a reader's opening reads a MiB.
_READ_OPTIONS = "readahead_buffer_size:0,max_parallelism:0,footer_prefetch_bytes:0"


@dataclasses.dataclass(frozen=True)
class Layout:
    """What all records of a folder share. All fields but `choices` are also those of a Source.

    image_shape: (H, W, C).
    pixel_levels: V; 0 for continuous latents. The manifest calls it levels.
    num_classes: 0 without labels.
    text_tokens, text_width: M and E; 0 without text.
    text: the encoder that made the text states, see data.text.
    captions: whether records hold their captions.
    mean, std: by channel; latents are read as (latent - mean) / std, or as stored if empty.
    choices: how the records were made, any JSON.
    """

    image_shape: tuple[int, int, int]
    pixel_levels: int
    num_classes: int = 0
    text_tokens: int = 0
    text_width: int = 0
    text: str = ""
    captions: bool = False
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    choices: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def check(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Raises ValueError if a record's arrays have other names, shapes or dtypes."""
        images = ("uint8",) if self.pixel_levels else ("float16", "bfloat16", "float32")
        expected: dict[str, tuple[tuple, tuple]] = {"image": (self.image_shape, images)}
        if self.num_classes:
            expected["label"] = ((), ("int32",))
        if self.text_width:
            own = min(len(arrays.get("text", ())), self.text_tokens)
            expected["text"] = ((own, self.text_width), ("float16",))
        if self.captions:
            expected["caption"] = ((len(arrays.get("caption", ())),), ("uint8",))
        if arrays.keys() != expected.keys():
            raise ValueError(
                f"it has {', '.join(sorted(arrays))}, expected {', '.join(sorted(expected))}"
            )
        for key, (shape, dtypes) in expected.items():
            found = arrays[key]
            if found.shape != shape or found.dtype.name not in dtypes:
                raise ValueError(
                    f"{key} is {list(found.shape)} {found.dtype}, expected {list(shape)} "
                    f"{' or '.join(dtypes)}"
                )


@dataclasses.dataclass
class Split:
    """A split in the manifest: its shards' files, the number of records and the SHA-256 of each.

    Manifests of earlier versions have no SHA-256.
    """

    shards: list[str] = dataclasses.field(default_factory=list)
    counts: list[int] = dataclasses.field(default_factory=list)
    sha256: list[str] = dataclasses.field(default_factory=list)


def read_manifest(path: str) -> tuple[Layout, dict[str, Split], str]:
    """The layout, the splits by name and the hash in the manifest of the folder `path`.

    Raises:
      UserError: the manifest is missing, is damaged, was edited or has another format.
    """
    file = epath.Path(path).expanduser() / MANIFEST
    if not file.exists():
        raise UserError(
            f"data.source records:{path} has no {MANIFEST}: expected a folder that "
            "ntm-jax prepare wrote"
        )
    content = files.read_json(file, _REMEDY)
    version, parts = content.pop("hash", None), content.get("splits")
    is_ours = version == files.digest(content)[:16] and content.pop("format", 0) == _FORMAT
    if not is_ours or not isinstance(parts, dict):
        raise UserError(
            f"{file} cannot be used (not of format {_FORMAT}, or edited since it was written): "
            f"{_REMEDY}"
        )
    splits = {
        name: typed.parse_dataclass(Split, split, f"{file}: splits.{name}")
        for name, split in parts.items()
    }
    counts = [count for split in splits.values() for count in split.counts]
    if any(len(split.shards) != len(split.counts) for split in splits.values()) or not all(
            0 <= count < 2**40 for count in counts):
        raise UserError(f"{file}: splits have counts {abbreviate(counts)}: expected the number of "
                        "records of each shard; prepare the records again")
    del content["splits"]
    if "levels" in content:
        content["pixel_levels"] = content.pop("levels")
    return typed.parse_dataclass(Layout, content, str(file)), splits, version


def write_manifest(path: str, layout: Layout, splits: Mapping[str, Split]) -> None:
    """Writes the manifest of splits by name, which marks the records as complete."""
    parts = {name: vars(split) for name, split in splits.items()}
    content: dict[str, Any] = {"format": _FORMAT, "splits": parts, **vars(layout)}
    content["levels"] = content.pop("pixel_levels")
    digest = files.digest(content)[:16]
    files.write_json(epath.Path(path).expanduser() / MANIFEST, content | {"hash": digest})


class Records:
    """Random access to the records of some shards.

    records[i] is {"image", "label" (int, -1 without labels), "text", "text_mask", "caption"}. The
    image is [H, W, C] uint8, or float32 for latents; with text there are text [M, E] float16, zeros
    after the record's own tokens, and text_mask [M] bool, true on these; with captions, caption is
    a str. A shard is opened by each process that reads it, when it first does, and of its bytes
    only an index and the records asked for are read, which array_record checks by their hashes.

    Args:
      path: the folder.
      layout: its layout.
      splits: those of `read_manifest` to read in turn.
    Raises:
      UserError: a shard is missing. While reading: a shard of another number of records than the
        manifest says, or a damaged record.
    """

    def __init__(self, path: str, layout: Layout, splits: Sequence[Split]):
        self._root, self._layout = epath.Path(path).expanduser(), layout
        self._shards = [shard for split in splits for shard in split.shards]
        self._counts = [count for split in splits for count in split.counts]
        self._ends = list(itertools.accumulate(self._counts))
        self._mean = np.array(layout.mean or 0, np.float32)
        self._std = np.array(layout.std or 1, np.float32)
        present = {file.name for file in self._root.iterdir()}
        missing = [shard for shard in self._shards if shard not in present]
        if missing:
            raise UserError(
                f"data.source records:{path} lacks {len(missing)} of the {len(self._shards)} "
                f"shards in its manifest ({missing[0]}): {_REMEDY}"
            )
        self._readers: dict[int, ArrayRecordReader] = {}

    def __getstate__(self):
        return vars(self) | {"_readers": {}}  # open readers stay in their process

    def __len__(self) -> int:
        return sum(self._counts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        shard = bisect.bisect_right(self._ends, index)
        position = index - self._ends[shard] + self._counts[shard]
        try:
            return self._record(shard, position)
        except Exception as error:  # the libraries raise several kinds on damaged bytes
            said = (f"record {position} of {self._root / self._shards[shard]} cannot be read "
                    f"({first_line(error)})")
            if from_object_storage(error):
                raise of_storage(error, f"{said}: the same command goes on once that is mended"
                                 ) from None
            raise UserError(f"{said}: {_REMEDY}") from None

    def _record(self, shard: int, position: int) -> dict[str, Any]:
        layout, reader = self._layout, self._readers.get(shard)
        if reader is None:  # several threads may open it at once, to no harm
            path = files.regular(self._root / self._shards[shard])
            reader = ArrayRecordReader(os.fspath(path), _READ_OPTIONS)
            found, expected = reader.num_records(), self._counts[shard]
            if found != expected:  # 0 for a file that cannot be opened or is not ArrayRecord at all
                with files.naming(path), path.open("rb") as file:
                    file.read(1)
                raise ValueError(f"the file holds {found} records, its manifest says {expected}")
            self._readers[shard] = reader
        # safetensors' numpy module does not support bfloat16.
        arrays = {
            key: np.frombuffer(part["data"], _DTYPES[part["dtype"]]).reshape(part["shape"])
            for key, part in safetensors.deserialize(reader.read([position])[0])
        }
        layout.check(arrays)
        image = arrays["image"]
        if not layout.pixel_levels:
            image = (image.astype(np.float32) - self._mean) / self._std
        record = {"image": image, "label": int(arrays.get("label", -1))}
        if layout.text_width:
            record |= pad_text(arrays["text"], layout.text_tokens)
        if layout.captions:
            record["caption"] = arrays["caption"].tobytes().decode()
        return record


def verify(path: str) -> int:
    """Compares every shard of the folder `path` with the SHA-256 in its manifest.

    Returns the number of shards. UserError, naming the shards, if some are damaged, missing,
    another's, or without SHA-256, as in manifests of earlier versions.
    """
    root, (_, splits, _) = epath.Path(path).expanduser(), read_manifest(path)
    expected = {
        shard: digest
        for split in splits.values()
        for shard, digest in itertools.zip_longest(split.shards, split.sha256)
    }
    wrong = [
        shard
        for shard, digest in expected.items()
        if not (root / shard).exists() or sha256(root / shard) != digest
    ]
    if wrong:
        raise UserError(
            f"{len(wrong)} of {len(expected)} shards of {root} are damaged, missing or another's "
            f"({few(wrong, 10)}), or the manifest has no SHA-256 of them: {_REMEDY}"
        )
    return len(expected)


def sha256(path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with files.regular(path).open("rb") as file:
        return hashlib.file_digest(cast(Any, file), "sha256").hexdigest()


def write_shard(file: epath.PathLike, examples: Iterable[Mapping[str, Any]], layout: Layout) -> int:
    """Writes one shard, which has its name only when it is complete.

    Args:
      examples: taken one at a time; dicts of "image", "label", "text" and "caption" (a str), those
        that `layout` has, with dtypes and shapes as in a record.
    Returns:
      The number of its records.
    Raises:
      UserError: the disk is full. ValueError: an example does not fit the layout.
    """
    name, count = epath.Path(file).name, 0
    # Compression would save 8% of latents, and halve the rate at which they are read.
    options = f"group_size:1{'' if layout.pixel_levels else ',uncompressed'}"
    with files.atomic_writer(file) as target, tempfile.TemporaryDirectory() as folder:
        # array_record reads object storage, but writes only to a disk.
        path = f"{folder}/shard" if files.is_remote(file) else target.name
        writer = ArrayRecordWriter(path, options)
        try:
            for example in examples:
                arrays = {key: _array(key, value) for key, value in example.items()}
                layout.check(arrays)
                with _write_errors(name):
                    writer.write(safetensors.numpy.save(arrays))
                count += 1
        finally:
            with _write_errors(name):
                writer.close()
        if files.is_remote(file):
            target.write(pathlib.Path(path).read_bytes())
    return count


def _array(key: str, value) -> np.ndarray:
    if key == "caption":
        return np.frombuffer(value.encode(), np.uint8)
    dtype = {"label": np.int32, "text": np.float16}.get(key)
    return np.asarray(value, dtype, order="C")


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
