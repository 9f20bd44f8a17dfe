"""The source `arrays`: images and labels that a Python program holds in memory.

    arrays = sources.from_arrays(images, labels)
    sources.provide(arrays)  # data.source=arrays now opens them in this process

Splits: train, test and all, cut from a permutation of the records. No jax is imported: grain's
worker processes run this.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence

import numpy as np

from ntm_jax.data.sources.source import ArrayRecords, Source, check_split, permuted_splits
from ntm_jax.errors import UserError

_provided: dict[str, "Arrays"] = {}  # by version; under '', those provided last


@dataclasses.dataclass(frozen=True)
class Arrays:
    """A data set in memory, made by `from_arrays`.

    images: [n, H, W, C], uint8 pixels or float32 latents.
    labels: [n] ints, or None.
    captions: n strings, or None.
    pixel_levels: the number of values that a pixel can take; 0 for latents.
    splits: the rows of train, test and all.
    version: a hash of the content and its splits.
    class_names: the name of every class; empty if labels were given as numbers.
    """

    images: np.ndarray
    labels: np.ndarray | None
    captions: tuple[str, ...] | None
    pixel_levels: int
    splits: dict[str, np.ndarray]
    version: str
    class_names: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The data.source that opens these arrays and no others, once they are provided."""
        return f"arrays:{self.version}"

    def open(self, split: str) -> Source:
        """The Source of 'train', 'test' or 'all'. UserError for another split."""
        check_split("arrays", split, self.splits)
        rows, captions = self.splits[split], self.captions
        return Source(
            ArrayRecords(self.images, self.labels, captions, rows),
            self.images.shape[1:],
            pixel_levels=self.pixel_levels,
            num_classes=0 if self.labels is None else int(self.labels.max()) + 1,
            class_names=self.class_names,
            version=self.version,
            captions=None if captions is None else [captions[row] for row in rows],
        )


def from_arrays(
    images,
    labels=None,
    captions: Sequence[str] | None = None,
    *,
    pixel_levels: int | None = None,
    held_out: float = 0.1,
    seed: int = 0,
) -> Arrays:
    """Arrays in memory as a data set with the splits train, test and all.

    The arrays are not copied: leave them unchanged. With data.workers > 0 every worker process
    holds a copy.

    Args:
      images: [n, H, W, C] or [n, H, W] (C = 1): uint8 pixels, or float32 latents, ideally of mean
        0 and variance 1.
      labels: [n] integers from 0, names of classes, or None. There are max(labels) + 1 classes;
        named ones are numbered from 0 in sorted order.
      captions: n strings, or None.
      pixel_levels: the number of values that a pixel can take, 2 to 256 and greater than every
        pixel; by default 256. Leave it out for latents.
      held_out: the share of the records in the split test, 0 <= held_out < 1.
      seed: of the permutation that is cut into train and test.
    Raises:
      UserError: another shape, dtype or length; pixels out of range; latents that are not finite;
        negative labels; a share out of range.
    """
    images, pixel_levels = _check_images(images, pixel_levels)
    count = len(images)
    labels, names = _numbered(labels)
    labels = _check_labels(labels, count)
    captions = _check_captions(captions, count)
    if not 0 <= held_out < 1:
        raise UserError(
            f"held_out is {held_out}: expected a share of the records, 0 or more and below 1"
        )
    splits = permuted_splits(count, count - round(held_out * count), seed)
    about = [images.shape, images.dtype.name, captions, pixel_levels, held_out, seed]
    about += [names] if names else []
    digest = hashlib.sha256(json.dumps(about).encode())
    for array in (images, labels):
        if array is not None:
            digest.update(np.ascontiguousarray(array).data)
    return Arrays(images, labels, captions, pixel_levels, splits, digest.hexdigest()[:16], names)


def provide(arrays: Arrays) -> None:
    """Makes data.source=arrays, and data.source=arrays.name, open `arrays` in this process.

    The name `arrays` opens those that were provided last, `arrays:VERSION` only those of this
    version. The process keeps all arrays that it was provided with.
    """
    _provided[""] = _provided[arrays.version] = arrays


def open_provided(version: str, split: str) -> Source:
    """Opens a split of the arrays of this version, or of those provided last if `version` is ''."""
    if version not in _provided:
        name = f"arrays:{version}" if version else "arrays"
        raise UserError(
            f"data.source {name} is not in this process's memory: this run was trained on arrays "
            "in memory: pass data=... with the same images, labels and captions"
        )
    return _provided[version].open(split)


def _check_images(images, pixel_levels: int | None) -> tuple[np.ndarray, int]:
    """(images [n, H, W, C], their pixel levels)."""
    images = np.asarray(images)
    if images.ndim not in (3, 4) or not images.size:
        raise UserError(
            f"images have shape {list(images.shape)}: expected [n, H, W, C] or [n, H, W]"
        )
    images = images[..., None] if images.ndim == 3 else images
    if images.dtype == np.float32:
        if pixel_levels:
            raise UserError(
                f"images are float32 latents and pixel_levels is {pixel_levels}: give pixels as "
                "uint8, or leave pixel_levels out"
            )
        if not np.isfinite(images).all():
            raise UserError("images hold a number that is not finite: remove these records")
        return images, 0
    if images.dtype != np.uint8:
        raise UserError(
            f"images are {images.dtype}: expected pixels as uint8 or latents as float32; convert "
            "them with images.astype"
        )
    levels = 256 if pixel_levels is None else pixel_levels
    if not 2 <= levels <= 256 or images.max() >= levels:
        raise UserError(
            f"images have pixels up to {images.max()} and pixel_levels is {levels}: expected 2 to "
            "256, more than every pixel"
        )
    return images, levels


def _numbered(labels):
    """(labels as numbers, the names of the classes); labels that are not names are unchanged."""
    if labels is None or np.asarray(labels).dtype.kind != "U":
        return labels, ()
    names, numbers = np.unique(np.asarray(labels), return_inverse=True)
    return numbers, tuple(map(str, names))


def _check_labels(labels, count: int) -> np.ndarray | None:
    if labels is None:
        return None
    labels = np.asarray(labels)
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise UserError(
            f"labels are {labels.dtype} {list(labels.shape)}: expected one integer for each of the "
            f"{count} images"
        )
    if labels.min() < 0 or labels.max() >= 2**31:
        wrong = labels.min() if labels.min() < 0 else labels.max()
        raise UserError(f"labels hold {wrong}: expected 0 to the number of classes - 1")
    return labels.astype(np.int32)


def _check_captions(captions, count: int) -> tuple[str, ...] | None:
    if captions is None:
        return None
    if isinstance(captions, str) or len(captions) != count:
        found = "one string" if isinstance(captions, str) else f"{len(captions)} strings"
        raise UserError(f"captions are {found}: expected one for each of the {count} images")
    for caption in captions:
        if not isinstance(caption, str):
            raise UserError(f"captions hold a {type(caption).__name__}: expected strings")
    return tuple(map(str, captions))
