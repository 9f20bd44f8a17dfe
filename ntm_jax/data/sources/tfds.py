"""The source `tfds:NAME_OR_BUILDER_DIR`: image data sets that TensorFlow Datasets prepared.

They are opened without TensorFlow and without running any code that their files name, and must be
prepared in a format with random access, array_record. A name is looked up under TFDS_DATA_DIR; a
folder is the builder's own. Splits: those of the data set, and all. No jax is imported: grain's
worker processes run this.
"""

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath
from PIL import EpsImagePlugin

from ntm_jax.data.sources.source import Source, SplitError, check_split
from ntm_jax.errors import UserError, first_line

# tfds decodes every format that PIL knows, and PIL would start the program Ghostscript for an EPS
# image.
EpsImagePlugin.gs_binary = False
# No namespace, which would make tfds download code, and no arguments of the builder.
_NAME = re.compile(r"[a-z]\w*(/[\w+.-]+)?(:(\d+|\*)(\.(\d+|\*)){2})?", re.ASCII | re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class _Records:
    data_source: Any
    labelled: bool

    def __len__(self) -> int:
        return len(self.data_source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.data_source[index]
        return {"image": example["image"], "label": example["label"] if self.labelled else -1}


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
    classes = num_classes(features)
    return Source(
        _Records(data_source(where, split), labelled=classes > 0),
        features["image"].shape,
        pixel_levels=256,
        num_classes=classes,
        class_names=tuple(features["label"].names) if classes else (),
        version=str(builder.version),
    )


def num_classes(features) -> int:
    """The number of classes of the feature "label"; 0 without such a feature or without classes."""
    return (getattr(features["label"], "num_classes", None) or 0) if "label" in features else 0


def builder_of(where: str) -> Any:
    """The builder of a prepared data set, a tfds.core.DatasetBuilder.

    Its type is Any, since tfds annotates attributes with types that lack their methods.

    Args:
      where: a folder with a dataset_info.json, or NAME or NAME/CONFIG, with or without :VERSION.
    Raises:
      UserError: there is no such data set, its files are damaged, or they name a class that is not
        one of tfds' own features.
    """
    name = f"tfds:{where}"
    with _without_imports() as refused:
        try:
            builder, error = _open(where), None
        except Exception as raised:  # damaged files make tfds and protobuf raise a dozen kinds
            error = raised
    if refused:
        raise UserError(
            f"{name} names the class {refused[0]} in its features.json or dataset_info.json: "
            "expected features of tfds itself, for reading it imports no other code; prepare it "
            "again with these"
        ) from error
    if error:
        reason = first_line(error).rstrip(".")
        raise UserError(
            f"{name} is neither a data set known to tfds nor a folder with a dataset_info.json: "
            f"{reason}"
        ) from error
    if not builder.info.splits:
        raise UserError(
            f"{name} is not prepared in {builder.data_path}: set TFDS_DATA_DIR, or prepare it in "
            f"Python with {_command(where)}"
        )
    return builder


def data_source(where: str, split: str, **options):
    """Random access to the examples of a split.

    Raises:
      UserError: as `builder_of`; the data set's format has no random access, or it has no such
        split.
    """
    builder = builder_of(where)
    try:
        return builder.as_data_source(split, **options)
    except NotImplementedError:
        found = builder.info.file_format.value
        raise UserError(
            f"tfds:{where} is prepared as {found}, without random access: prepare it in another "
            f"folder with {_command(where)}"
        ) from None
    except (ValueError, KeyError):
        existing = ", ".join([*builder.info.splits, "all"])
        raise SplitError(f"tfds:{where} has no split {split!r}: it has {existing}") from None


def _open(where: str):
    import tensorflow_datasets as tfds

    folder = epath.Path(where).expanduser()
    if (folder / "dataset_info.json").is_file():
        return tfds.builder_from_directory(os.fspath(folder))
    if not _NAME.fullmatch(where):
        raise ValueError("expected NAME, NAME/CONFIG or NAME/CONFIG:VERSION, or such a folder")
    # The variable is passed on because tfds itself reads it only once, when it is imported.
    return tfds.builder(where, data_dir=os.environ.get("TFDS_DATA_DIR"))


@contextlib.contextmanager
def _without_imports() -> Iterator[list[str]]:
    """Within the block tfds finds only features that are registered already.

    Yields the names of other features that a data set's files name. They do so in features.json, in
    dataset_info.json, and in JSON within strings of both. tfds imports the module of every unknown
    name, whatever that module does.
    """
    from tensorflow_datasets.core.features.feature import FeatureConnector

    refused = []

    def registered(python_class_name: str):
        if python_class_name not in FeatureConnector._registered_features:
            if "." in python_class_name:
                refused.append(repr(python_class_name)[:200])
            raise ValueError(f"{python_class_name[:200]!r} is no feature of tfds")
        return FeatureConnector._registered_features[python_class_name]

    importing = vars(FeatureConnector)["cls_from_name"]
    FeatureConnector.cls_from_name = staticmethod(registered)
    try:
        yield refused
    finally:
        FeatureConnector.cls_from_name = importing


def _command(where: str) -> str:
    return f"tfds.builder({where!r}, file_format='array_record').download_and_prepare()"
