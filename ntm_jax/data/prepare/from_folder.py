"""The input `folder:PATH`: image files with a .jsonl or .csv list of captions."""

import csv
import functools
import io
import os
from collections.abc import Callable, Iterator, Sequence

from etils import epath

from ntm_jax.data import regular
from ntm_jax.data.prepare.captioned import (
    TEXT_LIMIT,
    Input,
    Item,
    caption_of,
    make_input,
)
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
        if worse in (None, ""):
            continue
        if not isinstance(worse, str) or not _is_name(worse):
            raise UserError(f"{line} has rejected {ascii(worse)[:80]}: expected a file name")
        rejected[name] = os.path.normpath(worse)
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
    if not regular.is_regular(file):
        raise UserError(
            f"{file} is not a regular file: give a list of captions that is one, with "
            "--captions=FILE"
        )
    return file


def _name_and_caption(row: dict, line: str) -> tuple[str, object]:
    """A row's file name and caption. UserError, which begins with `line`, if it has none."""
    missing = object()
    name = row.get("file_name", row.get("image", missing))
    caption = row.get("caption", row.get("text", missing))
    if not isinstance(name, str) or caption is missing:
        found = shown(", ".join(map(str, row)) or "nothing", str)
        raise UserError(
            f"{line} has {found}: expected file_name (or image) and caption (or text) of every "
            "image"
        )
    if not isinstance(caption, (str, list, type(None))):
        raise UserError(f"{line} has the caption {shown(caption)}: expected a text")
    if not _is_name(name):
        raise UserError(
            f"{line} has the file_name {ascii(name)[:80]}, which no file can have: mend the name"
        )
    return name, caption


def _is_name(name: str) -> bool:
    """Whether a file system can hold a name."""
    try:
        return b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:  # a surrogate that represents no byte
        return False


def _outside(root: epath.Path) -> Callable[[str], bool]:
    """A function of a name relative to `root`: whether that file, links followed, lies outside."""
    base = os.path.realpath(root)
    resolved = functools.cache(os.path.realpath)  # of the few folders that hold the many files

    def outside(name: str) -> bool:
        if is_remote(root):
            first = os.path.normpath(name).split("/")[0]
            return "://" in name or os.path.isabs(name) or first == ".."
        folder, last = os.path.split(os.path.join(base, name))
        path = os.path.join(resolved(folder), last)
        if last in ("", ".", "..") or os.path.islink(path):
            path = os.path.realpath(path)
        return os.path.commonpath([base, path]) != base

    return outside


def _rows(file: epath.Path) -> Iterator[tuple[int, dict]]:
    """(line, row) of a .jsonl or .csv.

    Bytes that are not UTF-8 become surrogates, which still name the same file.
    """
    number, expected = 0, f"{file.suffix} of file_name, caption"
    try:
        with (
            file.open("rb") as raw,
            io.TextIOWrapper(
                raw, encoding="utf-8-sig", errors="surrogateescape", newline=""
            ) as text,
        ):
            if file.suffix == ".csv":
                number = 1
                expected += ", and quotes around a caption with a comma or a quote"
                reader = csv.DictReader(_lines(text), strict=True)
                columns = _columns(reader)
                number = 2
                for row in reader:
                    number = reader.line_num
                    if None in row:  # the fields beyond the header
                        fields = len(columns) + len(row[None])
                        raise ValueError(f"it has {fields} fields under a header of {len(columns)}")
                    yield number, {k: v for k, v in row.items() if v is not None}
                    number += 1
                return
            for number, line in enumerate(_lines(text), 1):
                if line.strip():
                    yield number, parse_object(line)
    except (ValueError, csv.Error) as error:
        raise UserError(
            f"{file} line {number} is not understood ({first_line(error)}): expected {expected}"
        ) from None


def _columns(reader: csv.DictReader) -> Sequence[str]:
    """The names of a table's columns. ValueError for a name that two columns have."""
    columns = reader.fieldnames or ()
    twice = next((name for name in columns if name and columns.count(name) > 1), None)
    if twice:
        raise ValueError(f"it has two columns {shown(twice, str)}")
    return columns


def _lines(text: io.TextIOBase) -> Iterator[str]:
    """The lines of a text. ValueError for a line that is too long for a row."""
    while line := text.readline(TEXT_LIMIT):
        regular.check_size(len(line) + 1, TEXT_LIMIT)
        yield line


def _read_file(root: str, item: Item):
    return regular.read(epath.Path(root) / item.image), item.caption, item.label
