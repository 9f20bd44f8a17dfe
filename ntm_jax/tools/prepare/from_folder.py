"""The input `folder:PATH`: image files with a .jsonl or .csv list of captions."""

import functools
import os

from etils import epath

from ntm_jax.data import caption_lists, images
from ntm_jax.errors import UserError, abbreviate
from ntm_jax.files import is_remote
from ntm_jax.tools.prepare.captioned import Input, Item, make_input


def open_folder(where: str, captions: str, follow_outside: bool) -> Input:
    """Lists the images of the folder; see inputs.open_input."""
    root = epath.Path(where).expanduser()
    if not root.is_dir():
        raise UserError(f"--input=folder:{root} is not there: expected a folder of images")
    file = epath.Path(captions).expanduser() if captions else caption_lists.find_list(root)
    if file is None or not file.exists():
        raise UserError(
            f"{file or root / 'metadata.jsonl'} is not there: give --captions=FILE, a .jsonl or "
            ".csv with a row for each image: file_name, caption and, if wished, label"
        )
    items, base = [], os.path.realpath(root)
    for number, row in caption_lists.rows(file):
        line = f"{file} line {number}"
        name, caption = caption_lists.name_and_caption(row, line)
        if not follow_outside and _outside(root, base, name):
            raise UserError(
                f"{line} has the file_name {abbreviate(name, str)}, which lies outside {root}: put "
                "the file into the folder, or give --follow_outside if you trust the list"
            )
        items.append(Item(name, name, caption, row.get("label")))
    return make_input(str(file), items, functools.partial(_read_file, os.fspath(root)))


def _outside(root: epath.Path, base: str, name: str) -> bool:
    """Whether the file of a name relative to `root`, links followed, lies outside its real path."""
    if is_remote(root):
        first = os.path.normpath(name).split("/")[0]
        return "://" in name or os.path.isabs(name) or first == ".."
    return os.path.commonpath([base, os.path.realpath(os.path.join(base, name))]) != base


def _read_file(root: str, item: Item):
    return images.read(epath.Path(root) / item.image), item.caption, item.label
