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

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import re
import zipfile
import zlib
from collections.abc import Sequence

import numpy as np

from ntm_jax.data.sources.source import ArrayRecords, Source, check_split, permuted_splits
from ntm_jax.data.transforms import standardise
from ntm_jax.errors import UserError, first_line

_provided: dict[str, "Arrays"] = {}  # by version; under '', those provided last


@dataclasses.dataclass(frozen=True)
class Table:
    """Numbers by column: values [n, D] float32, standardised; what they were normalised by, [D]."""

    values: np.ndarray
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Arrays:
    """A data set in memory, made by `from_arrays`.

    images: [n, H, W, C], uint8 pixels or float32 latents, among them the columns of `table`.
    labels: [n] ints, or None.
    captions: n strings, or None.
    pixel_levels: the number of values that a pixel can take; 0 for latents.
    splits: the rows of train, test and all.
    version: a hash of the content and its splits.
    class_names: the name of every class; empty if labels were given as numbers.
    table: an array's columns, or None for images.
    condition: what records are conditioned on, or None.
    """

    images: np.ndarray
    labels: np.ndarray | None
    captions: tuple[str, ...] | None
    pixel_levels: int
    splits: dict[str, np.ndarray]
    version: str
    class_names: tuple[str, ...] = ()
    table: Table | None = None
    condition: Table | None = None

    @property
    def name(self) -> str:
        """The data.source that opens these arrays and no others, once they are provided."""
        return f"arrays:{self.version}"

    def open(self, split: str) -> Source:
        """The Source of 'train', 'test' or 'all'. UserError for another split."""
        check_split("arrays", split, self.splits)
        rows, captions = self.splits[split], self.captions
        table, given = self.table, self.condition
        conditions = None if given is None else given.values
        return Source(
            ArrayRecords(self.images, self.labels, captions, rows, conditions),
            self.images.shape[1:],
            pixel_levels=self.pixel_levels,
            num_classes=0 if self.labels is None else int(self.labels.max()) + 1,
            class_names=self.class_names,
            version=self.version,
            captions=None if captions is None else [captions[row] for row in rows],
            mean=() if table is None else table.mean,
            std=() if table is None else table.std,
            columns=0 if table is None else len(table.mean),
            condition_width=0 if given is None else len(given.mean),
            condition_mean=() if given is None else given.mean,
            condition_std=() if given is None else given.std,
        )


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
        0 and variance 1. Or an array [n, D] of floating-point numbers in any units, which are
        standardised by column.
      labels: [n] integers from 0, names of classes, or None. There are max(labels) + 1 classes;
        named ones are numbered from 0 in sorted order.
      captions: n strings, or None.
      condition: [n, E] numbers in any units that records are conditioned on, or None.
      pixel_levels: the number of values that a pixel can take, 2 to 256 and greater than every
        pixel; by default 256. Leave it out for latents and arrays.
      held_out: the share of the records in the split test, 0 <= held_out < 1.
      seed: of the permutation that is cut into train and test.
    Raises:
      UserError: another shape, dtype or length; pixels out of range; numbers that are not finite;
        a column of an array that is constant; negative labels; a share out of range.
    """
    pixel_levels, held_out, seed = map(_plain, (pixel_levels, held_out, seed))
    is_table = np.ndim(images) == 2
    images = _check_numbers(images, "data", "[n, D]") if is_table else _check_images(images)
    pixel_levels, count = _check_levels(images, pixel_levels), len(images)
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
    about = [images.shape, images.dtype.name, captions, pixel_levels, held_out, seed]
    about += [names] if names else []
    about += [] if condition is None else [condition.shape, condition.dtype.name]
    version = _version(about, images, labels, condition)
    table = _table(images, splits["train"], "data") if is_table else None
    images = images if table is None else table.values.reshape(count, 1, -1, 1)
    given = None if condition is None else _table(condition, splits["train"])
    return Arrays(
        images, labels, captions, pixel_levels, splits, version, names, table, given
    )


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
            "in memory: pass data=... with the same images, labels and captions, or call "
            "ntm_jax.data.sources.provide with them first; sampling needs condition=... alone"
        )
    return _provided[version].open(split)


def open_npz(argument: str, split: str) -> Source:
    """Opens a split of the arrays of a file; argument: PATH[,data=KEYS][,condition=KEYS]."""
    return _open_file("npz", argument, split)


def open_parquet(argument: str, split: str) -> Source:
    """Opens a split of a Parquet file; argument: PATH[,data=COLUMNS][,condition=COLUMNS]."""
    return _open_file("parquet", argument, split)


def _open_file(kind: str, argument: str, split: str) -> Source:
    path, keys = argument, {"data": "data", "condition": ""}
    while match := re.fullmatch(r"(.*),(data|condition)=([^,=]+)", path):
        path = match[1]
        keys[match[2]] = match[3]
    try:
        found = os.stat(path)
        changed = found.st_mtime_ns, found.st_size
        return _read_file(kind, argument, path, *keys.values(), *changed).open(split)
    except UserError:  # of what the file holds
        raise
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        expected = _READERS[kind][1]
        raise UserError(
            f"data.source {kind}:{path} cannot be read ({first_line(error)}): expected {expected}"
        ) from None


@functools.lru_cache(maxsize=4)
def _read_file(
    kind: str, name: str, path: str, data: str, condition: str, *changed: int
) -> Arrays:
    """The arrays of a file under these keys, joined by +; '' takes `condition` where it is there.

    changed: of the file, so that a new one is read anew.
    """
    source = f"data.source {kind}:{name}"
    with _READERS[kind][0](path) as (names, read):
        if not condition and "condition" in names:
            condition = "condition"

        def columns(keys: str) -> dict[str, np.ndarray]:
            chosen = keys.split("+")
            for key in chosen:
                if key not in names:
                    raise UserError(
                        f"{source} names the array {key!r}: {path} has "
                        f"{', '.join(names)}; choose with {kind}:PATH,data=KEYS,condition=KEYS"
                    )
            return {key: read(key) for key in chosen}

        continuous = "floating-point numbers, since whole numbers, dates and text have no density"
        values = _joined(source, columns(data), "f", continuous)
        given = _joined(source, columns(condition), "fiub", "numbers") if condition else None
        return from_arrays(values, condition=given)


def _joined(
    source: str, parts: dict[str, np.ndarray], kinds: str, expected: str
) -> np.ndarray:
    """Arrays [n] or [n, D] of a file side by side; a single array of more axes, such as images.

    kinds: the kinds of dtype that columns may have, which `expected` describes.
    """
    for key, part in parts.items():
        if part.ndim < 3 and part.dtype.kind not in kinds:
            raise UserError(f"{source}: the array {key!r} is {part.dtype}: expected {expected}")
    first, *others = parts.values()
    if not others and first.ndim > 1:
        return first
    if any(part.ndim not in (1, 2) or len(part) != len(first) for part in parts.values()):
        shapes = ", ".join(str(list(part.shape)) for part in parts.values())
        raise UserError(
            f"{source} joins arrays of shapes {shapes}: expected columns [n] or [n, D] with one n"
        )
    return np.concatenate([part.reshape(len(part), -1) for part in parts.values()], 1)


@contextlib.contextmanager
def _npz(path: str):
    """The names of a file's arrays, and a function that reads one."""
    if not zipfile.is_zipfile(path):
        raise ValueError("it is no archive")
    with np.load(path, allow_pickle=False) as file:
        yield file.files, file.__getitem__


