"""Captioned images as input: a folder with a list of captions, a tfds data set, or tar files.

inputs.open_input lists the items; `load`, in any process, turns one item into a square image, a
caption and a label. S image side. No jax is imported: worker processes run this.
"""

import errno
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import UnidentifiedImageError

from ntm_jax.data import images, text
from ntm_jax.data.sources.source import CLASSES
from ntm_jax.errors import UserError, abbreviate, first_line


class Item(NamedTuple):
    """An image with its caption and label.

    key: names the record, and decides its split.
    image: the place of its bytes, in the form that `Input.read` understands.
    caption: with surrogates if it is not UTF-8.
    label: None without one; a name only until `make_input` numbers the names.

    Items of tfds have their caption and label only once they are read.
    """

    key: str
    image: Any
    caption: str = ""
    label: int | str | None = None


class Input(NamedTuple):
    """A list of items.

    read: a function from an item to (image: a file's bytes or [H, W, C] uint8, caption, label).
    classes: their names, in the order of the labels; empty without labels.
    """

    items: Sequence[Item]
    read: Callable[[Item], tuple[Any, str, int | None]]
    classes: Sequence[str]


class Loaded(NamedTuple):
    """A loaded item.

    image: [S, S, 3] uint8; None if the image is bad.
    bad: the reason if it is bad, else ''.
    null: the reason if `caption` is '', the null caption: 'empty' or 'not UTF-8'; else ''.
    """

    key: str
    image: np.ndarray | None
    bad: str = ""
    caption: str = ""
    null: str = ""
    label: int | None = None


def load(read: Callable, size: int, item: Item) -> Loaded:
    """The central square of the item's image, resized to side `size`, with its caption stripped.

    An image that cannot be read or decoded is marked as bad. Raises only OSError, EMFILE.
    """
    try:
        image, caption, label = read(item)
        image = images.decode(image, size) if isinstance(image, bytes) else image
        image = np.repeat(image, 3, -1) if image.shape[-1] == 1 else image
        image = images.resize(image, size)
    except FileNotFoundError:
        return Loaded(item.key, None, "not there")
    except UnidentifiedImageError:
        return Loaded(item.key, None, "not an image")
    except Exception as error:  # PIL raises a dozen kinds on a damaged file
        if getattr(error, "errno", None) == errno.EMFILE:
            raise
        return Loaded(item.key, None, first_line(error))
    if not text.is_utf8(caption):
        return Loaded(item.key, image, null="not UTF-8", label=label)
    caption = caption.strip()
    null = "" if caption else "empty"
    return Loaded(item.key, image, caption=caption, null=null, label=label)


# For the kinds of input.


def make_input(name: str, items: list[Item], read: Callable) -> Input:
    """An Input of items whose labels are as listed, all integers or names, or all None.

    Integer labels stay; a name becomes its index among the sorted names. An empty label is none.

    Raises:
      UserError: some items have a label and others none, or one that is no number or name; integers
        out of range.
    """
    items = [item._replace(label=None) if item.label == "" else item for item in items]
    labels = {str(item.label) for item in items if item.label is not None}
    if not labels:
        return Input(items, read, [])
    wrong = next((item for item in items if not isinstance(item.label, (int, str))), None)
    if wrong:
        raise UserError(
            f"{name} has the label {abbreviate(wrong.label)} for {abbreviate(wrong.key, str)}, and "
            "others have labels: give every row a name or a number"
        )
    if all(re.fullmatch(r"[+-]?\d+", label) for label in labels):
        places, limit = {label: int(label) for label in labels}, max(CLASSES, len(items))
        beyond = next((label for label in places.values() if not 0 <= label < limit), None)
        if beyond is not None:
            raise UserError(
                f"{name} has the label {beyond}: expected 0 to {limit - 1}, below the number of "
                f"images or {CLASSES}; write other labels as names"
            )
        classes = [str(i) for i in range(max(places.values()) + 1)]
    else:
        classes = sorted(labels)
        places = {label: place for place, label in enumerate(classes)}
    items = [item._replace(label=places[str(item.label)]) for item in items]
    return Input(items, read, classes)
