"""The input `folder:PATH`: image files with a .jsonl or .csv list of captions."""

import csv
import functools
import io
import os
from collections.abc import Callable, Iterator

from etils import epath

from ntm_jax.data import images
from ntm_jax.data.prepare.captioned import Input, Item, caption_of, make_input
from ntm_jax.errors import UserError, first_line, shown
from ntm_jax.files import is_remote, parse_object

LISTS = ("metadata.jsonl", "metadata.csv")


def open_folder(where: str, captions: str, follow_outside: bool) -> Input:
    """Lists the images of the folder; see inputs.open_input."""
    root = epath.Path(where).expanduser()
    if not root.is_dir():
        raise UserError(f"--input=folder:{root} is not there: expected a folder of images")
    file = _find_list(root, captions)
    items, outside = [], _outside(root)
    for number, row in _rows(file):
        line = f"{file} line {number}"
        name, caption = _name_and_caption(row, line)
        if not follow_outside and outside(name):
            raise UserError(
                f"{line} has the file_name {shown(name, str)}, which lies outside {root}: put the "
                "file into the folder, or give --follow_outside if you trust the list"
            )
        items.append(Item(name, name, caption_of(caption), row.get("label")))
    return make_input(str(file), items, functools.partial(_read_file, os.fspath(root)))


def listed(root: epath.Path) -> tuple[dict[str, str] | None, dict[str, str]]:
    """What the list in a folder says: (captions, rejected files), {file name: ...} each.

    Names are relative to the folder. Rejected files are those of the rows that have `rejected`.
    Captions are None without a list. Raises UserError for a list that is not understood.
    """
    if not any((root / name).exists() for name in LISTS):
        return None, {}
    file, captions, rejected = _find_list(root, ""), {}, {}
    for number, row in _rows(file):
        line, worse = f"{file} line {number}", row.get("rejected")
        name, caption = _name_and_caption(row, line)
        name = os.path.normpath(name)
        if name in captions:
            raise UserError(f"{line} has the file_name {shown(name, str)} again: leave one row for "
                            "each image")
        captions[name] = caption_of(caption)
        if worse:
            rejected[name] = os.path.normpath(str(worse))
    return captions, rejected


def _find_list(root: epath.Path, captions: str) -> epath.Path:
    """The list of captions. UserError if there is none."""
    given = [epath.Path(captions).expanduser()] if captions else [root / name for name in LISTS]
    file = next((path for path in given if path.exists()), None)
    if file is None or file.suffix not in (".jsonl", ".csv"):
        found = f"{root} has no {' or '.join(LISTS)}"
        if captions:
            found = f"{captions} is no .jsonl or .csv that is there"
        raise UserError(
            f"{found}: give --captions=FILE, a row for each image with file_name, caption and, if "
            "wished, label"
        )
    return file


def _name_and_caption(row: dict, line: str) -> tuple[str, object]:
    """A row's file name and caption. UserError, which begins with `line`, if it has none."""
    missing = object()
    name = row.get("file_name", row.get("image"))
    caption = row.get("caption", row.get("text", missing))
    if not isinstance(name, str) or not isinstance(caption, (str, list, type(None))):
        raise UserError(
            f"{line} has {shown(row)}: expected texts as file_name (or image) and caption (or "
            "text) of every image"
        )
    return name, caption


def _outside(root: epath.Path) -> Callable[[str], bool]:
    """A function of a name relative to `root`: whether that file, links followed, lies outside."""
    base = os.path.realpath(root)
    resolved = functools.cache(os.path.realpath)  # of the few folders that hold the many files

    def outside(name: str) -> bool:
        if is_remote(root):
            first = os.path.normpath(name).split("/")[0]
            return "://" in name or os.path.isabs(name) or first == ".."
        folder, last = os.path.split(os.path.join(base, name))
        path = os.path.normpath(os.path.join(resolved(folder), last))
        return os.path.commonpath([base, os.path.realpath(path)]) != base

    return outside


def _rows(file: epath.Path) -> Iterator[tuple[int, dict]]:
    """(line, row) of a .jsonl or .csv.

    Bytes that are not UTF-8 become surrogates, which still name the same file.
    """
    number, expected = 1, f"{file.suffix} of file_name, caption"
    try:
        with (
            file.open("rb") as raw,
            io.TextIOWrapper(
                raw, encoding="utf-8-sig", errors="surrogateescape", newline=""
            ) as text,
        ):
            if file.suffix == ".csv":
                expected += ", and quotes around a caption with a comma or a quote"
                reader, number = csv.DictReader(text, strict=True), 2
                for row in reader:
                    number = reader.line_num
                    if None in row:  # the fields beyond the header
                        raise ValueError("it has more fields than the header")
                    yield number, {key: value for key, value in row.items() if value is not None}
                    number += 1
                return
            for number, line in enumerate(text, 1):
                if line.strip():
                    yield number, parse_object(line)
    except (ValueError, csv.Error) as error:
        raise UserError(
            f"{file} line {number} is not understood ({first_line(error)}): expected {expected}"
        ) from None


def _read_file(root: str, item: Item):
    return images.read(epath.Path(root) / item.image), item.caption, item.label
