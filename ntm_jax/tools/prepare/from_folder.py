"""The input `folder:PATH`: images with a .jsonl or .csv list of captions, or a .txt beside each."""

import functools
import os
from collections.abc import Iterator

from etils import epath

from ntm_jax import files
from ntm_jax.data import caption_lists
from ntm_jax.data.sources import folder
from ntm_jax.errors import UserError, abbreviate, few
from ntm_jax.tools.prepare.captioned import Input, Item, make_input


def open_folder(where: str, captions: str, follow_outside: bool) -> Input:
    """Lists the images of the folder; see inputs.open_input."""
    root = epath.Path(where).expanduser()
    if not root.is_dir():
        raise UserError(f"--input=folder:{root} is not there: expected a folder of images")
    listed = captions or caption_lists.find_list(root)
    rows = _listed(epath.Path(listed).expanduser()) if listed else _beside(root)
    items, base = [], os.path.realpath(root)
    for line, name, caption, label in rows:
        for place in (name,) if listed else (name, caption_lists.text_beside(name)):
            if not follow_outside and _outside(root, base, place):
                raise UserError(
                    f"{line} has the file_name {abbreviate(place, str)}, which lies outside {root}:"
                    " put the file into the folder, or give --follow_outside if you trust the list"
                )
        items.append(Item(name, name, caption, label))
    read = functools.partial(_read_file, os.fspath(root), not listed)
    return make_input(str(listed or root), items, read)


def _listed(file: epath.Path) -> Iterator[tuple]:
    """(line, file name, caption, label) of each row of a list."""
    if not file.exists():
        raise UserError(f"--captions={file} is not there: expected a .jsonl or .csv file")
    for number, row in caption_lists.rows(file):
        line = f"{file} line {number}"
        yield line, *caption_lists.name_and_caption(row, line), row.get("label")


def _beside(root: epath.Path) -> Iterator[tuple]:
    """The same of each image of a folder; the captions are read with the images."""
    names, described = folder.list_images(root)
    missing = [name for name in names if name not in described]
    if missing or not names:
        raise UserError(
            f"{root / 'metadata.jsonl'} is not there, nor a .txt beside every image "
            f"({few(missing, 3)}): give --captions=FILE, a .jsonl or .csv with a row for each "
            "image: file_name, caption and, if wished, label"
        )
    yield from ((str(root), name, "", None) for name in names)


def _outside(root: epath.Path, base: str, name: str) -> bool:
    """Whether the file of a name relative to `root`, links followed, lies outside its real path."""
    if files.is_remote(root):
        first = os.path.normpath(name).split("/")[0]
        return "://" in name or os.path.isabs(name) or first == ".."
    return os.path.commonpath([base, os.path.realpath(os.path.join(base, name))]) != base


def _read_file(root: str, beside: bool, item: Item):
    place = epath.Path(root)
    caption = caption_lists.read_beside(place, item.image) if beside else item.caption
    return files.read(place / item.image), caption, item.label
