"""The input `tars:GLOB`: uncompressed tar files in webdataset's layout.

The members of one item share a key, the name up to its first dot, and lie one after the other. Its
label is that of its .json, or else its .cls.
"""

import collections
import glob
import os
import tarfile

from ntm_jax.data.caption_lists import caption_of
from ntm_jax.errors import UserError, abbreviate, first_line
from ntm_jax.files import check_size, parse_object, regular
from ntm_jax.tools.prepare.captioned import Input, Item, make_input

_IMAGES = ("jpg", "jpeg", "png", "webp")


def open_tars(pattern: str) -> Input:
    """Lists the images in all tars that match a pattern; see inputs.open_input."""
    paths = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
    if not paths:
        raise UserError(
            f"--input=tars:{pattern} matches no file: expected tars of images with their captions"
        )
    items = [item for path in paths for item in _items(path)]
    return make_input(f"tars:{pattern}", items, _read_member)


def _items(path: str) -> list[Item]:
    """The items of one tar. UserError if it is compressed, damaged or cut short."""
    parts, last = collections.defaultdict(dict), "none"
    regular(path)
    try:
        with tarfile.open(path, "r:") as tar:  # not compressed: members are read at random
            for member in tar:
                last = abbreviate(member.name, str)
                folder, _, name = member.name.rpartition("/")
                stem, _, kind = name.partition(".")
                if member.isfile():
                    key = "/".join(filter(None, (os.path.basename(path), folder, stem)))
                    _add(tar, member, kind.lower(), parts[key], path)
    except Exception as error:  # tarfile raises half a dozen kinds on damaged headers
        if isinstance(error, OSError) and error.filename:  # it cannot be opened
            raise
        raise UserError(
            f"{path} is not a complete, uncompressed tar of images and captions "
            f"({first_line(error)}; the last member read: {last}): mend or remove it"
        ) from None
    return [
        Item(key, part.get("image"), part.get("caption", ""), part.get("label"))
        for key, part in parts.items()
        if part.keys() & {"image", "caption"}
    ]


def _add(tar: tarfile.TarFile, member: tarfile.TarInfo, kind: str, part: dict, path: str) -> None:
    """Adds a member, of the suffix `kind`, to the parts of its item."""

    def text() -> str:
        check_size(member.size, member.name)
        file = tar.extractfile(member)
        assert file is not None  # the member is a file
        return file.read().decode(errors="surrogateescape")

    if kind in _IMAGES:
        part["image"] = (path, member.offset_data, member.size)
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
