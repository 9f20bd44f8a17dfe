"""Captioned images as they come: a folder with a .jsonl or .csv of captions, a data set of tfds, or webdataset's tar files.

`open_input` lists what there is; `load`, in whichever process, makes one item a square image, a caption and a label. Only regular files are
read, images of at most 256 MiB and captions of at most 16 MiB. S the side of the image. No jax is imported: worker processes run this.
"""

import collections
import csv
import functools
import glob
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from PIL import UnidentifiedImageError

from ntm_jax.data import regular, sources
from ntm_jax.errors import UserError, first_line, shown

_CLASSES = 100_000  # the least number of classes that whole numbers as labels may make; more with more images
_TEXT_LIMIT = 16 * 2**20  # bytes of a row of a list, or of a caption's member of a tar
_LISTS = ("metadata.jsonl", "metadata.csv")
_IMAGES = ("jpg", "jpeg", "png", "webp")  # members of a tar


class Item(NamedTuple):
    """key: names the record, and decides its split. image: where its bytes lie, what `read` understands. caption: with surrogates where it
    is not UTF-8. label: None where there is none. A tfds record tells these two itself, when it is read."""

    key: str
    image: Any
    caption: str = ""
    label: int | None = None


class Input(NamedTuple):
    """read: an item -> (image: a file's bytes or [H, W, C] uint8, caption, label). classes: their names in the labels' order; empty without
    labels."""

    items: Sequence[Item]
    read: Callable[[Item], tuple[Any, str, int | None]]
    classes: Sequence[str]


class Loaded(NamedTuple):
    """image: [S, S, 3] uint8, None if bad, and then why. null: why a caption is '', the null caption: 'empty' or 'not UTF-8'; else ''."""

    key: str
    image: np.ndarray | None
    bad: str = ""
    caption: str = ""
    null: str = ""
    label: int | None = None


def open_input(name: str, captions: str = "", feature: str = "caption", split: str = "train", follow_outside: bool = False) -> Input:
    """Opens `folder:PATH`, `tfds:NAME_OR_BUILDER_DIR` or `tars:GLOB`.

    Args:
      captions: of a folder, its .jsonl or .csv with file_name (or image), caption (or text) and, if wished, label in every row; by default
        metadata.jsonl or metadata.csv in it. Names are relative to the folder.
      feature, split: of tfds, the feature that holds the caption, a/b for b in a, the first of several; and which of its records.
      follow_outside: of a folder, whether its list may name files outside it, by ../, an absolute path or a link.
    Raises:
      UserError: nothing there, or a list, tar or data set that is not understood. Images are looked at by `load`.
    """
    match name.partition(":"):
        case "folder", ":", where if where:
            given = _folder(epath.Path(where).expanduser(), captions, follow_outside)
        case "tfds", ":", where if where:
            given = _tfds(where, split, feature)
        case "tars", ":", where if where:
            given = _tars(where)
        case _:
            raise UserError(f"--input={name} is not known: expected folder:PATH, tfds:NAME_OR_BUILDER_DIR or tars:GLOB")
    if not given.items:
        raise UserError(f"--input={name} lists no images: expected at least one")
    return given


def load(read: Callable, size: int, item: Item) -> Loaded:
    """The item as the central square of its image at side `size`, with its caption stripped. An image that cannot be had is bad."""
    try:
        image, caption, label = read(item)
        image = sources.decode(image, size) if isinstance(image, bytes) else image
        if image.ndim != 3 or image.dtype != np.uint8 or image.shape[-1] not in (1, 3):
            raise ValueError(f"{image.dtype} {list(image.shape)}, expected uint8 of 1 or 3 channels")
        image = np.repeat(image, 3, -1) if image.shape[-1] == 1 else image
        image = sources.resize(image, size)
    except FileNotFoundError:
        return Loaded(item.key, None, "not there")
    except Exception as error:  # PIL raises a dozen kinds on a damaged file
        return Loaded(item.key, None, "not an image" if isinstance(error, UnidentifiedImageError) else first_line(error))
    try:
        caption.encode()
    except UnicodeEncodeError:
        return Loaded(item.key, image, null="not UTF-8", label=label)
    caption = caption.strip()
    return Loaded(item.key, image, caption=caption, null="" if caption else "empty", label=label)


def _caption(value) -> str:
    """What stands for a caption: text, bytes, or the first of several; '' for anything else."""
    if isinstance(value, (list, tuple, np.ndarray)):
        value = value[0] if len(value) else ""
    if isinstance(value, bytes):
        return value.decode(errors="surrogateescape")
    return value if isinstance(value, str) else ""


