"""Captions of a folder of images: a metadata.jsonl or metadata.csv, or a .txt beside each image."""

import csv
import io
import os
from collections.abc import Iterator

import numpy as np
from etils import epath

from ntm_jax.data.text import is_utf8
from ntm_jax.errors import UserError, abbreviate, first_line
from ntm_jax.files import parse_object, read, regular


def find_list(root: epath.Path) -> epath.Path | None:
    """The list in the folder `root`, if one is there."""
    names = ("metadata.jsonl", "metadata.csv")
    return next((root / name for name in names if (root / name).exists()), None)


def listed(root: epath.Path) -> tuple[dict[str, str], dict[str, str]]:
    """What the list in a folder says: (captions, rejected files), {file name: ...} each.

    Names are relative to the folder. A caption that is not UTF-8 is empty. Rejected files are those
    of the rows that have `rejected`. Both are empty without a list. Raises UserError for a list
    that is not understood.
    """
    file, captions, rejected = find_list(root), {}, {}
    for number, row in rows(file) if file else ():
        line = f"{file} line {number}"
        name, caption = name_and_caption(row, line)
        name = os.path.normpath(name)
        if name in captions:
            raise UserError(f"{line} has the file_name {abbreviate(name, str)} again: leave one "
                            "row for each image")
        captions[name] = caption if is_utf8(caption) else ""
        if row.get("rejected"):
            rejected[name] = os.path.normpath(str(row["rejected"]))
    return captions, rejected


def text_beside(image: str) -> str:
    """The name of the .txt beside an image, a.txt of a.png."""
    return f"{os.path.splitext(image)[0]}.txt"


def read_beside(root: epath.Path, image: str) -> str:
    """The caption in the .txt beside an image of the folder `root`; '' if it is not UTF-8."""
    caption = read(root / text_beside(image)).decode("utf-8-sig", "surrogateescape").strip()
    return caption if is_utf8(caption) else ""


def name_and_caption(row: dict, line: str) -> tuple[str, str]:
    """A row's file name and caption. UserError, which begins with `line`, if it has none."""
    name = row.get("file_name", row.get("image"))
    caption = row.get("caption", row.get("text", 0))  # null is the null caption, 0 is none
    if not isinstance(name, str) or not isinstance(caption, (str, list, type(None))):
        raise UserError(
            f"{line} has {abbreviate(row)}: expected texts as file_name (or image) and caption (or "
            "text) of every image"
        )
    return name, caption_of(caption)


def caption_of(value) -> str:
    """The caption in a text, bytes, or a list of either (its first); '' for anything else."""
    if isinstance(value, (list, tuple, np.ndarray)):
        value = value[0] if len(value) else ""
    if isinstance(value, bytes):
        return value.decode(errors="surrogateescape")
    return value if isinstance(value, str) else ""


def rows(file: epath.Path) -> Iterator[tuple[int, dict]]:
    """(line, row) of a .jsonl or .csv.

    Bytes that are not UTF-8 become surrogates, which still name the same file.
    """
    file, number = regular(file), 0

    def lines() -> Iterator[str]:  # a row of a .csv may span several
        nonlocal number
        for line in text:
            number += 1
            yield line

    try:
        with (
            file.open("rb") as raw,
            io.TextIOWrapper(
                raw, encoding="utf-8-sig", errors="surrogateescape", newline=""
            ) as text,
        ):
            if file.suffix == ".jsonl":
                for line in lines():
                    if line.strip():
                        yield number, parse_object(line)
                return
            for row in csv.DictReader(lines(), strict=True):
                if None in row:  # the fields beyond the header
                    raise ValueError("it has more fields than the header")
                yield number, {key: value for key, value in row.items() if value is not None}
    except (ValueError, csv.Error) as error:
        raise UserError(
            f"{file} line {number} is not understood ({first_line(error)}): expected a "
            ".jsonl or .csv of file_name, caption, and quotes around a caption with a comma or a "
            "quote"
        ) from None
