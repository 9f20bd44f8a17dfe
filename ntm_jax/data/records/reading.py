"""Reads prepared records at random, verifying each shard's SHA-256 once.

No jax is imported: grain's worker processes run this.
"""

import bisect
import hashlib
import itertools
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import safetensors
from array_record.python.array_record_module import ArrayRecordReader
from etils import epath

from ntm_jax.data import regular
from ntm_jax.data.records.layout import DTYPES, Layout
from ntm_jax.errors import UserError, first_line
from ntm_jax.files import is_remote

_REMEDY = (
    "copy it there again, or prepare the records again: the same launch/prepare.py command makes "
    "only what is missing or differs from the manifest"
)


class Records:
    """Random access to the records of some shards.

    records[i] is {"image", "label" (int, -1 without labels), "text", "text_mask", "caption"}. The
    image is [H, W, C] uint8, or float32 for latents; with text there are text [M, E] float16, zeros
    after the record's own tokens, and text_mask [M] bool, true on these; with captions, caption is
    a str. A shard is opened by each process that reads it, when it first does; the process first
    compares the SHA-256 of the file with the manifest's, once, which takes about a second for each
    GB.

    Args:
      path: the folder.
      layout: its layout.
      parts: the values of the splits of `read_manifest` to read in turn.
    Raises:
      UserError: a shard is missing. While reading: a shard whose file is not the one in the
        manifest, or a damaged record.
    """

    def __init__(self, path: str, layout: Layout, parts: Sequence[Mapping[str, list]]):
        self._root, self._layout = epath.Path(path).expanduser(), layout
        self._shards = [shard for part in parts for shard in part["shards"]]
        self._counts = [count for part in parts for count in part["counts"]]
        self._sha256 = [
            digest
            for part in parts
            for digest in part.get("sha256") or [None] * len(part["shards"])
        ]
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
        self.__setstate__({})

    def __getstate__(self):  # without the open readers
        omitted = ("_readers", "_locks")
        return {key: value for key, value in vars(self).items() if key not in omitted}

    def __setstate__(self, state):
        vars(self).update(state)
        self._readers, self._locks = {}, [threading.Lock() for _ in self._shards]

    def __len__(self) -> int:
        return sum(self._counts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        layout = self._layout
        shard = bisect.bisect_right(self._ends, index)
        position = index - self._ends[shard] + self._counts[shard]
        reader = self._reader(shard)
        try:
            # safetensors' numpy module does not support bfloat16.
            parts = safetensors.deserialize(reader.read([position])[0])
            arrays = {
                key: np.frombuffer(part["data"], DTYPES[part["dtype"]]).reshape(part["shape"])
                for key, part in parts
            }
            fault, caption = layout.fault(arrays), {}
            if layout.captions and not fault:
                caption = {"caption": arrays["caption"].tobytes().decode()}
        except Exception as error:  # both libraries raise several kinds on damaged bytes
            fault = f"cannot be decoded ({first_line(error)})"
        if fault:
            file = self._root / self._shards[shard]
            raise UserError(f"record {position} of {file} {fault}: {_REMEDY}")
        image = arrays["image"]
        if not layout.pixel_levels:
            image = (image.astype(np.float32) - self._mean) / self._std
        text = pad_text(arrays["text"], layout.text_tokens) if layout.text_width else {}
        return {"image": image, "label": int(arrays.get("label", -1)), **text, **caption}

    def _reader(self, shard: int) -> ArrayRecordReader:
        if shard not in self._readers:
            with self._locks[shard]:  # one of several threads hashes the file
                if shard not in self._readers:
                    self._readers[shard] = self._open(shard)
        return self._readers[shard]

    def _open(self, shard: int) -> ArrayRecordReader:
        path, expected = os.fspath(self._root / self._shards[shard]), self._counts[shard]
        if not regular.is_regular(path):
            raise UserError(f"shard {path} is not a regular file: {_REMEDY}")
        if self._sha256[shard] and _sha256_once(path) != self._sha256[shard]:
            raise UserError(
                f"shard {path} is damaged or another's: its SHA-256 is not that of the manifest; "
                f"{_REMEDY}"
            )
        reader = ArrayRecordReader(path, "readahead_buffer_size:0,max_parallelism:0")
        found = reader.num_records()  # 0 for a file that is not ArrayRecord at all
        if found != expected:
            raise UserError(
                f"shard {path} holds {found} records, its manifest says {expected}: {_REMEDY}"
            )
        return reader


def sha256(path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with epath.Path(path).open("rb") as file:
        return hashlib.file_digest(cast(Any, file), "sha256").hexdigest()


# SHA-256 of the files that this process has read, by path, size and times.
_hashed: dict[tuple, str] = {}


def _sha256_once(path: str) -> str:
    """SHA-256 of a file, computed once in this process, and again if the file changes."""
    if is_remote(path):
        stat = epath.Path(path).stat()
        key = (path, stat.length, stat.mtime)
    else:
        stat = os.stat(path)
        key = (path, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    if key not in _hashed:
        _hashed[key] = sha256(path)
    return _hashed[key]


def pad_text(text: np.ndarray, tokens: int) -> dict[str, np.ndarray]:
    """Pads text states [m, E] with zeros to M = `tokens`.

    Returns {"text": [M, E], "text_mask": [M] bool, true on the first m}.
    """
    padded = np.pad(text, ((0, tokens - len(text)), (0, 0)))
    return {"text": padded, "text_mask": np.arange(tokens) < len(text)}
