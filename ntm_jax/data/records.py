"""Prepared records: sharded ArrayRecord files under one manifest, written once and read at random.

PATH/manifest.json names every split's shards, how many records each holds, and the layout that all records share. A record is the bytes
of a safetensors file: "image" [H, W, C], uint8 pixels or latents in float16, bfloat16 or float32; "label", an int32, where there are
classes; "text" [m, E] float16, the states of its own m <= M tokens, where there is text; "caption", UTF-8 bytes, where there are captions.

H, W, C image height, width, channels; V pixel levels; M, E text tokens and width. No jax is imported: grain's worker processes run this.
"""

import bisect
import dataclasses
import hashlib
import itertools
import json
import os
import tempfile
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from etils import epath

from ntm_jax.errors import UserError, first_line

MANIFEST = "manifest.json"
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


def read_manifest(path: str) -> tuple[Layout, dict[str, dict[str, list]], str]:
    """The layout, the splits {name: {"shards": [file, ...], "counts": [n, ...]}} and the hash of the records in the folder `path`.

    Raises:
      UserError: no folder or manifest there, or one that is damaged, of another format, or not as it was written.
    """
    file = epath.Path(path).expanduser() / MANIFEST
    if not file.exists():
        what = f"has no {MANIFEST}" if file.parent.is_dir() else "is not there"
        raise UserError(f"data.source records:{path} {what}: expected a folder that launch/prepare.py wrote")
    try:
        content = json.loads(file.read_text())
        written = content.pop("hash")
        if written != _hash(content) or content.pop("format") != _FORMAT:
            raise ValueError(f"not of format {_FORMAT}, or edited since it was written")
        splits = content.pop("splits")
        return Layout(**content), splits, written
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise UserError(f"manifest {file} is not understood ({reason}): prepare the records again") from error


class Records:
    """Random access to the records of some shards: records[i] -> {"image", "label" (int, -1: none), "text", "text_mask", "caption"}.

    The image is [H, W, C] uint8, or float32 for latents; with text there are text [M, E] float16, zeros after the record's own tokens,
    and text_mask [M] bool, true on these; with captions a str. A shard is opened when it is first read, by whichever process reads it.

    Args:
      path, layout, parts: the folder, its layout, and the values of `read_manifest`'s splits to read in turn.
    Raises:
      UserError: a shard is missing. While reading: a shard or record that is damaged or not as the manifest says.
    """

    def __init__(self, path: str, layout: Layout, parts: Sequence[Mapping[str, list]]):
        self._root, self._layout = epath.Path(path).expanduser(), layout
        self._shards, self._counts = ([entry for part in parts for entry in part[key]] for key in ("shards", "counts"))
        self._ends = list(itertools.accumulate(self._counts))
        self._mean, self._std = np.array(layout.mean or 0, np.float32), np.array(layout.std or 1, np.float32)
        self._readers = {}
        present = {file.name for file in self._root.iterdir()}
        missing = [shard for shard in self._shards if shard not in present]
        if missing:
            lacks = f"lacks {len(missing)} of the {len(self._shards)} shards in its manifest ({missing[0]})"
            raise UserError(f"data.source records:{path} {lacks}: copy them there, or prepare the records again")

    def __getstate__(self):  # open readers stay behind
        return vars(self) | {"_readers": {}}

    def __len__(self) -> int:
        return sum(self._counts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        shard = bisect.bisect_right(self._ends, index)
        position = index - self._ends[shard] + self._counts[shard]
        reader = self._readers.get(shard) or self._readers.setdefault(shard, self._open(shard))
        try:
            parts = safetensors.deserialize(reader.read([position])[0])  # its numpy module knows no bfloat16
            arrays = {key: np.frombuffer(part["data"], _TYPES[part["dtype"]]).reshape(part["shape"]) for key, part in parts}
            fault = self._layout.fault(arrays)
        except Exception as error:  # both libraries raise several kinds on damaged bytes
            fault = f"cannot be decoded ({first_line(error)})"
        if fault:
            raise UserError(f"record {position} of {self._root / self._shards[shard]} {fault}: prepare this shard again")
        image = arrays["image"] if self._layout.levels else (arrays["image"].astype(np.float32) - self._mean) / self._std
        text = pad_text(arrays["text"], self._layout.text_tokens) if self._layout.text_width else {}
        caption = {"caption": arrays["caption"].tobytes().decode()} if self._layout.captions else {}
        return {"image": image, "label": int(arrays.get("label", -1)), **text, **caption}

    def _open(self, shard: int) -> ArrayRecordReader:
        path, expected = os.fspath(self._root / self._shards[shard]), self._counts[shard]
        reader = ArrayRecordReader(path, "readahead_buffer_size:0,max_parallelism:0")
        if (found := reader.num_records()) != expected:  # 0 of a file that is not ArrayRecord at all
            raise UserError(f"shard {path} holds {found} records, its manifest says {expected}: prepare this shard again")
        return reader


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
        written[split] = {"shards": shards, "counts": counts}
    write_manifest(path, layout, written)


def write_shard(file: epath.PathLike, examples: Iterable[Mapping[str, Any]], layout: Layout) -> int:
    """Writes one shard, under its name only when it is whole -> the number of its records. UserError as `write_records`."""
    file, count = epath.Path(file), 0
    # array_record reads object storage, but writes only to a disk: on one, next to the file, where a killed process's rest is found.
    place = None if "://" in os.fspath(file) else os.fspath(file.parent)
    with tempfile.TemporaryDirectory(prefix=".part", dir=place) as folder:
        # Compression saves 8% of latents, and halves the rate at which they are read.
        writer = ArrayRecordWriter(f"{folder}/shard", "group_size:1" + ("" if layout.levels else ",uncompressed"))
        try:
            for example in examples:
                arrays = {key: _array(key, value) for key, value in example.items()}
                if fault := layout.fault(arrays):
                    raise UserError(f"example {count} of {file.name} {fault}")
                writer.write(safetensors.numpy.save(arrays))
                count += 1
        finally:
            writer.close()
        whole = epath.Path(folder, "shard")
        (whole if place else whole.copy(_part(file))).replace(file)
    return count


def _array(key: str, value) -> np.ndarray:
    if key == "caption":
        return np.frombuffer(value.encode(), np.uint8)
    return np.asarray(value, np.int32 if key == "label" else None, order="C")


def write_manifest(path: str, layout: Layout, splits: Mapping[str, Mapping[str, list]]) -> None:
    """Writes the manifest of `splits` as of `read_manifest`, whose shards must be there already."""
    file = epath.Path(path).expanduser() / MANIFEST
    content = json.loads(json.dumps({"format": _FORMAT, "splits": splits, **dataclasses.asdict(layout)}))
    write_json(file, content | {"hash": _hash(content)})


def write_json(file: epath.Path, content: Mapping[str, Any]) -> None:
    """Writes a file of JSON, whole or not at all."""
    part = _part(file)
    part.write_text(json.dumps(content, indent=2) + "\n")
    part.replace(file)


def _part(file: epath.Path) -> epath.Path:
    """Where a file is written before it is whole: what a killed process leaves there begins with .part."""
    return file.parent / f".part-{file.name}-{uuid.uuid4().hex}"


def _hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
