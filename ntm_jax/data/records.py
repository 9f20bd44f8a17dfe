"""Prepared records: sharded ArrayRecord files under one manifest, written once and read at random.

PATH/manifest.json names every split's shards, how many records each holds, the SHA-256 of each one's file, and the layout that all records
share. A record is the bytes of a safetensors file: "image" [H, W, C], uint8 pixels or latents in float16, bfloat16 or float32; "label", an
int32, where there are classes; "text" [m, E] float16, the states of its own m <= M tokens, where there is text; "caption", UTF-8 bytes,
where there are captions.

H, W, C image height, width, channels; V pixel levels; M, E text tokens and width. No jax is imported: grain's worker processes run this.
"""

import bisect
import contextlib
import dataclasses
import hashlib
import itertools
import os
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from etils import epath

from ntm_jax import files, typed
from ntm_jax.data import regular
from ntm_jax.errors import UserError, first_line

MANIFEST = "manifest.json"
_AGAIN = ("copy it there again, or prepare the records again: the same launch/prepare.py command makes only what is missing or not as "
          "the manifest says")
_FORMAT = 1
_TYPES = {"U8": np.uint8, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F32": np.float32, "I32": np.int32}


@dataclasses.dataclass(frozen=True)
class Layout:
    """What all records of a folder share; each field is a key of the manifest. ValueError if they contradict each other.

    levels: V, 0 for continuous latents, which are read as (latent - mean) / std by channel where these are given.
    num_classes: 0 without labels. text_tokens, text_width: M and E, 0 without text. text: the encoder that made the states, see data.text.
    captions: whether records hold their captions. choices: how they were made, anything JSON.
    """

    image_shape: tuple[int, int, int]
    levels: int
    num_classes: int = 0
    text_tokens: int = 0
    text_width: int = 0
    text: str = ""
    captions: bool = False
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    choices: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for key in ("image_shape", "mean", "std"):
            object.__setattr__(self, key, tuple(getattr(self, key)))
        if len(self.image_shape) != 3 or self.levels == 1 or not 0 <= self.levels <= 256:
            raise ValueError(f"image_shape {self.image_shape} and levels {self.levels}, expected three sizes and 0 or 2 to 256 levels")
        if min(*self.image_shape, self.num_classes + 1, self.text_tokens + 1, self.text_width + 1) < 1:
            raise ValueError(f"image_shape {self.image_shape}, num_classes {self.num_classes}, text_tokens {self.text_tokens}, text_width "
                             f"{self.text_width}, expected positive sizes and no negative numbers")
        channels = self.image_shape[-1] if self.mean or self.std else 0
        if not len(self.mean) == len(self.std) == channels or min(self.std, default=1) <= 0 or (self.levels and self.mean):
            raise ValueError(f"mean {self.mean} and std {self.std}, expected a number and a positive one for each channel of latents")

    def fault(self, arrays: Mapping[str, np.ndarray]) -> str | None:
        """What is wrong with a record's arrays, if anything is."""
        expected = {"image": (self.image_shape, ("U8",) if self.levels else ("F16", "BF16", "F32"))}
        if self.num_classes:
            expected["label"] = ((), ("I32",))
        if self.text_width:
            tokens = arrays["text"].size // self.text_width if "text" in arrays else 0
            expected["text"] = ((min(tokens, self.text_tokens), self.text_width), ("F16",))
        if self.captions:
            expected["caption"] = (arrays["caption"].shape if "caption" in arrays else (), ("U8",))
        if arrays.keys() != expected.keys():
            return f"has {', '.join(sorted(arrays))}, expected {', '.join(sorted(expected))}"
        for key, (shape, types) in expected.items():
            if arrays[key].shape != shape or all(arrays[key].dtype != _TYPES[name] for name in types):
                wanted = " or ".join(_TYPES[name].__name__ for name in types)
                return f"{key} is {list(arrays[key].shape)} {arrays[key].dtype}, expected {list(shape)} {wanted}"
        if 0 < self.levels < 256 and arrays["image"].max() >= self.levels:
            return f"image has a pixel of {arrays['image'].max()}, expected 0 to {self.levels - 1}"
        if self.num_classes and not 0 <= arrays["label"] < self.num_classes:
            return f"label is {arrays['label']}, expected 0 to {self.num_classes - 1}"
        return None


# Reading.


@dataclasses.dataclass(frozen=True)
class _Split:
    """A split as the manifest has it: its shards' files in turn, the records of each, and, but in old manifests, the SHA-256 of each."""

    shards: tuple[str, ...]
    counts: tuple[int, ...]
    sha256: tuple[str, ...] = ()

    def __post_init__(self):
        if len(self.counts) != len(self.shards) or len(self.sha256) not in (0, len(self.shards)) or min(self.counts, default=0) < 0:
            raise ValueError("a split's shards, counts and sha256 are not of one length, or a count is negative")
        for name in self.shards:
            if name in ("", ".", "..") or "/" in name or "\\" in name or not name.isprintable():
                raise ValueError(f"the shard {name!r} is not a name of a file in the folder")


def read_manifest(path: str) -> tuple[Layout, dict[str, dict[str, list]], str]:
    """The layout, the splits {name: {"shards": [file, ...], "counts": [n, ...], "sha256": [hexadecimal, ...]}} and the hash of the records
    in the folder `path`. Manifests written before shards were hashed have no "sha256".

    Raises:
      UserError: no folder or manifest there, or one that is damaged, of another format, or not as it was written.
    """
    file = epath.Path(path).expanduser() / MANIFEST
    if not file.exists():
        what = f"has no {MANIFEST}" if file.parent.is_dir() else "is not there"
        raise UserError(f"data.source records:{path} {what}: expected a folder that launch/prepare.py wrote")
    try:
        content = files.parse_json(regular.read(file))
        written = content.pop("hash")
        if written != _hash(content) or content.pop("format") != _FORMAT:
            raise ValueError(f"not of format {_FORMAT}, or edited since it was written")
        splits = content.pop("splits")
        for name, split in _mapping(splits).items():
            typed.read(_Split, split, f"splits.{name}")
        return typed.read(Layout, content, "layout"), splits, written
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise UserError(f"manifest {file} is not understood ({reason}): copy it there again, or prepare the records again; the same "
                        "launch/prepare.py command keeps the shards that are whole") from error


def _mapping(splits) -> dict:
    if not isinstance(splits, dict) or not all(name.isprintable() for name in splits):
        raise ValueError("splits is not a section of splits by name")
    return splits


class Records:
    """Random access to the records of some shards: records[i] -> {"image", "label" (int, -1: none), "text", "text_mask", "caption"}.

    The image is [H, W, C] uint8, or float32 for latents; with text there are text [M, E] float16, zeros after the record's own tokens,
    and text_mask [M] bool, true on these; with captions a str. A shard is opened when it is first read, by whichever process reads it, and
    that process first compares the SHA-256 of its file, once, with the manifest's: about a second for each GB.

    Args:
      path, layout, parts: the folder, its layout, and the values of `read_manifest`'s splits to read in turn.
    Raises:
      UserError: a shard is missing. While reading: a shard that is not the file that the manifest means, or a record that is damaged.
    """

    def __init__(self, path: str, layout: Layout, parts: Sequence[Mapping[str, list]]):
        self._root, self._layout = epath.Path(path).expanduser(), layout
        self._shards, self._counts = ([entry for part in parts for entry in part[key]] for key in ("shards", "counts"))
        self._sha256 = [entry for part in parts for entry in part.get("sha256") or [None] * len(part["shards"])]
        self._ends = list(itertools.accumulate(self._counts))
        self._mean, self._std = np.array(layout.mean or 0, np.float32), np.array(layout.std or 1, np.float32)
        present = {file.name for file in self._root.iterdir()}
        missing = [shard for shard in self._shards if shard not in present]
        if missing:
            lacks = f"lacks {len(missing)} of the {len(self._shards)} shards in its manifest ({missing[0]})"
            raise UserError(f"data.source records:{path} {lacks}: {_AGAIN}")
        self.__setstate__({})

    def __getstate__(self):  # open readers stay behind
        return {key: value for key, value in vars(self).items() if key not in ("_readers", "_locks")}

    def __setstate__(self, state):
        vars(self).update(state)
        self._readers, self._locks = {}, [threading.Lock() for _ in self._shards]

    def __len__(self) -> int:
        return sum(self._counts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        shard = bisect.bisect_right(self._ends, index)
        position = index - self._ends[shard] + self._counts[shard]
        reader = self._reader(shard)
        try:
            parts = safetensors.deserialize(reader.read([position])[0])  # its numpy module knows no bfloat16
            arrays = {key: np.frombuffer(part["data"], _TYPES[part["dtype"]]).reshape(part["shape"]) for key, part in parts}
            fault = self._layout.fault(arrays)
            caption = {"caption": arrays["caption"].tobytes().decode()} if self._layout.captions and not fault else {}
        except Exception as error:  # both libraries raise several kinds on damaged bytes
            fault = f"cannot be decoded ({first_line(error)})"
        if fault:
            raise UserError(f"record {position} of {self._root / self._shards[shard]} {fault}: {_AGAIN}")
        image = arrays["image"] if self._layout.levels else (arrays["image"].astype(np.float32) - self._mean) / self._std
        text = pad_text(arrays["text"], self._layout.text_tokens) if self._layout.text_width else {}
        return {"image": image, "label": int(arrays.get("label", -1)), **text, **caption}

    def _reader(self, shard: int) -> ArrayRecordReader:
        if shard not in self._readers:
            with self._locks[shard]:  # of several threads, one hashes the file
                if shard not in self._readers:
                    self._readers[shard] = self._open(shard)
        return self._readers[shard]

    def _open(self, shard: int) -> ArrayRecordReader:
        path, expected = os.fspath(self._root / self._shards[shard]), self._counts[shard]
        if not regular.is_regular(path):
            raise UserError(f"shard {path} is not a regular file: {_AGAIN}")
        if self._sha256[shard] and _sha256_once(path) != self._sha256[shard]:
            raise UserError(f"shard {path} is damaged or another's: its SHA-256 is not that of the manifest; {_AGAIN}")
        reader = ArrayRecordReader(path, "readahead_buffer_size:0,max_parallelism:0")
        if (found := reader.num_records()) != expected:  # 0 of a file that is not ArrayRecord at all
            raise UserError(f"shard {path} holds {found} records, its manifest says {expected}: {_AGAIN}")
        return reader


def sha256(path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with epath.Path(path).open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


_hashed: dict[tuple, str] = {}  # SHA-256 of the files that this process has read, by path, size and times


def _sha256_once(path: str) -> str:
    """SHA-256 of a file, which this process computes once, and again when the file changes."""
    if "://" in path:
        stat = epath.Path(path).stat()
        key = (path, stat.length, stat.mtime)
    else:
        stat = os.stat(path)
        key = (path, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    if key not in _hashed:
        _hashed[key] = sha256(path)
    return _hashed[key]


def pad_text(text: np.ndarray, tokens: int) -> dict[str, np.ndarray]:
    """text [m, E] -> {"text": [M, E], zeros after the first m, "text_mask": [M] bool, true on these}, M = `tokens`."""
    return {"text": np.pad(text, ((0, tokens - len(text)), (0, 0))), "text_mask": np.arange(tokens) < len(text)}


# Writing.


def write_records(path: str, splits: Mapping[str, Iterable[Mapping[str, Any]]], layout: Layout, shard_size: int = 10_000) -> None:
    """Writes `splits` of examples {"image", "label", "text", "caption" (a str)}, as they lie in a record, and their
    manifest to the folder `path`.

    Examples are taken one at a time. Every file gets its name when it is whole, the manifest last.

    Raises:
      UserError: there is a manifest already, or an example does not fit the layout.
    """
    root = epath.Path(path).expanduser()
    if (root / MANIFEST).exists():
        raise UserError(f"{root} holds prepared records already: choose another folder, or remove it")
    root.mkdir(parents=True, exist_ok=True)
    written = {}
    for split, examples in splits.items():
        examples, shards, counts = iter(examples), [], []
        for first in examples:
            shards.append(f"{split}-{len(shards):05}.arrayrecord")
            shard = itertools.chain([first], itertools.islice(examples, shard_size - 1))
            counts.append(write_shard(root / shards[-1], shard, layout))
        written[split] = {"shards": shards, "counts": counts, "sha256": [sha256(root / shard) for shard in shards]}
    write_manifest(path, layout, written)


def write_shard(file: epath.PathLike, examples: Iterable[Mapping[str, Any]], layout: Layout) -> int:
    """Writes one shard, under its name only when it is whole -> the number of its records. UserError as `write_records`."""
    with files.aside(file) as target:
        if "://" not in os.fspath(file):
            return _write_array_records(target.name, epath.Path(file).name, examples, layout)
        with tempfile.TemporaryDirectory() as folder:  # array_record reads object storage, but writes only to a disk
            count = _write_array_records(f"{folder}/shard", epath.Path(file).name, examples, layout)
            with open(f"{folder}/shard", "rb") as whole:
                shutil.copyfileobj(whole, target)
        return count


def _write_array_records(path: str, name: str, examples: Iterable[Mapping[str, Any]], layout: Layout) -> int:
    """Writes examples to a file, which errors call `name` -> their number. UserError where an example does not fit the layout, or the disk
    takes no more."""
    count = 0
    # Compression saves 8% of latents, and halves the rate at which they are read.
    writer = ArrayRecordWriter(path, "group_size:1" + ("" if layout.levels else ",uncompressed"))
    try:
        for example in examples:
            arrays, fault = _arrays(example, layout)
            if fault:
                raise UserError(f"example {count} of {name} {fault}")
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
    try:
        yield
    except RuntimeError as error:  # array_record's, for any failure of the disk
        raise UserError(f"the shard {name} cannot be written ({first_line(error)}): free space there, raise ulimit -f or make it writable; "
                        "the shards that are whole stay, and the same command goes on") from None


def _arrays(example: Mapping[str, Any], layout: Layout) -> tuple[dict[str, np.ndarray], str | None]:
    """The arrays of an example, and what is wrong with them, if anything is."""
    try:
        arrays = {key: _array(key, value) for key, value in example.items()}
    except UnicodeEncodeError:
        return {}, "has a caption that UTF-8 cannot hold"
    return arrays, layout.fault(arrays)


def _array(key: str, value) -> np.ndarray:
    if key == "caption":
        return np.frombuffer(value.encode(), np.uint8)
    return np.asarray(value, np.int32 if key == "label" else None, order="C")


def write_manifest(path: str, layout: Layout, splits: Mapping[str, Mapping[str, list]]) -> None:
    """Writes the manifest of `splits` as of `read_manifest`, whose shards must be there already."""
    content = files.plain({"format": _FORMAT, "splits": splits, **dataclasses.asdict(layout)})
    files.write_json(epath.Path(path).expanduser() / MANIFEST, content | {"hash": _hash(content)})


def _hash(content: Mapping[str, Any]) -> str:
    """The first 16 digits of a JSON value's SHA-256."""
    return files.digest(content)[:16]
