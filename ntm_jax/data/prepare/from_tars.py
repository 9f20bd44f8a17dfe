"""The input `tars:GLOB`: uncompressed tar files in webdataset's layout.

The members of one item share a key, the name up to its first dot, and lie one after the other. Its
label is that of its .json, or else its .cls.
"""

import collections
import glob
import os
import tarfile

from ntm_jax.data import regular
from ntm_jax.data.prepare.captioned import (
    TEXT_LIMIT,
    Input,
    Item,
    caption_of,
    make_input,
)
from ntm_jax.errors import UserError, first_line, shown
from ntm_jax.files import parse_object

_IMAGES = ("jpg", "jpeg", "png", "webp")
# Types of members that hold the name or the attributes of the next one.
_EXTENDED = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


def open_tars(pattern: str) -> Input:
    """Lists the images in all tars that match a pattern; see inputs.open_input."""
    paths = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
    if not paths:
        raise UserError(
            f"--input=tars:{pattern} matches no file: expected tars of images with their captions"
        )
    other = next((path for path in paths if not regular.is_regular(path)), None)
    if other:
        raise UserError(
            f"--input=tars:{pattern} matches {other}, which is not a regular file: remove it, or "
            "give a pattern without it"
        )
    items = [item for path in paths for item in _items(path)]
    return make_input(f"tars:{pattern}", items, _read_member)


class _Member(tarfile.TarInfo):
    """A member of a tar, which refuses damaged headers.

    Some would make the reader go backwards, in an endless loop, or read a name of any length. It
    overrides private methods, which tarfile's type stubs leave out.
    """

    def _block(self, count):
        if count < 0:
            raise tarfile.ReadError("a member has a negative size")
        return super()._block(count)  # pyright: ignore[reportAttributeAccessIssue]

    def _proc_member(self, tar):
        if self.type in _EXTENDED:
            regular.check_size(self.size, TEXT_LIMIT)
        return super()._proc_member(tar)  # pyright: ignore[reportAttributeAccessIssue]


def _items(path: str) -> list[Item]:
    """The items of one tar. UserError if it is compressed, damaged or cut short."""
    parts = collections.defaultdict(dict)
    try:
        # Not compressed: members are read at random.
        with tarfile.open(path, "r:", tarinfo=_Member) as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                stem, _, kind = name.partition(".")
                key = "/".join(filter(None, (os.path.basename(path), folder, stem)))
                _add(tar, member, kind.lower(), parts[key], path)
            _check_end(tar)
    except (tarfile.TarError, ValueError) as error:
        raise UserError(
            f"{path} is not a complete, uncompressed tar of images and captions "
            f"({first_line(error)}): mend or remove it"
        ) from None
    return [
        Item(key, part.get("image"), part.get("caption", ""), part.get("label"))
        for key, part in parts.items()
        if part.keys() & {"image", "caption"}
    ]


def _add(tar: tarfile.TarFile, member: tarfile.TarInfo, kind: str, part: dict, path: str) -> None:
    """Adds a member, of the suffix `kind`, to the parts of its item."""
    if not member.isfile():
        return
    if kind in _IMAGES:
        offset = None if member.issparse() else member.offset_data
        part["image"] = (path, offset, member.size)
    elif kind == "txt":
        part["caption"] = _member_text(tar, member)
    elif kind == "json":
        row = parse_object(_member_text(tar, member))
        part.setdefault("caption", caption_of(row.get("caption", row.get("text"))))
        if row.get("label") is not None:
            part["label"] = row["label"]
    elif kind == "cls":
        part.setdefault("label", _member_text(tar, member).strip())


def _check_end(tar: tarfile.TarFile) -> None:
    """Raises tarfile.ReadError if the reader stopped at a damaged header, not at zeros."""
    file = tar.fileobj
    assert file is not None  # it is open
    file.seek(tar.offset)
    if any(file.read(tarfile.BLOCKSIZE)):
        raise tarfile.ReadError(f"damaged header at byte {tar.offset}")


def _member_text(tar: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    """The text of a member. ValueError if it is too long."""
    try:
        regular.check_size(member.size, TEXT_LIMIT)
    except ValueError as error:
        raise ValueError(f"{shown(member.name, str)}: {error}") from None
    file = tar.extractfile(member)
    assert file is not None  # the member is a file
    return file.read().decode(errors="surrogateescape")


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
