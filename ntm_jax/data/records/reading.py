"""Reads prepared records at random, and verifies folders of them.

No jax is imported: grain's worker processes run this.
"""

import bisect
import hashlib
import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import safetensors
from array_record.python.array_record_module import ArrayRecordReader
from etils import epath

from ntm_jax.data.records.layout import DTYPES, Layout, read_manifest
from ntm_jax.errors import UserError, few, first_line

_REMEDY = (
    "copy it there again, or remove it and give the same launch/prepare.py command, which makes it "
    "anew"
)
# For random access; without the last option a reader's opening reads a MiB.
_OPTIONS = "readahead_buffer_size:0,max_parallelism:0,footer_prefetch_bytes:0"


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
      parts: the values of the splits of `read_manifest` to read in turn.
    Raises:
      UserError: a shard is missing. While reading: a shard of another number of records than the
        manifest says, or a damaged record.
    """

    def __init__(self, path: str, layout: Layout, parts: Sequence[Mapping[str, list]]):
        self._root, self._layout = epath.Path(path).expanduser(), layout
        self._shards = [shard for part in parts for shard in part["shards"]]
        self._counts = [count for part in parts for count in part["counts"]]
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
        layout, shard = self._layout, bisect.bisect_right(self._ends, index)
        position = index - self._ends[shard] + self._counts[shard]
        try:
            arrays = self._arrays(shard, position)
            caption = arrays["caption"].tobytes().decode() if layout.captions else ""
        except Exception as error:  # the libraries raise several kinds on damaged bytes
            raise UserError(
                f"record {position} of {self._root / self._shards[shard]} cannot be read "
                f"({first_line(error)}): {_REMEDY}"
            ) from None
        image = arrays["image"]
        if not layout.pixel_levels:
            image = (image.astype(np.float32) - self._mean) / self._std
        record = {"image": image, "label": int(arrays.get("label", -1))}
        if layout.text_width:
            record |= pad_text(arrays["text"], layout.text_tokens)
        return record | ({"caption": caption} if layout.captions else {})

    def _arrays(self, shard: int, position: int) -> dict[str, np.ndarray]:
        """The arrays of a record. ValueError, among others, if they are damaged or do not fit."""
        reader = self._readers.get(shard)
        if reader is None:  # several threads may open it at once, to no harm
            reader = ArrayRecordReader(os.fspath(self._root / self._shards[shard]), _OPTIONS)
            found, expected = reader.num_records(), self._counts[shard]
            if found != expected:  # 0 for a file that is not ArrayRecord at all
                raise ValueError(f"the file holds {found} records, its manifest says {expected}")
            self._readers[shard] = reader
        # safetensors' numpy module does not support bfloat16.
        arrays = {
            key: np.frombuffer(part["data"], DTYPES[part["dtype"]]).reshape(part["shape"])
            for key, part in safetensors.deserialize(reader.read([position])[0])
        }
        self._layout.check(arrays)
        return arrays


def verify(path: str) -> int:
    """Compares every shard of the folder `path` with the SHA-256 in its manifest.

    Returns the number of shards. UserError, naming the shards, if some are damaged, missing or
    another's, or if the manifest is one of an earlier version, without SHA-256.
    """
    root, (_, splits, _) = epath.Path(path).expanduser(), read_manifest(path)
    wrong, count = [], 0
    for part in splits.values():
        if len(part.get("sha256", ())) != len(part["shards"]):
            raise UserError(f"the manifest of {root} has no SHA-256 of its shards: give the "
                            "launch/prepare.py command of these records again, which adds them")
        for shard, expected in zip(part["shards"], part["sha256"], strict=True):
            count += 1
            if not (root / shard).exists() or sha256(root / shard) != expected:
                wrong.append(shard)
    if wrong:
        raise UserError(f"{len(wrong)} of {count} shards of {root} are damaged, missing or "
                        f"another's ({few(wrong, 10)}): "
                        f"{_REMEDY}")
    return count


def sha256(path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with epath.Path(path).open("rb") as file:
        return hashlib.file_digest(cast(Any, file), "sha256").hexdigest()


def pad_text(text: np.ndarray, tokens: int) -> dict[str, np.ndarray]:
    """Pads text states [m, E] with zeros to M = `tokens`.

    Returns {"text": [M, E], "text_mask": [M] bool, true on the first m}.
    """
    padded = np.pad(text, ((0, tokens - len(text)), (0, 0)))
    return {"text": padded, "text_mask": np.arange(tokens) < len(text)}
