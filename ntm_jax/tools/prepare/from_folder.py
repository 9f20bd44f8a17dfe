"""The input `folder:PATH`: images with a list of captions, a .txt each, or class folders."""

import functools
import os
from collections.abc import Iterator, Sequence

from etils import epath

from ntm_jax import files
from ntm_jax.data import caption_lists
from ntm_jax.data.sources import folder
from ntm_jax.errors import UserError, abbreviate, few
from ntm_jax.tools.prepare.captioned import Input, Item, Request, make_input

_SPLITS = {"val", "valid", "validation", "test"}


def open_folder(asked: Request) -> Input:
    """Lists the images of the folder; see inputs.open_input."""
    root = epath.Path(asked.where).expanduser()
    if not root.is_dir():
        raise UserError(f"{asked.flag} is not there: expected a folder of images")
    listed = asked.captions or caption_lists.find_list(root)
    names, described = ([], set()) if listed else folder.list_images(root)
    labelled = not listed and not described and (
        asked.labels is not None or all("/" in name for name in names))
    if listed:
        rows = _listed(epath.Path(listed).expanduser())
    elif labelled:
        rows = _labelled(asked, root, names)
    else:
        rows = _beside(root, names, described)
    items, base = [], os.path.realpath(root)
    for line, name, caption, label in rows:
        for place in (name,) if listed or labelled else (name, caption_lists.text_beside(name)):
            if not asked.follow_outside and _outside(root, base, place):
                raise UserError(
                    f"{line} has the file_name {abbreviate(place, str)}, which lies outside {root}:"
                    " put the file into the folder, or give --follow_outside if you trust the list"
                )
        items.append(Item(name, name, caption, label))
    read = functools.partial(_read_file, os.fspath(root), not listed and not labelled)
    return make_input(asked, str(listed or root), items, read, not labelled)


def _listed(file: epath.Path) -> Iterator[tuple]:
    """(line, file name, caption, label) of each row of a list."""
    if not file.exists():
        raise UserError(f"--captions={file} is not there: expected a .jsonl or .csv file")
    for number, row in caption_lists.rows(file):
        line = f"{file} line {number}"
        yield line, *caption_lists.name_and_caption(row, line), row.get("label")


def _labelled(asked: Request, root: epath.Path, names: Sequence[str]) -> Iterator[tuple]:
    """The same of images without captions: the sub-folder of each is its label."""
    folders = {name.partition("/")[0] for name in names}
    if asked.labels is None and "train" in folders and folders & _SPLITS:
        raise UserError(f"{asked.flag} holds the splits {', '.join(sorted(folders))}: give one as "
                        f"--input=folder:{root}/NAME, and another as --test_input")
    yield from ((str(root), name, "", None if asked.labels else name.partition("/")[0])
                for name in names)


def _beside(root: epath.Path, names: Sequence[str], described: set[str]) -> Iterator[tuple]:
    """The same of images with a .txt beside each; the captions are read with the images."""
    missing = [name for name in names if name not in described]
    if missing:
        raise UserError(
            f"{root / 'metadata.jsonl'} is not there, nor a .txt beside every image or a "
            f"sub-folder for each class ({few(missing, 3)}): give --captions=FILE, a .jsonl or "
            ".csv with a row for each image: file_name, caption and, if wished, label"
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
