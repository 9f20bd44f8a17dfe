"""The source `arrays`: what a Python program holds in memory; npz: and parquet: arrays of a file.

    arrays = sources.from_arrays(images, labels)
    sources.provide(arrays)  # data.source=arrays now opens them in this process

`npz:PATH` reads the arrays `data` and, where it is there, `condition` of a file that numpy.savez
wrote. `npz:PATH,data=mass+spin,condition=strain` names other keys; several are put side by side, a
vector [n] as one column. `parquet:PATH` reads the columns of a table in the same way: numbers, or
lists of D numbers.

An array [n, D] is a table of n records with D columns. Its numbers, and those of vectors [n, E]
that records are conditioned on, are standardised by the mean and deviation of the training records.

Splits: train, test and all, cut from a permutation of the records. No jax is imported: grain's
worker processes run this. Symbols: n records; H, W, C image height, width, channels; D columns of
an array; E numbers of a condition.
"""

import dataclasses
import functools
import hashlib
import json
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Sequence

import numpy as np

from ntm_jax.data.sources.source import (
    CLASSES,
    ArrayRecords,
    Source,
    check_split,
    permuted_splits,
)
from ntm_jax.data.transforms import standardise
from ntm_jax.errors import UserError, first_line
from ntm_jax.files import regular

_provided: dict[str, "Arrays"] = {}  # by version; under '', those provided last
_TO_PIXELS = ("pixels become uint8 by images.astype(np.uint8) from 0..255, and by (255 * "
              "images).round().astype(np.uint8) from 0..1")


@dataclasses.dataclass(frozen=True)
class Arrays:
    """A data set in memory, made by `from_arrays`.

    source: all its records, in the order of the arrays.
    splits: the rows of train, test and all.
    """

    source: Source
    splits: dict[str, np.ndarray]

    @property
    def name(self) -> str:
        """The data.source that opens these arrays and no others, once they are provided."""
        return f"arrays:{self.source.version}"

    def open(self, split: str) -> Source:
        """The Source of 'train', 'test' or 'all'. UserError for another split."""
        check_split("arrays", split, self.splits)
        return dataclasses.replace(self.source, rows=self.splits[split])


def from_arrays(
    images,
    labels=None,
    captions: Sequence[str] | None = None,
    *,
    condition=None,
    pixel_levels: int | None = None,
    held_out: float = 0.1,
    seed: int = 0,
) -> Arrays:
    """Arrays in memory as a data set with the splits train, test and all.

    Images are not copied: leave them unchanged. With data.workers > 0 every worker process holds a
    copy.

    Args:
      images: [n, H, W, C] or [n, H, W] (C = 1): uint8 pixels, or float32 latents, ideally of mean
        0 and variance 1. Latents of which none is negative have a line in the source's notes. Or an
        array [n, D] of floating-point numbers in any units, which are standardised by column.
      labels: [n] integers from 0, names of classes, or None. There are max(labels) + 1 classes;
        named ones are numbered from 0 in sorted order.
      captions: n strings, or None.
      condition: [n, E] numbers in any units that records are conditioned on, or None.
      pixel_levels: the number of values that a pixel can take, 2 to 256 and greater than every
        pixel; by default 256. Leave it out for latents and arrays.
      held_out: the share of the records in the split test, 0 <= held_out < 1.
      seed: of the permutation that is cut into train and test.
    Raises:
      UserError: another shape, dtype or length; channels before height and width; pixels out of
        range; numbers that are not finite; a column of an array that is constant; negative labels;
        a share out of range.
    """
    is_table = np.ndim(images) == 2
    if is_table:
        images, levels = _check_numbers(images, "data", "[n, D]"), 0
    else:
        images, levels = _check_images(images, pixel_levels)
    count = len(images)
    if condition is not None:
        condition = _check_numbers(condition, "condition", f"[{count}, E]", discrete=True)
    labels, names = _numbered(labels)
    captions = None if captions is None else tuple(captions)
    for name, given in (("condition", condition), ("labels", labels), ("captions", captions)):
        if given is not None and len(given) != count:
            raise UserError(f"{name} has {len(given)} rows: expected one for each of the {count} "
                            "records")
    if not 0 <= held_out < 1:
        raise UserError(
            f"held_out is {held_out}: expected a share of the records, 0 or more and below 1"
        )
    splits = permuted_splits(count, count - round(held_out * count), seed)
    about = [images.shape, images.dtype.name, captions, levels, held_out, seed]
    about += [names] if names else []
    about += [] if condition is None else [condition.shape, condition.dtype.name]
    digest = hashlib.sha256(json.dumps(about, default=np.generic.item).encode())
    for array in (images, labels, condition):
        digest.update(b"" if array is None else np.ascontiguousarray(array).data)
    mean = std = condition_mean = condition_std = ()
    unsigned = not is_table and not levels and images.min() >= 0
    if is_table:
        values, mean, std = _standardised(images, splits["train"], "data")
        images = values.reshape(count, 1, -1, 1)
    if condition is not None:
        condition, condition_mean, condition_std = _standardised(condition, splits["train"])
    return Arrays(
        Source(
            ArrayRecords(images, labels, captions, condition),
            images.shape[1:],
            pixel_levels=levels,
            num_classes=0 if labels is None else int(labels.max()) + 1,
            class_names=names,
            version=digest.hexdigest()[:16],
            captions=captions,
            mean=mean,
            std=std,
            columns=len(mean),
            condition_width=len(condition_mean),
            condition_mean=condition_mean,
            condition_std=condition_std,
            notes=f"float32 images from {images.min():g} to {images.max():g} are taken as latents, "
                  f"and not as pixels: {_TO_PIXELS}" if unsigned else "",
        ),
        splits,
    )