def _input(name: str, items: list[Item], read: Callable) -> Input:
    """Labels that are whole numbers stay as they are; of names, the label is the place in their sorted order."""
    if all(item.label is None for item in items):
        return Input(items, read, [])
    wrong = next((item for item in items if isinstance(item.label, bool) or not isinstance(item.label, (int, str))), None)
    if wrong:
        found = wrong.label if wrong.label is None else f"of type {type(wrong.label).__name__}"
        raise UserError(f"{name} has the label {found} for {shown(wrong.key, str)}, and others have labels: give every row a "
                        "name or a number")
    labels = {str(item.label) for item in items}
    numbers = all(label.isdecimal() for label in labels)
    limit = max(_CLASSES, len(items))
    beyond = next((item for item in items if len(str(item.label)) > 18 or int(item.label) >= limit), None) if numbers else None
    if beyond:
        raise UserError(f"{name} has the label {shown(beyond.label, str)} for {shown(beyond.key, str)}: expected numbers below {limit}, "
                        f"the number of images or {_CLASSES}; write other labels as names")
    classes = [str(i) for i in range(max(map(int, labels)) + 1)] if numbers else sorted(labels)
    places = {label: int(label) if numbers else place for place, label in enumerate(sorted(labels))}
    return Input([item._replace(label=places[str(item.label)]) for item in items], read, classes)


def _object(text: str) -> dict:
    """The JSON object in a text. ValueError, in one line, for everything else."""
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    return content


# A folder.


def _folder(root: epath.Path, captions: str, follow_outside: bool) -> Input:
    if not root.is_dir():
        raise UserError(f"--input=folder:{root} is not there: expected a folder of images")
    candidates = [epath.Path(captions).expanduser()] if captions else [root / name for name in _LISTS]
    file = next((path for path in candidates if path.exists()), None)
    if file is None or file.suffix not in (".jsonl", ".csv"):
        found = f"{captions} is no .jsonl or .csv that is there" if captions else f"{root} has no {' or '.join(_LISTS)}"
        raise UserError(f"{found}: give --captions=FILE, a row for each image with file_name, caption and, if wished, label")
    if not regular.is_regular(file):
        raise UserError(f"{file} is not a regular file: give a list of captions that is one, with --captions=FILE")
    items, outside = [], _outside(root)
    for number, row in _rows(file):
        name, caption = (next((row[key] for key in keys if key in row), row) for keys in (("file_name", "image"), ("caption", "text")))
        if not isinstance(name, str) or caption is row:
            raise UserError(f"{file} line {number} has {shown(', '.join(map(str, row)) or 'nothing', str)}: expected file_name (or image) "
                            "and caption (or text) of every image")
        if not _is_name(name):
            raise UserError(f"{file} line {number} has the file_name {ascii(name)[:80]}, which no file can have: mend the name")
        if not follow_outside and outside(name):
            raise UserError(f"{file} line {number} has the file_name {shown(name, str)}, which lies outside {root}: put the file into the "
                            "folder, or give --follow_outside if you trust the list")
        items.append(Item(name, name, _caption(caption), row.get("label")))
    return _input(str(file), items, functools.partial(_read_file, os.fspath(root)))


def _is_name(name: str) -> bool:
    """Whether a file system can hold a name."""
    try:
        return b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:  # a surrogate that stands for no byte
        return False


def _outside(root: epath.Path) -> Callable[[str], bool]:
    """A function of a file's name relative to `root` that tells whether the file lies outside it, links followed where there are any."""
    base = os.path.realpath(root)
    resolved = functools.cache(os.path.realpath)  # of the few folders that hold the many files

    def outside(name: str) -> bool:
        if "://" in os.fspath(root):
            return "://" in name or os.path.isabs(name) or os.path.normpath(name).split("/")[0] == ".."
        folder, last = os.path.split(os.path.join(base, name))
        path = os.path.join(resolved(folder), last)
        path = os.path.realpath(path) if last in ("", ".", "..") or os.path.islink(path) else path
        return os.path.commonpath([base, path]) != base

    return outside


def _rows(file: epath.Path) -> Iterator[tuple[int, dict]]:
    """(line, row) of a .jsonl or .csv; bytes that are not UTF-8 become surrogates, which name the same file again."""
    number = 0
    try:
        with file.open("rb") as raw, io.TextIOWrapper(raw, "utf-8-sig", errors="surrogateescape", newline="") as text:
            if file.suffix == ".csv":
                reader = csv.DictReader(_lines(text))
                for row in reader:
                    number = reader.line_num
                    yield number, {key: value for key, value in row.items() if key is not None and value is not None}
                return
            for number, line in enumerate(_lines(text), 1):
                if line.strip():
                    yield number, _object(line)
    except (ValueError, csv.Error) as error:
        raise UserError(f"{file} line {number} is not understood ({first_line(error)}): expected {file.suffix} of file_name, "
                        "caption") from None


def _lines(text: io.TextIOBase) -> Iterator[str]:
    """The lines of a text. ValueError for one that is too long for a row."""
    while line := text.readline(_TEXT_LIMIT):
        regular.check_size(len(line) + 1, _TEXT_LIMIT)
        yield line


