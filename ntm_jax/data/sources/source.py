"""What a data source is, the table of the kinds of source, and how a source is opened by name.

A kind is one entry of the table SOURCES: a function open(argument, split) -> Source. Slices of
splits, resizing and text encoding are applied here, so they work for every kind. H, W, C image
height, width, channels; V pixel levels; M, E text tokens and width. No jax is imported: grain's
worker processes run this.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import numpy as np

from ntm_jax.data import images
from ntm_jax.data.captions import encode_captions
from ntm_jax.errors import UserError
from ntm_jax.registry import Registry


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
    no_captions: why there are none, for errors; '' if there is nothing to say.
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
    unseen: the split whose captions combine what no training caption combines; '' if there is none.
    mixed_sizes: names two images of different sizes; '' if none are known. Opening the source then
      requires data.image_size.
    typical_side: the median of the images' shorter sides, of images of several sizes; 0 otherwise.
    skipped: says what of the data is left out or not understood; '' if nothing is.
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
    no_captions: str = ""
    log_density: Callable | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    tasks: Callable | None = None
    unseen: str = ""
    mixed_sizes: str = ""
    typical_side: int = 0
    skipped: str = ""
    planar_extent: float = 0.0
    columns: int = 0
    condition_width: int = 0
    condition_mean: tuple[float, ...] = ()
    condition_std: tuple[float, ...] = ()

    def evenly_spread(self, most: int) -> np.ndarray:
        """The indices of at most `most` records, evenly spread: records may be sorted by class."""
        count = len(self.records)
        return np.linspace(0, count - 1, min(count, most)).astype(int)


SOURCES = Registry(
    "data.source",
    {
        "digits": "ntm_jax.data.sources.digits:open_digits",
        "mnist_5k": "ntm_jax.data.sources.mnist:open_mnist_5k",
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
        'test[10%:]'.
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
    base, first, last = _parse_split(split)
    source = open_as_stored(name, base)
    if source.mixed_sizes and not image_size:
        raise UserError(f"images have different sizes ({source.mixed_sizes}): set data.image_size")
    rows = _slice(split, first, last, len(source.records))
    shape = source.image_shape
    if image_size:
        if not source.pixel_levels:
            raise UserError(
                f"data.image_size={image_size} does not go with {name}, whose latents cannot be "
                "resized: set data.image_size=0"
            )
        shape = (image_size, image_size, shape[-1])
    elif None in shape:
        shape = source.records[rows[0]]["image"].shape
    if token_size != 1:
        if not source.columns or source.columns % token_size:
            raise UserError(
                f"config.data.token_size is {token_size}, and a record of {name} has "
                f"{source.columns} columns: set it to 1 or another divisor of their number"
            )
        shape = 1, source.columns // token_size, token_size
    shape = cast(tuple[int, int, int], tuple(shape))
    records = _Rows(
        source.records, rows, shape, image_size, source.pixel_levels, source.columns,
        source.num_classes
    )
    captions = None
    if source.captions is not None:
        captions = Lazy(source.captions.__getitem__, rows)
    source = dataclasses.replace(
        source, name=name, split=split, records=records, image_shape=shape, captions=captions
    )
    return _encode(source, text) if text else source


def open_as_stored(name: str, split: str) -> Source:
    """A split, without a slice, as its kind opens it.

    Images are not resized, so they may have several sizes, and captions are not encoded. Raises
    UserError like `open_source`.
    """
    if name == "emoji" and name not in SOURCES.names:  # of runs of earlier versions
        raise UserError("data.source emoji no longer exists, nor does its experiment: its runs can "
                        "be sampled from, not evaluated or trained on")
    open_function, argument = SOURCES.find(name)
    source = open_function(argument, split)
    if not len(source.records):
        raise SplitError(f"split {split!r} of {name} holds no records: it needs more")
    # Names of folders that are not UTF-8 hold surrogates, which cannot be drawn or printed.
    names = (name.encode(errors="backslashreplace").decode() for name in source.class_names)
    return dataclasses.replace(source, class_names=tuple(names))


# For the kinds of source.


@dataclasses.dataclass(frozen=True)
class ArrayRecords:
    """Arrays in memory as records.

    images: [n, H, W, C].
    labels: [n] ints, or None.
    captions: n strings, or None.
    rows: the rows of the arrays that are records, in order; None for all.
    conditions: [n, E] float32, standardised, or None.
    """

    images: np.ndarray
    labels: np.ndarray | None = None
    captions: Sequence[str] | None = None
    rows: np.ndarray | None = None
    conditions: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.images if self.rows is None else self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = index if self.rows is None else self.rows[index]
        record = {"image": self.images[row]}
        if self.labels is not None:
            record["label"] = self.labels[row]
        if self.captions is not None:
            record["caption"] = self.captions[row]
        if self.conditions is not None:
            record["condition"] = self.conditions[row]
        return record


@dataclasses.dataclass(frozen=True)
class Lazy(Sequence):
    """Values that are made when they are asked for: get(row) of some rows."""

    get: Callable[[int], Any]
    rows: range

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.get(self.rows[index])


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


@dataclasses.dataclass(frozen=True)
class _Rows:
    """A slice of `records`, with every image at one size and every label an int.

    columns: those of an array, whose numbers take the shape; 0 for images. num_classes: 0 without
    labels; a record of unknown class has the label -1. Reading what is not a record of this kind
    raises UserError.
    """

    records: Any
    rows: range
    shape: tuple[int, int, int]
    image_size: int
    pixel_levels: int
    columns: int = 0
    num_classes: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record, name = dict(self.records[self.rows[index]]), f"record {self.rows[index]}"
        name = record.pop("name", name)
        found = {"image": self._image(record["image"], name)}
        if "rejected" in record:
            found["rejected"] = self._image(record["rejected"], f"the image rejected for {name}")
        label = int(record.get("label", -1))
        if self.num_classes and not -1 <= label < self.num_classes:
            raise UserError(
                f"{name} has label {label}: expected 0 to {self.num_classes - 1}, the number of "
                "one of the source's classes, or -1 where it is unknown"
            )
        return {**record, **found, "label": label}

    def _image(self, image: np.ndarray, name: str) -> np.ndarray:
        image, expected = np.asarray(image), np.uint8 if self.pixel_levels else np.float32
        fits = self.columns or (image.ndim == 3 and image.shape[2] == self.shape[2])
        if image.dtype != expected or not fits:
            raise UserError(f"{name} has an image of {image.dtype} {list(image.shape)}: expected "
                            f"{expected.__name__} [H, W, C] with C = {self.shape[2]}")
        if 0 < self.pixel_levels < 256 and image.max() >= self.pixel_levels:
            raise UserError(f"{name} has a pixel of {image.max()}: expected 0 to "
                            f"{self.pixel_levels - 1}, the source's pixel_levels - 1")
        if self.image_size:
            image = images.resize(image, self.image_size, self.pixel_levels)
        if self.columns:
            image = image.reshape(self.shape)
        if image.shape != self.shape:
            found, others = ("x".join(map(str, shape)) for shape in (image.shape, self.shape))
            raise UserError(
                f"images have different sizes ({name} is {found}, others {others}): set "
                "data.image_size"
            )
        return image


def _parse_split(split: str) -> tuple[str, str | None, str | None]:
    """'train[:90%]' -> ('train', None, '90%')."""
    match = re.fullmatch(r"([\w.-]+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?", split)
    if not match:
        raise SplitError(
            f"the split {split!r} is not understood: expected a name and at most one slice, like "
            "train or train[:90%]"
        )
    name, first, last = match.groups()
    return name, first, last


def _slice(split: str, first: str | None, last: str | None, count: int) -> range:
    def row(bound: str) -> int:
        from_end = bound.startswith("-")
        if bound.endswith("%"):
            return round((int(bound[:-1]) + 100 * from_end) * count / 100)
        return int(bound) + count * from_end

    start, stop = row(first or "0"), row(last or "100%")
    if not 0 <= start < stop <= count:
        raise SplitError(
            f"the split {split!r} takes records {start} to {stop}, but there are {count}: choose "
            "a slice within them"
        )
    return range(start, stop)


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
        why = f" ({source.no_captions})" if source.no_captions else ""
        raise UserError(
            f"config.data.text_encoder is {name!r}, and {source.name} has no captions{why}: "
            "leave it empty"
        )
    records, encoder = encode_captions(source.name, source.records, source.captions, name)
    return dataclasses.replace(
        source,
        records=records,
        text_tokens=encoder.tokens,
        text_width=encoder.width,
        text=name,
    )
