"""The input `tfds:NAME_OR_BUILDER_DIR`: a TensorFlow data set with captions, labels or both."""

import functools
from collections.abc import Sequence
from typing import Any

from ntm_jax.data.caption_lists import caption_of
from ntm_jax.data.sources import tfds as source
from ntm_jax.errors import UserError, first_line
from ntm_jax.tools.prepare.captioned import Input, Item, Request, check_classes


def open_tfds(asked: Request) -> Input:
    """Lists the records of a split; see inputs.open_input."""
    where, split = asked.where, asked.tfds_split
    builder = source.builder_of(where)
    name, features = f"tfds:{where}", builder.info.features
    if "image" not in features:
        raise UserError(f"{name} has no feature 'image': its features are {', '.join(features)}")
    classes = source.class_names(features)
    feature = _captions(name, features, asked.caption_feature, bool(classes))
    try:
        count = len(_examples(where, split))
    except ValueError as error:  # tfds has an arithmetic of splits
        raise UserError(f"the split {split} of {asked.flag}: {first_line(error)}") from None
    if asked.classes is not None and list(asked.classes) != list(classes):
        check_classes(asked, classes)
        raise UserError(f"{asked.flag} numbers its classes otherwise than the training images: "
                        "give both as one data set")
    read = functools.partial(_read_example, where, split, feature, bool(classes))
    return Input([Item(str(i), i) for i in range(count)], read, classes, bool(feature))


def _captions(name: str, features, feature: str, labelled: bool) -> list[str]:
    """The path of the feature of captions; [] for the default one where there are labels alone."""
    inner, path = features, feature.split("/")
    for part in path:
        if part not in inner:
            if labelled and feature == "caption":
                return []
            raise UserError(
                f"{name} has no feature {feature!r} of captions: it has {', '.join(features)}; "
                "give --caption_feature"
            )
        inner = getattr(inner[part], "feature", inner[part])  # a sequence's element
        inner = inner if hasattr(inner, "keys") else {}
    return path


@functools.cache
def _examples(where: str, split: str):
    import tensorflow_datasets as tfds

    return source.builder_of(where).as_data_source(
        split, decoders={"image": tfds.decode.SkipDecoding()})


def _read_example(
    where: str, split: str, feature: Sequence[str], labelled: bool, item: Item
) -> tuple[bytes, str, int | None]:
    example = _examples(where, split)[item.image]
    caption: Any = example if feature else ""
    for part in feature:
        found: Any = caption[part]
        caption = found[0] if isinstance(found, (list, tuple)) and found else found
    label = int(example["label"]) if labelled else None
    return example["image"], caption_of(caption), label