def provide(arrays: Arrays) -> None:
    """Makes data.source=arrays, and data.source=arrays.name, open `arrays` in this process.

    The name `arrays` opens those that were provided last, `arrays:VERSION` only those of this
    version. The process keeps all arrays that it was provided with.
    """
    _provided[""] = _provided[arrays.source.version] = arrays


def open_provided(version: str, split: str) -> Source:
    """Opens a split of the arrays of this version, or of those provided last if `version` is ''."""
    if version not in _provided:
        name = f"arrays:{version}" if version else "arrays"
        raise UserError(
            f"data.source {name} is not in this process's memory: this run was trained on arrays "
            "in memory: pass data=... with the same images, labels and captions, or call "
            "ntm_jax.data.sources.provide with them first; sampling needs condition=... alone"
        )
    return _provided[version].open(split)


def open_npz(argument: str, split: str) -> Source:
    """Opens a split of the arrays of a file; argument: PATH[,data=KEYS][,condition=KEYS]."""
    return _open_file("npz", _npz, "a file of numpy.savez", argument, split)


def open_parquet(argument: str, split: str) -> Source:
    """Opens a split of a Parquet file; argument: PATH[,data=COLUMNS][,condition=COLUMNS]."""
    expected = "a Parquet file whose lists, if any, have one length"
    return _open_file("parquet", _parquet, expected, argument, split)


def _open_file(kind: str, reader: Callable, expected: str, argument: str, split: str) -> Source:
    path, *options = re.split(",(?=data=|condition=)", argument)
    keys = {"data": "data", "condition": ""} | dict(option.split("=", 1) for option in options)
    try:
        changed = os.stat(regular(path)).st_mtime_ns
        return _read_file(f"{kind}:{path}", reader, path, **keys, changed=changed).open(split)
    except UserError:  # of what the file holds
        raise
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"data.source {kind}:{path} cannot be read ({first_line(error)}): expected {expected}"
        ) from None


@functools.lru_cache(maxsize=4)
def _read_file(
    name: str, reader: Callable, path: str, data: str, condition: str, changed: int
) -> Arrays:
    """The arrays of a file under these keys, joined by +; '' takes `condition` where it is there.

    reader: of path; the names of the file's arrays, and a function that reads one. changed: the
    file's time, so that a new one is read anew.
    """
    names, read = reader(path)

    def columns(keys: str) -> dict[str, np.ndarray]:
        missing = [key for key in keys.split("+") if key not in names]
        if missing:
            raise UserError(
                f"data.source {name} has no array {missing[0]!r}: it has {', '.join(names)}; add "
                ",data=KEYS or ,condition=KEYS to choose"
            )
        return {key: read(key) for key in keys.split("+")}

    values, given = columns(data), None
    for key, part in values.items():
        if part.ndim < 3 and part.dtype.kind != "f":
            raise UserError(
                f"data.source {name}: the array {key!r} is {part.dtype}: expected floating-point "
                "numbers, since whole numbers, dates and text have no density"
            )
    if condition or "condition" in names:
        given = np.column_stack(list(columns(condition or "condition").values()))
    return from_arrays(np.column_stack(list(values.values())), condition=given)


def _npz(path: str):
    if not zipfile.is_zipfile(path):  # which numpy would take for a pickle
        raise ValueError("it is no archive")
    file = np.load(path, allow_pickle=False)
    return file.files, file.__getitem__


def _parquet(path: str):
    from pyarrow import parquet

    file = parquet.ParquetFile(path)

    def read(name: str) -> np.ndarray:
        """[n], or [n, D] of lists."""
        column = file.read([name]).column(0).to_numpy()
        return np.stack(list(column)) if column.dtype == object else column

    return file.schema_arrow.names, read


