"""The layout that all records of a folder share, and the manifest that holds it.

H, W, C image height, width, channels; V pixel levels; M, E text tokens and width.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from ntm_jax import files, typed
from ntm_jax.errors import UserError

MANIFEST = "manifest.json"
DTYPES = {  # safetensors' names of the types that records hold
    "U8": np.uint8,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F32": np.float32,
    "I32": np.int32,
}
_FORMAT = 1
_PIXEL_LEVELS = "levels"  # the manifest's key of Layout.pixel_levels


@dataclasses.dataclass(frozen=True)
class Layout:
    """What all records of a folder share.

    image_shape: (H, W, C).
    pixel_levels: V; 0 for continuous latents. The manifest calls it levels.
    num_classes: 0 without labels.
    text_tokens, text_width: M and E; 0 without text.
    text: the encoder that made the text states, see data.text_encoder.
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

    def __post_init__(self):
        for key in ("image_shape", "mean", "std"):
            object.__setattr__(self, key, tuple(getattr(self, key)))

    def check(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Raises ValueError if a record's arrays have other names, shapes or dtypes."""
        expected = self._expected(arrays)
        if arrays.keys() != expected.keys():
            raise ValueError(
                f"it has {', '.join(sorted(arrays))}, expected {', '.join(sorted(expected))}"
            )
        for key, (shape, types) in expected.items():
            found = arrays[key]
            if found.shape != shape or all(found.dtype != DTYPES[name] for name in types):
                wanted = " or ".join(DTYPES[name].__name__ for name in types)
                is_array = f"{key} is {list(found.shape)} {found.dtype}"
                raise ValueError(f"{is_array}, expected {list(shape)} {wanted}")

    def _expected(self, arrays: Mapping[str, np.ndarray]) -> dict[str, tuple[tuple, tuple]]:
        """{key: (shape, names of dtypes)}; text and captions have any length that is permitted."""
        images = ("U8",) if self.pixel_levels else ("F16", "BF16", "F32")
        expected: dict[str, tuple[tuple, tuple]] = {"image": (self.image_shape, images)}
        if self.num_classes:
            expected["label"] = ((), ("I32",))
        if self.text_width:
            tokens = arrays["text"].size // self.text_width if "text" in arrays else 0
            expected["text"] = ((min(tokens, self.text_tokens), self.text_width), ("F16",))
        if self.captions:
            expected["caption"] = (arrays["caption"].shape if "caption" in arrays else (), ("U8",))
        return expected


@dataclasses.dataclass(frozen=True)
class _Split:
    """A split in the manifest: the files of its shards, and the records and the SHA-256 of each.

    Manifests of earlier versions have no SHA-256.
    """

    shards: tuple[str, ...]
    counts: tuple[int, ...]
    sha256: tuple[str, ...] = ()

    def __post_init__(self):
        for name in self.shards:
            if name in ("", ".", "..") or "/" in name or "\\" in name:
                raise ValueError(f"the shard {name!r} is not a name of a file in the folder")


def read_manifest(path: str) -> tuple[Layout, dict[str, dict[str, list]], str]:
    """The layout, the splits and the hash in the manifest of the folder `path`.

    The splits are {name: {"shards": [file, ...], "counts": [n, ...], "sha256": [hexadecimal,
    ...]}}; manifests of earlier versions have no "sha256".

    Raises:
      UserError: the folder or its manifest is missing, or the manifest is damaged, was edited or
        has another format.
    """
    file = epath.Path(path).expanduser() / MANIFEST
    if not file.exists():
        what = f"has no {MANIFEST}" if file.parent.is_dir() else "is not there"
        raise UserError(
            f"data.source records:{path} {what}: expected a folder that launch/prepare.py wrote"
        )
    try:
        content = files.parse_object(file.read_bytes())
        written = content.pop("hash")
        if written != _hash(content) or content.pop("format") != _FORMAT:
            raise ValueError(f"not of format {_FORMAT}, or edited since it was written")
        splits = content.pop("splits")
        for name, split in splits.items():
            typed.parse_dataclass(_Split, split, f"splits.{name}")
        if _PIXEL_LEVELS in content:
            content["pixel_levels"] = content.pop(_PIXEL_LEVELS)
        return typed.parse_dataclass(Layout, content, "layout"), splits, written
    except (ValueError, KeyError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise UserError(
            f"manifest {file} is not understood ({reason}): copy it there again, or prepare the "
            "records again; the same launch/prepare.py command keeps the complete shards"
        ) from error


def write_manifest(path: str, layout: Layout, splits: Mapping[str, Mapping[str, list]]) -> None:
    """Writes the manifest of `splits`, as `read_manifest` returns them; their shards must exist."""
    fields = {
        _PIXEL_LEVELS if key == "pixel_levels" else key: value
        for key, value in dataclasses.asdict(layout).items()
    }
    content = files.to_json({"format": _FORMAT, "splits": splits, **fields})
    files.write_json(epath.Path(path).expanduser() / MANIFEST, content | {"hash": _hash(content)})


def _hash(content: Mapping[str, Any]) -> str:
    """The first 16 digits of a JSON value's SHA-256."""
    return files.digest(content)[:16]