@contextlib.contextmanager
def _parquet(path: str):
    """The names of a table's columns, and a function that reads one: [n], or [n, D] of lists."""
    from pyarrow import parquet, types

    with parquet.ParquetFile(path) as file:

        def read(name: str) -> np.ndarray:
            column = file.read([name]).column(0).combine_chunks()
            if not types.is_nested(column.type):
                return column.to_numpy(zero_copy_only=False)
            return np.stack(column.to_numpy(zero_copy_only=False))

        yield file.schema_arrow.names, read


_READERS = {  # kinds of files, and what to expect of one
    "npz": (_npz, "a file of numpy.savez"),
    "parquet": (_parquet, "a Parquet file whose lists, if any, have one length"),
}


def _plain(number):
    """A scalar of NumPy as a number of Python; others as they are."""
    return number.item() if isinstance(number, np.generic) else number


def _version(about: list, *arrays: np.ndarray | None) -> str:
    """A hash of facts, of which json has plain values, and of arrays."""
    digest = hashlib.sha256(json.dumps(about).encode())
    for array in arrays:
        if array is not None:
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]


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
        convert = "; convert it with .astype(float)" if values.dtype.kind in "iubO" else ""
        raise UserError(
            f"{name} is {values.dtype} {list(values.shape)}: expected floating-point numbers "
            f"{shape}{convert}"
        )
    if not np.isfinite(values).all():
        raise UserError(f"{name} holds a number that is not finite: remove these records")
    return values


def _table(values: np.ndarray, train: np.ndarray, name: str = "") -> Table:
    """Standardises numbers [n, D] by the mean and deviation of the rows `train`.

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
    return Table(standardise(values, mean, std), tuple(mean.tolist()), tuple(std.tolist()))


def _check_images(images) -> np.ndarray:
    """Images [n, H, W, C], uint8 or float32."""
    images = np.asarray(images)
    fits = images.ndim in (3, 4) and images.size
    if not fits or images.dtype not in (np.uint8, np.float32):
        raise UserError(
            f"images are {images.dtype} {list(images.shape)}: expected uint8 pixels or float32 "
            "latents [n, H, W, C] or [n, H, W], or an array [n, D], such as data[:, None] for one "
            "column; convert them with images.astype"
        )
    if images.dtype == np.float32 and not np.isfinite(images).all():
        raise UserError("images hold a number that is not finite: remove these records")
    return images[..., None] if images.ndim == 3 else images


def _check_levels(images: np.ndarray, pixel_levels: int | None) -> int:
    """The pixel levels of images; 0 of latents and arrays."""
    is_pixels = images.dtype == np.uint8
    levels = (256 if is_pixels else 0) if pixel_levels is None else pixel_levels
    if not (2 <= levels <= 256 and images.max() < levels if is_pixels else levels == 0):
        raise UserError(
            f"pixel_levels is {levels}, and the data are {images.dtype} up to {images.max()}: "
            "expected 2 to 256, more than every pixel of uint8, and nothing for other data"
        )
    return levels


def _numbered(labels) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """(labels as numbers from 0, [n], the names of the classes if they were given as names)."""
    if labels is None:
        return None, ()
    labels, names = np.asarray(labels), ()
    if labels.dtype == object and all(isinstance(label, str) for label in labels.flat):
        labels = labels.astype(str)  # such as a column of pandas
    if labels.dtype.kind == "U":
        found, labels = np.unique(labels, return_inverse=True)
        names = tuple(map(str, found))
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or labels.min(initial=0) < 0:
        raise UserError(
            f"labels are {labels.dtype} {list(labels.shape)}: expected a name for each image, or "
            "one of 0 to the number of classes - 1"
        )
    return labels.astype(np.int32), names