def _check_numbers(values, name: str, shape: str, discrete: bool = False) -> np.ndarray:
    """An array of two axes of finite floating-point numbers.

    discrete: takes whole numbers and booleans, too, as float64.
    """
    if np.ma.is_masked(values):
        raise UserError(f"{name} has masked entries: fill them in, or remove these records")
    values = np.asarray(values)
    if discrete and values.dtype.kind in "iub":
        values = values.astype(np.float64)
    if values.ndim != 2 or not values.size or values.dtype.kind != "f":
        whole = values.dtype.kind in "iub"
        raise UserError(
            f"{name} is {values.dtype} {list(values.shape)}: expected floating-point numbers "
            + shape + whole * f", as whole numbers have no density: add noise, {name} + "
            f"np.random.default_rng(0).uniform(size={name}.shape); of images expected [n, H, W]")
    if not np.isfinite(values).all():
        raise UserError(f"{name} holds a number that is not finite: remove these records")
    return values


def _standardised(
    values: np.ndarray, train: np.ndarray, name: str = ""
) -> tuple[np.ndarray, tuple[float, ...], tuple[float, ...]]:
    """(numbers [n, D] standardised by the rows `train`, float32, their mean [D], deviation [D]).

    name: of an array whose columns must vary, for its error; without it a constant column is left
    at 0.
    """
    known = values[train].astype(np.float64)
    equal = (known == known[0]).all(0)  # where the sums of mean and std round
    mean = np.where(equal, known[0], known.mean(0))
    deviation = np.where(equal, 0.0, known.std(0))
    constant = deviation <= 1e-14 * np.abs(mean)  # no more than float64 rounding
    if name and constant.any():
        raise UserError(
            f"{name} has the constant column {int(np.argmax(constant))}, which has no density: "
            "leave it out"
        )
    std = np.where(constant, 1.0, deviation)
    return standardise(values, mean, std), tuple(mean.tolist()), tuple(std.tolist())


def _check_images(images, pixel_levels: int | None) -> tuple[np.ndarray, int]:
    """(images [n, H, W, C], uint8 pixels or float32 latents; their pixel levels, 0 of latents)."""
    images = np.asarray(images)
    fits = images.ndim in (3, 4) and images.size
    if not fits or images.dtype not in (np.uint8, np.float32):
        raise UserError(
            f"images are {images.dtype} {list(images.shape)}: expected uint8 pixels or float32 "
            "latents [n, H, W, C] or [n, H, W], or an array [n, D], such as data[:, None] for one "
            f"column; {_TO_PIXELS}"
        )
    if images.ndim == 4 and images.shape[1] in (1, 3, 4) and min(images.shape[2:]) > 4:
        raise UserError(
            f"images are {list(images.shape)}, channels first: expected [n, H, W, C]; give "
            "np.moveaxis(images, 1, -1), the same as images.transpose(0, 2, 3, 1)"
        )
    if not np.isfinite(images).all():
        raise UserError("images hold a number that is not finite: remove these records")
    is_pixels = images.dtype == np.uint8
    levels = (256 if is_pixels else 0) if pixel_levels is None else int(pixel_levels)
    if not (2 <= levels <= 256 and images.max() < levels if is_pixels else levels == 0):
        raise UserError(
            f"pixel_levels is {levels}, and the data are {images.dtype} up to {images.max()}: "
            "expected 2 to 256, more than every pixel of uint8, and nothing for other data"
        )
    return images.reshape(*images.shape[:3], -1), levels


def _numbered(labels) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """(labels as numbers from 0, [n], the names of the classes if they were given as names)."""
    if labels is None:
        return None, ()
    labels, names = np.asarray(labels), ()
    if labels.dtype == object:  # such as a column of pandas
        labels = np.asarray(labels.tolist())
    if labels.dtype.kind == "U":
        found, labels = np.unique(labels, return_inverse=True)
        names = tuple(map(str, found))
    limit = max(CLASSES, labels.size)
    whole = labels.ndim == 1 and labels.dtype.kind in "iu"
    if not whole or labels.min(initial=0) < 0 or labels.max(initial=0) >= limit:
        extent = f" from {labels.min()} to {labels.max()}" if whole else ""
        raise UserError(
            f"labels are {labels.dtype} {list(labels.shape)}{extent}: expected a name for each "
            f"image, or one of 0 to the number of classes - 1, below {limit}; give the names, or "
            "number them, np.unique(labels, return_inverse=True)[1]"
        )
    return labels.astype(np.int32), names
