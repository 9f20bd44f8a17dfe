"""The source `tfds:NAME_OR_BUILDER_DIR`: image data sets that TensorFlow Datasets prepared.

They are opened without TensorFlow and without running any code that their files name, and must be
prepared in a format with random access, array_record. A name is looked up under TFDS_DATA_DIR; a
folder is the builder's own. Splits: those of the data set, and all. No jax is imported: grain's
worker processes run this.
"""

import contextlib
import functools
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath
from PIL import EpsImagePlugin

from ntm_jax.data.sources.source import Lazy, Source, check_split
from ntm_jax.errors import UserError, first_line
from ntm_jax.files import regular

# tfds decodes every format that PIL knows, and PIL would start the program Ghostscript for an EPS
# image.
EpsImagePlugin.gs_binary = False
# No namespace, which would make tfds download code, and no arguments of the builder.
_NAME = re.compile(r"[a-z]\w*(/[\w+.-]+)?(:(\d+|\*)(\.(\d+|\*)){2})?", re.ASCII | re.IGNORECASE)


def _record(examples: Sequence, labelled: bool, index: int) -> dict[str, Any]:
    example = examples[index]
    return {"image": example["image"], "label": example["label"] if labelled else -1}


def open_tfds(where: str, split: str) -> Source:
    """Opens a split of the data set `where`, NAME or a builder's folder."""
    name, builder = f"tfds:{where}", builder_of(where)
    check_split(name, split, [*builder.info.splits, "all"])
    features = builder.info.features
    is_image = "image" in features and features["image"].np_dtype == np.uint8
    if not is_image or len(features["image"].shape) != 3:
        raise UserError(
            f"{name} has no feature 'image' of height, width and channels in uint8: its features "
            f"are {', '.join(features)}"
        )
    classes = class_names(features)
    examples = builder.as_data_source(split)
    return Source(
        Lazy(functools.partial(_record, examples, bool(classes)), range(len(examples))),
        features["image"].shape,
        pixel_levels=256,
        num_classes=len(classes),
        class_names=classes,
        version=str(builder.version),
    )


def class_names(features) -> tuple[str, ...]:
    """The names of the classes of the feature "label", if it is there and has any."""
    if "label" not in features or not getattr(features["label"], "num_classes", None):
        return ()
    return tuple(features["label"].names)


def builder_of(where: str) -> Any:
    """The builder of a data set that is prepared with random access, a tfds.core.DatasetBuilder.

    Its type is Any, since tfds annotates attributes with types that lack their methods.

    Args:
      where: a folder with a dataset_info.json, or NAME or NAME/CONFIG, with or without :VERSION.
    Raises:
      UserError: there is no such data set, its files are damaged, or they name a class that is not
        one of tfds' own features.
    """
    import tensorflow_datasets as tfds

    folder = epath.Path(where).expanduser()
    try:
        with _without_imports():
            if (folder / "dataset_info.json").is_file():
                for name in "dataset_info.json", "features.json":
                    regular(folder / name)
                builder: Any = tfds.builder_from_directory(os.fspath(folder))
            elif _NAME.fullmatch(where):
                # tfds itself reads the variable only once, when it is imported.
                builder = tfds.builder(where, data_dir=os.environ.get("TFDS_DATA_DIR"))
            else:
                raise ValueError("expected NAME, NAME/CONFIG or NAME/CONFIG:VERSION")
            formats = builder.info.available_file_formats()
    except Exception as error:  # damaged files make tfds and protobuf raise a dozen kinds
        raise UserError(
            f"tfds:{where} is neither a data set known to tfds nor a folder with a "
            f"dataset_info.json: {first_line(error).rstrip('.')}"
        ) from error
    if not builder.info.splits or not formats & tfds.core.FileFormat.with_random_access():
        raise UserError(
            f"tfds:{where} is not prepared for random access in {builder.data_path}: set "
            "TFDS_DATA_DIR, or prepare it in Python, in another folder, with "
            f"tfds.builder({where!r}, file_format='array_record').download_and_prepare()"
        )
    return builder


@contextlib.contextmanager
def _without_imports() -> Iterator[None]:
    """Within the block tfds finds only features that are registered already.

    It would import the module of every other feature that a data set's files name, whatever that
    module does. They do so in features.json, in dataset_info.json, and in JSON within strings.
    """
    from tensorflow_datasets.core.features.feature import FeatureConnector

    def registered(python_class_name: str):
        known, name = FeatureConnector._registered_features, python_class_name
        if name not in known:
            raise ValueError(f"{name[:200]!r}, which its files name, is no feature of tfds")
        return known[name]

    importing = vars(FeatureConnector)["cls_from_name"]
    FeatureConnector.cls_from_name = staticmethod(registered)
    try:
        yield
    finally:
        FeatureConnector.cls_from_name = importing
