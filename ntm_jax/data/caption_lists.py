"""Lists of captions: a metadata.jsonl or metadata.csv in a folder of images."""

import csv
import io
import os
from collections.abc import Iterator

import numpy as np
from etils import epath

from ntm_jax.errors import UserError, abbreviate, first_line
from ntm_jax.files import parse_object

LISTS = ("metadata.jsonl", "metadata.csv")


def listed(root: epath.Path) -> tuple[dict[str, str] | None, dict[str, str]]:
    """What the list in a folder says: (captions, rejected files), {file name: ...} each.

    Names are relative to the folder. Rejected files are those of the rows that have `rejected`.
    Captions are None without a list. Raises UserError for a list that is not understood.
    """
    if not any((root / name).exists() for name in LISTS):
        return None, {}
    file, captions, rejected = find_list(root, ""), {}, {}
    for number, row in rows(file):
        line, worse = f"{file} line {number}", row.get("rejected")
        name, caption = name_and_caption(row, line)
        name = os.path.normpath(name)
        if name in captions:
            raise UserError(f"{line} has the file_name {abbreviate(name, str)} again: leave one "
                            "row for each image")
        captions[name] = caption_of(caption)
        if worse:
            rejected[name] = os.path.normpath(str(worse))
    return captions, rejected


def find_list(root: epath.Path, captions: str) -> epath.Path:
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


def name_and_caption(row: dict, line: str) -> tuple[str, object]:
    """A row's file name and caption. UserError, which begins with `line`, if it has none."""
    missing = object()
    name = row.get("file_name", row.get("image"))
    caption = row.get("caption", row.get("text", missing))
    if not isinstance(name, str) or not isinstance(caption, (str, list, type(None))):
        raise UserError(
            f"{line} has {abbreviate(row)}: expected texts as file_name (or image) and caption (or "
            "text) of every image"
        )
    return name, caption


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
