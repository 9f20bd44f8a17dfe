"""The input `tars:GLOB`: uncompressed tar files in webdataset's layout, or of labelled images.

The members of one item share a key, the name up to its first dot, and lie one after the other. Its
label is that of its .json, or else its .cls. Where no image has a caption or a label, the folder of
each is its label. A tar within a tar counts as a folder of its name, as in ImageNet's
ILSVRC2012_img_train.tar.
"""

import collections
import glob
import os
import tarfile
from collections.abc import Iterator

from tqdm import tqdm

from ntm_jax.data.caption_lists import caption_of
from ntm_jax.errors import UserError, abbreviate, first_line
from ntm_jax.files import check_size, parse_object, regular
from ntm_jax.tools.prepare.captioned import Input, Item, Request, make_input

_IMAGES = ("jpg", "jpeg", "png", "webp")


def open_tars(asked: Request) -> Input:
    """Lists the images in all tars that match a pattern; see inputs.open_input."""
    paths = sorted(glob.glob(os.path.expanduser(asked.where), recursive=True))
    if not paths:
        raise UserError(f"{asked.flag} matches no file: expected tars of images")
    items = [item for path in paths for item in _items(path)]
    captioned = any(item.caption for item in items)
    if not captioned and all(item.label is None for item in items):
        folders = [item.key.split("/")[1:-1] for item in items]
        if all(folders) and len({folder[-1] for folder in folders}) > 1:
            items = [item._replace(label=folder[-1])
                     for item, folder in zip(items, folders, strict=True)]
    return make_input(asked, asked.flag, items, _read_member, captioned)


def _items(path: str) -> list[Item]:
    """The items of one tar. UserError if it is compressed, damaged or cut short."""
    parts, last = collections.defaultdict(dict), "none"
    regular(path)
    try:
        with tarfile.open(path, "r:") as tar:  # not compressed: members are read at random
            members = _members(tar, "", 0)
            for place, tar_of, member, start in tqdm(
                    members, f"listing {path}", unit=" files", disable=None, delay=1):
                last = abbreviate(f"{place}{member.name}", str)
                folder, _, name = f"{place}{member.name}".rpartition("/")
                stem, _, kind = name.partition(".")
                key = "/".join(filter(None, (os.path.basename(path), folder, stem)))
                _add(tar_of, member, start, kind.lower(), parts[key], path)
    except Exception as error:  # tarfile raises half a dozen kinds on damaged headers
        if isinstance(error, OSError) and error.filename:  # it cannot be opened
            raise
        raise UserError(
            f"{path} is not a complete, uncompressed tar of images "
            f"({first_line(error)}; the last member read: {last}): mend or remove it"
        ) from None
    return [
        Item(key, part.get("image"), part.get("caption", ""), part.get("label"))
        for key, part in parts.items()
        if part.keys() & {"image", "caption"}
    ]


def _members(
    tar: tarfile.TarFile, place: str, start: int
) -> Iterator[tuple[str, tarfile.TarFile, tarfile.TarInfo, int]]:
    """(folder, its tar, member, where its data start in the file) of each file in a tar.

    The files of a tar within it are in a folder of its name. place, start: those of `tar` itself.
    """
    for member in tar:
        begin = start + member.offset_data
        if member.isfile() and member.name.endswith(".tar"):
            with tarfile.open(fileobj=tar.extractfile(member), mode="r:") as inner:
                yield from _members(inner, f"{place}{member.name[:-len('.tar')]}/", begin)
        elif member.isfile():
            yield place, tar, member, begin


def _add(
    tar: tarfile.TarFile, member: tarfile.TarInfo, start: int, kind: str, part: dict, path: str
) -> None:
    """Adds a member, of the suffix `kind`, to the parts of its item."""

    def text() -> str:
        check_size(member.size, member.name)
        file = tar.extractfile(member)
        assert file is not None  # the member is a file
        return file.read().decode(errors="surrogateescape")

    if kind in _IMAGES:
        part["image"] = (path, start, member.size)
    elif kind == "txt":
        part["caption"] = text()
    elif kind == "json":
        row = parse_object(text())
        part.setdefault("caption", caption_of(row.get("caption", row.get("text"))))
        if row.get("label") is not None:
            part["label"] = row["label"]
    elif kind == "cls":
        part.setdefault("label", text().strip())


def _read_member(item: Item):
    if item.image is None:
        raise FileNotFoundError
    path, offset, size = item.image
    check_size(size, "it")
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(size), item.caption, item.label
