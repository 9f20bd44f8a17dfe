"""What a data source is, the table of the kinds of source, and how a source is opened by name.

A kind is one entry of the table SOURCES: a function open(argument, split) -> Source. Slices of
splits, resizing and text encoding are applied here, so they work for every kind. H, W, C image
height, width, channels; V pixel levels; M, E text tokens and width. No jax is imported: grain's
worker processes run this.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from ntm_jax.data import images
from ntm_jax.data.text import encode_captions, pad_text
from ntm_jax.errors import UserError
from ntm_jax.registry import Registry

# The least number of classes that integer labels may span; more images may span more.
CLASSES = 100_000


class SplitError(UserError):
    """A split that a source does not have, or a slice that is empty or out of range."""


@dataclasses.dataclass(frozen=True)
class Source:
    """One split of a data set. Everything in it must be picklable: worker processes get a copy.

    records: random access, `len(records)` and `records[i]` -> a dict of
      "image": [H, W, C], uint8 pixels in 0..V-1 or float32 latents;
      "label": int, -1 or absent without labels;
      "caption": str, if `captions` is given;
      "rejected": as "image", optional: an image that was judged worse than it, see
        train.objective=preference;
      "text": [M, E] float16, zeros after the record's own tokens, and "text_mask": [M] bool, true
        on the record's own tokens, if text_width is positive;
      "condition": [E] float32, standardised, if condition_width is positive;
      "name": str, optional, what errors call the record.
    image_shape: (H, W, C). An open function may leave H and W None, if only reading a record or
      data.image_size determines them.
    pixel_levels: V, the number of values that a pixel can take; 0 for continuous latents.
    num_classes: labels are 0..num_classes-1; 0 without labels.
    class_names: the name of every class, in the order of the labels; empty if they have none.
    name, split: as given to `open_source`, which sets them.
    version: identifies the data's content, for provenance.
    text_tokens, text_width: M and E; 0 without text states.
    text: the name of the encoder that made the text states; '' if unknown.
    captions: the caption of every record, or None.
    rows: what an open function gives to take a part of `records` and `captions`, these rows in this
      order; None for all, and once the source is opened.
    log_density: the known density of the data, or None: a function of points [n, H W C] float64 and
      a noise level t, 0 < t <= 1, that returns the exact log-density in nats, [n] float64, of
      x_t = (1-t) x + t eps.
    mean, std: by channel, what latents were shifted and scaled by, (latent - mean) / std; empty if
      they were not normalised. Of arrays, by column.
    columns: 0 for images. Positive: each record is a row of an array [n, columns], and its image
      holds the standardised numbers as latents of shape 1 x columns x 1.
    condition_width: E, the numbers of a record's condition; 0 without one.
    condition_mean, condition_std: by number, what conditions were shifted and scaled by.
    tasks: scores images by their captions, or None: a function of images [n, H, W, C] and n
      captions that returns arrays [n]: "task", names; "right", bool; and further rates by name, NaN
      where an image has none. "traits", if there, is bool [n, K]: which of K traits an image shows
      of those that its caption leaves open.
    unseen: the split with combinations of attributes absent from training; '' if there is none.
    mixed_sizes: names two images of different sizes; '' if none are known. Opening the source then
      requires data.image_size.
    notes: what a run prints of them, such as which are left out or lack a caption; '' for nothing.
    planar_extent: how the data are drawn. 0: as images. Positive: each record is a point of the
      plane, latents of shape 1 x 2 x 1, drawn in scatter plots on the square [-planar_extent,
      planar_extent]^2.
    """

    records: Any
    image_shape: tuple[int, int, int]
    pixel_levels: int
    num_classes: int = 0
    class_names: tuple[str, ...] = ()
    name: str = ""
    split: str = ""
    version: str = ""
    text_tokens: int = 0
    text_width: int = 0
    text: str = ""
    captions: Sequence[str] | None = None
    rows: Sequence[int] | np.ndarray | None = None
    log_density: Callable | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    tasks: Callable | None = None
    unseen: str = ""
    mixed_sizes: str = ""
    notes: str = ""
    planar_extent: float = 0.0
    columns: int = 0
    condition_width: int = 0
    condition_mean: tuple[float, ...] = ()
    condition_std: tuple[float, ...] = ()

    @property
    def measures(self) -> dict[str, str]:
        """What an evaluation measures of this source beside the likelihood: {figure: MODULE:NAME}.

        Each is a function of a run, the source, the records' scores, scales of guidance and
        progress. It returns the figures, or {} where it does not apply to the run.
        """
        known = {"truth": (self.log_density,
                           "ntm_jax.projects.densities.known_density:compare_with_true_density"),
                 "tasks": (self.tasks, "ntm_jax.projects.scenes.tasks:task_scores")}
        return {name: place for name, (needed, place) in known.items() if needed}

    def evenly_spread(self, most: int) -> np.ndarray:
        """The indices of at most `most` records, evenly spread: records may be sorted by class."""
        count = len(self.records)
        return np.linspace(0, count - 1, min(count, most)).astype(int)


SOURCES = Registry(
    "data.source",
    {
        "digits": "ntm_jax.data.sources.digits:open_digits",
        "mnist_5k": "ntm_jax.data.sources.digits:open_mnist_5k",
        "shapes": "ntm_jax.projects.scenes.shapes:open_shapes",
        "tfds:NAME_OR_BUILDER_DIR": "ntm_jax.data.sources.tfds:open_tfds",
        "folder:PATH": "ntm_jax.data.sources.folder:open_folder",
        "records:PATH": "ntm_jax.data.sources.prepared:open_records",
        "mock:SHAPE": "ntm_jax.data.sources.mock:open_mock",
        "toy:NAME": "ntm_jax.projects.densities.toys:open_toy",
        "arrays[:VERSION]": "ntm_jax.data.sources.arrays:open_provided",
        "npz:PATH": "ntm_jax.data.sources.arrays:open_npz",
        "parquet:PATH": "ntm_jax.data.sources.arrays:open_parquet",
        "sbi:TASK": "ntm_jax.projects.sbi.source:open_sbi",
    },
)


def register(name: str, open_function: Callable[[str, str], Source]) -> None:
    """Registers a kind of data source, opened by `data.source=name` or `name:ARGUMENT`.

    The programs register it with --import=MODULE, the module that calls this function:

        def open_squares(argument: str, split: str) -> sources.Source:
            sources.check_split("squares", split, ["train", "test"])
            images = np.load(f"{argument}/{split}.npy")  # [n, 32, 32, 3] uint8
            records = sources.ArrayRecords(images)
            return sources.Source(records, images.shape[1:], pixel_levels=256)

        ntm_jax.data.register("squares", open_squares)  # data.source=squares:/data/squares

    Slices such as `train[:90%]`, data.image_size and data.text_encoder apply to the source as to
    any other. With data.workers > 0 each worker process gets a copy of the source, pickled by
    cloudpickle: records may be of a class that a script or notebook defines, but must not hold open
    files, locks or sessions. Open these when a record is read, and drop them in `__getstate__`.

    Args:
      name: letters, digits, underscores, dots and hyphens.
      open_function: open_function(argument, split) -> Source. `argument` is the text after the
        colon, '' without one. `split` is a split's name without a slice; `check_split` raises the
        error for an unknown one.
    Raises:
      UserError: the name is registered already or not valid.
    """
    SOURCES.register(name, open_function, "[:ARGUMENT]")


def open_source(
    name: str, split: str, image_size: int = 0, text: str = "", token_size: int = 1
) -> Source:
    """Opens a split of the data source `name`.

    `name` is digits, mnist_5k, shapes, tfds:NAME_OR_BUILDER_DIR, folder:PATH, records:PATH,
    mock:SHAPE, toy:NAME, arrays, npz:PATH, parquet:PATH, sbi:TASK, or a registered name; each
    kind's module documents it.
    A source without splits of its own has train, test and all, cut from a fixed permutation of its
    records.

    Args:
      split: the name of a split, or a slice of it: 'train', 'train[:1350]', 'train[-100:]',
        'test[10%:]'. 'train[shuffled]' has the records in a fixed random order, and
        'train[shuffled][:90%]' is a slice of that.
      image_size: 0 keeps the images' size, which must then be the same for all; otherwise each
        image's central square is resized to this side. Latents cannot be resized.
      text: the encoder of captions, see data.text_encoder; '' for none. Prepared records that hold
        text states accept only the encoder that made these.
      token_size: the columns of an array that form one token.
    Raises:
      UserError: unknown source or split, a slice that is empty or out of range, missing or
        unprepared data, undecodable images, images of different sizes. Reading a record raises it
        for what can only be found out then.
    """
    source = open_as_stored(name, split)
    if source.mixed_sizes and not image_size:
        raise UserError(f"images have different sizes ({source.mixed_sizes}): set data.image_size")
    if image_size and not source.pixel_levels:
        raise UserError(
            f"data.image_size={image_size} does not go with {name}, whose latents cannot be "
            "resized: set data.image_size=0"
        )
    if token_size != 1 and (not source.columns or source.columns % token_size):
        raise UserError(
            f"config.data.token_size is {token_size}, and a record of {name} has {source.columns} "
            "columns: set it to 1 or another divisor of their number"
        )
    shape = source.image_shape
    if image_size:
        shape = (image_size, image_size, shape[2])
    elif source.columns:
        shape = (1, source.columns // token_size, token_size)
    elif None in shape:
        shape = source.records[0]["image"].shape
    source = dataclasses.replace(source, image_shape=shape)
    read = functools.partial(_checked, source, image_size)
    source = dataclasses.replace(source, records=Lazy(read, range(len(source.records))))
    return _encode(source, text) if text else source


def open_as_stored(name: str, split: str) -> Source:
    """A split, or a slice of it, as its kind opens it.

    Images are not resized, so they may have several sizes, and captions are not encoded. Raises
    UserError like `open_source`.
    """
    open_function, argument = SOURCES.find(name)
    source = open_function(argument, split.partition("[")[0])
    if source.rows is not None:
        source = take(source, source.rows)
    if not len(source.records):
        raise SplitError(f"the split {split!r} of {name} is empty: it needs more records")
    if "[" in split:
        source = take(source, _slice(split, len(source.records)))
    return dataclasses.replace(source, name=name, split=split)


# For the kinds of source.


@dataclasses.dataclass(frozen=True)
class ArrayRecords:
    """Arrays in memory as records.

    images: [n, H, W, C].
    labels: [n] ints, or None.
    captions: n strings, or None.
    conditions: [n, E] float32, standardised, or None.
    """

    images: np.ndarray
    labels: np.ndarray | None = None
    captions: Sequence[str] | None = None
    conditions: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        given = {"image": self.images, "label": self.labels, "caption": self.captions,
                 "condition": self.conditions}
        return {key: values[index] for key, values in given.items() if values is not None}


@dataclasses.dataclass(frozen=True)
class Lazy(Sequence):
    """Values that are made when they are asked for: get(row) of some rows."""

    get: Callable[[Any], Any]
    rows: Sequence | np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.get(self.rows[index])


def take(source: Source, rows: Sequence[int] | np.ndarray) -> Source:
    """The source of these records alone."""
    captions = None if source.captions is None else Lazy(source.captions.__getitem__, rows)
    records = Lazy(source.records.__getitem__, rows)
    return dataclasses.replace(source, records=records, captions=captions, rows=None)


def permuted_splits(count: int, train: int, seed: int = 0) -> dict[str, np.ndarray]:
    """The rows of train, test and all.

    They cut np.random.RandomState(seed).permutation(count) after `train` rows.
    """
    order = np.random.RandomState(seed).permutation(count)
    return {"train": order[:train], "test": order[train:], "all": order}


def check_split(name: str, split: str, existing: Iterable[str]) -> None:
    """Raises SplitError, listing the splits of source `name`, if `split` is not one of them."""
    if split not in existing:
        raise SplitError(f"{name} has no split {split!r}: it has {', '.join(existing)}")


# Slices and sizes.


def _checked(source: Source, image_size: int, index: int) -> dict[str, Any]:
    """A record of `source`, with its images at one size and its label an int.

    image_size: the side that images are resized to; 0 for none. UserError for what is not a record
    as `source` describes it.
    """
    record = dict(source.records[index])
    name = record.pop("name", f"record {index} of {source.split}")
    for key in record.keys() & {"image", "rejected"}:
        record[key] = _checked_image(source, image_size, record[key], name)
    label, classes = int(record.get("label", -1)), source.num_classes
    if classes and not -1 <= label < classes:
        raise UserError(
            f"{name} has label {label}: expected 0 to {classes - 1}, the number of one of the "
            "source's classes, or -1 where it is unknown"
        )
    return record | {"label": label}


def _checked_image(source: Source, image_size: int, image: np.ndarray, name: str) -> np.ndarray:
    shape, levels = source.image_shape, source.pixel_levels
    if source.columns:
        image = image.reshape(shape)
    fits = image.dtype == (np.uint8 if levels else np.float32) and image.shape[2:] == shape[2:]
    if not fits or (0 < levels < 256 and image.max() >= levels):
        expected = f"uint8 below {levels}" if levels else "float32"
        raise UserError(f"{name} has an image of {image.dtype} {list(image.shape)} up to "
                        f"{image.max()}: expected {expected}, [H, W, C] with C = {shape[2]}")
    if image_size:
        image = images.resize(image, image_size, levels)
    if image.shape != shape:
        found, others = ("x".join(map(str, each)) for each in (image.shape, shape))
        raise UserError(
            f"images have different sizes ({name} is {found}, others {others}): set "
            "data.image_size"
        )
    return image


def _slice(split: str, count: int) -> range | np.ndarray:
    """The records of a slice such as 'train[:90%]' of a split of `count` records."""
    match = re.fullmatch(
        r"[^\[]+(?P<shuffled>\[shuffled\])?(?:\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?", split)
    if not match:
        raise SplitError(
            f"the split {split!r} is not understood: expected a name and at most one slice, like "
            "train, train[:90%] or train[shuffled][:90%]"
        )

    def row(bound: str) -> int:
        from_end = bound.startswith("-")
        if bound.endswith("%"):
            return round((int(bound[:-1]) + 100 * from_end) * count / 100)
        return int(bound) + count * from_end

    start, stop = row(match["start"] or "0"), row(match["stop"] or "100%")
    if not 0 <= start < stop <= count:
        raise SplitError(
            f"the split {split!r} takes records {start} to {stop}, but there are {count}: choose "
            "a slice within them"
        )
    rows = permuted_splits(count, count)["all"] if match["shuffled"] else range(count)
    return rows[start:stop]


def _encode(source: Source, name: str) -> Source:
    """`source` with the states of its captions by the encoder `name`.

    Raises UserError if it has no captions, or holds the states of another encoder.
    """
    if source.text_width:
        if source.text and source.text != name:
            raise UserError(
                f"config.data.text_encoder is {name!r}, and {source.name} holds the states of "
                f"{source.text!r}: give that, or prepare the records again"
            )
        return dataclasses.replace(source, text=name)
    if source.captions is None:
        raise UserError(
            f"config.data.text_encoder is {name!r}, and {source.name} has no captions, which a "
            "folder has in its metadata.jsonl or in a .txt beside each image: write them, or leave "
            "the encoder empty"
            + (f" ({source.notes})" if source.notes else "")
        )
    states, encoder = encode_captions(source.name, source.captions, name)
    read = functools.partial(_with_text, source.records, states, encoder.tokens)
    return dataclasses.replace(
        source,
        records=Lazy(read, range(len(source.records))),
        text_tokens=encoder.tokens,
        text_width=encoder.width,
        text=name,
    )


def _with_text(
    records: Any, states: Callable[[str], np.ndarray], tokens: int, index: int
) -> dict[str, Any]:
    """A record with "text" [M, E] and "text_mask" [M], M = `tokens`, of its caption."""
    record = records[index]
    return record | pad_text(states(record["caption"]), tokens)