def _read_file(root: str, item: Item):
    return regular.read(epath.Path(root) / item.image), item.caption, item.label


# Tars of webdataset: the members of one key, a name up to its first dot, lie one after the other.


def _tars(pattern: str) -> Input:
    paths = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
    if not paths:
        raise UserError(f"--input=tars:{pattern} matches no file: expected tars of images with their captions")
    other = next((path for path in paths if not regular.is_regular(path)), None)
    if other:
        raise UserError(f"--input=tars:{pattern} matches {other}, which is not a regular file: remove it, or give a pattern without it")
    items = [item for path in paths for item in _tar(path)]
    return _input(f"tars:{pattern}", items, _read_member)


# Types of members that hold the name or the attributes of the next one.
_EXTENDED = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)


class _Member(tarfile.TarInfo):
    """A member of a tar, refused where its header would send the reader backwards, for ever, or make it read a name of any length."""

    def _block(self, count):
        if count < 0:
            raise tarfile.ReadError("a member has a negative size")
        return super()._block(count)

    def _proc_member(self, tar):
        if self.type in _EXTENDED:
            regular.check_size(self.size, _TEXT_LIMIT)
        return super()._proc_member(tar)


def _tar(path: str) -> list[Item]:
    parts = collections.defaultdict(dict)
    try:
        with tarfile.open(path, "r:", tarinfo=_Member) as tar:  # not compressed: members are read at random
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                key, _, kind = name.partition(".")
                kind, part = kind.lower(), parts["/".join(filter(None, (os.path.basename(path), folder, key)))]
                if member.isfile() and kind in _IMAGES:
                    part["image"] = (path, None if member.issparse() else member.offset_data, member.size)
                elif member.isfile() and kind == "txt":
                    part["caption"] = _member_text(tar, member)
                elif member.isfile() and kind == "json":
                    row = _object(_member_text(tar, member))
                    part.setdefault("caption", _caption(row.get("caption", row.get("text"))))
                    part["label"] = row.get("label")
            _check_end(tar)
    except (tarfile.TarError, ValueError) as error:
        raise UserError(f"{path} is not a whole, uncompressed tar of images and captions ({first_line(error)}): mend or remove "
                        "it") from None
    return [Item(key, part.get("image"), part.get("caption", ""), part.get("label")) for key, part in parts.items()
            if part.keys() & {"image", "caption"}]


def _check_end(tar: tarfile.TarFile) -> None:
    """tarfile.ReadError where the reader stopped at a damaged header, which it takes for the end, and not at a block of zeros."""
    tar.fileobj.seek(tar.offset)
    if any(tar.fileobj.read(tarfile.BLOCKSIZE)):
        raise tarfile.ReadError(f"damaged header at byte {tar.offset}")


def _member_text(tar: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    """The text of a member. ValueError where it is too long."""
    try:
        regular.check_size(member.size, _TEXT_LIMIT)
    except ValueError as error:
        raise ValueError(f"{shown(member.name, str)}: {error}") from None
    return tar.extractfile(member).read().decode(errors="surrogateescape")


def _read_member(item: Item):
    if item.image is None:
        raise FileNotFoundError
    path, offset, size = item.image
    if offset is None:
        raise ValueError("a sparse member of its tar")
    regular.check_size(size)
    with open(path, "rb") as file:
        file.seek(offset)
        data = file.read(size)
    if len(data) < size:
        raise ValueError(f"{path} ends within it")
    return data, item.caption, item.label


# tfds.


def _tfds(where: str, split: str, feature: str) -> Input:
    builder = sources.tfds_builder(where)
    name, features = f"tfds:{where}", builder.info.features
    if "image" not in features:
        raise UserError(f"{name} has no feature 'image': its features are {', '.join(features)}")
    inner = features
    for part in feature.split("/"):
        if part not in inner:
            raise UserError(f"{name} has no feature {feature!r} of captions: it has {', '.join(features)}; give --caption_feature")
        inner = getattr(inner[part], "feature", inner[part])  # of a sequence, what it is of
        inner = inner if hasattr(inner, "keys") else {}
    count = len(_examples(where, split))
    classes = [str(i) for i in range((getattr(features["label"], "num_classes", None) or 0) if "label" in features else 0)]
    read = functools.partial(_read_example, where, split, feature.split("/"), bool(classes))
    return Input([Item(str(i), i) for i in range(count)], read, classes)


@functools.cache
def _examples(where: str, split: str):
    import tensorflow_datasets as tfds

    return sources.tfds_data_source(where, split, decoders={"image": tfds.decode.SkipDecoding()})


def _read_example(where: str, split: str, feature: Sequence[str], labelled: bool, item: Item):
    example = caption = _examples(where, split)[item.image]
    for part in feature:
        caption = caption[part]
        caption = caption[0] if isinstance(caption, (list, tuple)) and caption else caption
    return example["image"], _caption(caption), int(example["label"]) if labelled else None
