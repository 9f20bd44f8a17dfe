"""Images with captions, labels or both as input: a folder, a tfds data set, or tar files.

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
from ntm_jax.errors import UserError, abbreviate, first_line, from_object_storage


class Item(NamedTuple):
    """An image with its caption and label.

    key: names the record, and decides its split.
    image: the place of its bytes, in the form that `Input.read` understands.
    caption: with surrogates if it is not UTF-8.
    label: None without one; a name only until `make_input` numbers the names.
    held_out: whether it is one of --test_input.

    Items of tfds have their caption and label only once they are read.
    """

    key: str
    image: Any
    caption: str = ""
    label: int | str | None = None
    held_out: bool = False


class Request(NamedTuple):
    """What an input is opened by.

    flag: --input=KIND:WHERE or --test_input=KIND:WHERE, as errors call it. where: its argument.
    captions, caption_feature, follow_outside: as the flags of launch/prepare.py.
    tfds_split: the split to read.
    classes: those of the training input, which a test input must have; None for a training input.
    labels: the class of every image in the order of their keys; None where the input has them.
    """

    flag: str
    where: str
    captions: str = ""
    caption_feature: str = "caption"
    tfds_split: str = "train"
    follow_outside: bool = False
    classes: Sequence[str] | None = None
    labels: Sequence[str] | None = None


class Input(NamedTuple):
    """A list of items.

    read: a function from an item to (image: a file's bytes or [H, W, C] uint8, caption, label).
    classes: their names, in the order of the labels; empty without labels.
    captioned: whether there are captions.
    """

    items: Sequence[Item]
    read: Callable[[Item], tuple[Any, str, int | None]]
    classes: Sequence[str]
    captioned: bool = True


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

    An image that cannot be read or decoded is marked as bad. Raises only what says nothing of the
    image: OSError, EMFILE, and errors of object storage.
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
        if getattr(error, "errno", None) == errno.EMFILE or from_object_storage(error):
            raise
        return Loaded(item.key, None, first_line(error))
    if not text.is_utf8(caption):
        return Loaded(item.key, image, null="not UTF-8", label=label)
    caption = caption.strip()
    null = "" if caption else "empty"
    return Loaded(item.key, image, caption=caption, null=null, label=label)


# For the kinds of input.


def make_input(
    request: Request, name: str, items: list[Item], read: Callable, captioned: bool
) -> Input:
    """An Input of items whose labels are as listed, all integers or names, or all None.

    Integer labels stay; a name becomes its index among the sorted names, or among request.classes.
    An empty label is none. name: the list or input, as errors call it.

    Raises:
      UserError: some items have a label and others none, or one that is no number or name; integers
        out of range; another number of request.labels than of items; a class that the training
        input lacks.
    """
    if request.labels is not None:
        if len(request.labels) != len(items):
            raise UserError(f"--test_labels has {len(request.labels)} lines, and {request.flag} "
                            f"{len(items)} images: give the class of each image on a line")
        items = sorted(items, key=lambda item: item.key)
        items = [item._replace(label=label)
                 for item, label in zip(items, request.labels, strict=True)]
    items = [item._replace(label=None) if item.label == "" else item for item in items]
    labels = {str(item.label) for item in items if item.label is not None}
    if not labels:
        if items:
            check_classes(request, ())
        return Input(items, read, [], captioned)
    wrong = next((item for item in items if not isinstance(item.label, (int, str))), None)
    if wrong:
        raise UserError(
            f"{name} has the label {abbreviate(wrong.label)} for {abbreviate(wrong.key, str)}, and "
            "others have labels: give every row a name or a number"
        )
    texts = {label: label for label in labels}
    if all(re.fullmatch(r"[+-]?\d+", label) for label in labels):
        numbers, limit = {label: int(label) for label in labels}, max(CLASSES, len(items))
        beyond = next((number for number in numbers.values() if not 0 <= number < limit), None)
        if beyond is not None:
            raise UserError(
                f"{name} has the label {beyond}: expected 0 to {limit - 1}, below the number of "
                f"images or {CLASSES}; write other labels as names"
            )
        classes = [str(i) for i in range(max(numbers.values()) + 1)]
        texts = {label: str(number) for label, number in numbers.items()}
    else:
        classes = sorted(labels)
    if request.classes is not None:
        check_classes(request, classes)
        classes = request.classes
    places = {label: place for place, label in enumerate(classes)}
    items = [item._replace(label=places[texts[str(item.label)]]) for item in items]
    return Input(items, read, classes, captioned)


def check_classes(request: Request, found: Sequence[str]) -> None:
    """Raises UserError where a test input has classes that the training input lacks, or none."""
    known = request.classes
    if known is None:
        return
    if known and not found:
        raise UserError(f"{request.flag} has no labels, and the training images have {len(known)} "
                        "classes: put its images into folders of the classes, or give "
                        "--test_labels=FILE, the class of each on a line, in the order of names")
    lacking = sorted(set(found) - set(known))
    if lacking:
        raise UserError(f"{request.flag} has the class {abbreviate(lacking[0], str)}, which the "
                        f"training images lack ({len(lacking)} of {len(found)} classes): give both "
                        "the same names of classes")
