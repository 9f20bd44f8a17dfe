"""Data sets that TensorFlow Datasets prepared, opened without TensorFlow and without running any code that their files name.

No jax is imported: grain's worker processes run this.
"""

import contextlib
import os
import re
import threading
from collections.abc import Iterator

from etils import epath
from PIL import EpsImagePlugin

from ntm_jax.data import regular
from ntm_jax.errors import UserError, first_line

EpsImagePlugin.gs_binary = False  # tfds decodes whatever PIL knows, and PIL would start Ghostscript, a program, for an EPS image
# No namespace, which would make tfds download code, and no arguments of the builder.
_NAME = re.compile(r"[a-z]\w*(/[\w+.-]+)?(:(\d+|\*)(\.(\d+|\*)){2})?", re.ASCII | re.IGNORECASE)
_LOCK = threading.Lock()  # one block of _without_imports at a time


def tfds_builder(where: str):
    """The builder of a prepared data set: a folder with a dataset_info.json, or NAME, NAME/CONFIG, with or without :VERSION.

    Raises:
      UserError: there is none, its files are damaged, or they name a class that is not one of tfds' own features.
    """
    name = f"tfds:{where}"
    with _without_imports() as refused:
        try:
            builder, error = _open(where), None
        except Exception as raised:  # damaged files make tfds and protobuf raise a dozen kinds
            error = raised
    if refused:
        raise UserError(f"{name} names the class {refused[0]} in its features.json or dataset_info.json: expected features of tfds itself, "
                        "for reading it imports no other code; prepare it again with these") from error
    if error:
        reason = first_line(error).rstrip(".")
        raise UserError(f"{name} is neither a data set known to tfds nor a folder with a dataset_info.json: {reason}") from error
    if not builder.info.splits:
        raise UserError(f"{name} is not prepared in {builder.data_path}: set TFDS_DATA_DIR, or prepare it in Python with {_how(where)}")
    return builder


def tfds_data_source(where: str, split: str, **options):
    """Random access to the examples of a split. UserError where the data set's format has none, or it has no such split."""
    builder = tfds_builder(where)
    try:
        return builder.as_data_source(split, **options)
    except NotImplementedError:
        found = builder.info.file_format.value
        raise UserError(
            f"tfds:{where} is prepared as {found}, without random access: prepare it in another folder with {_how(where)}") from None
    except (ValueError, KeyError):
        raise UserError(f"tfds:{where} has no split {split!r}: it has {', '.join([*builder.info.splits, 'all'])}") from None


def _open(where: str):
    import tensorflow_datasets as tfds

    folder = epath.Path(where).expanduser()
    if regular.is_regular(folder / "dataset_info.json"):
        return tfds.builder_from_directory(os.fspath(folder))
    if not _NAME.fullmatch(where):
        raise ValueError("expected NAME, NAME/CONFIG or NAME/CONFIG:VERSION, or such a folder")
    # The variable is given here because tfds itself reads it only once, when it is imported.
    return tfds.builder(where, data_dir=os.environ.get("TFDS_DATA_DIR"))


@contextlib.contextmanager
def _without_imports() -> Iterator[list[str]]:
    """Within the block tfds finds only features that exist already. Yields the names of others that it was asked for.

    A data set's files name the class of each feature: in features.json, in dataset_info.json, in JSON within strings of both. Of a name
    that it does not know, tfds imports the module, whatever that module does.
    """
    from tensorflow_datasets.core.features.feature import FeatureConnector

    refused = []

    def known(python_class_name: str):
        if python_class_name not in FeatureConnector._registered_features:
            if "." in python_class_name:
                refused.append(repr(python_class_name)[:200])
            raise ValueError(f"{python_class_name[:200]!r} is no feature of tfds")
        return FeatureConnector._registered_features[python_class_name]

    with _LOCK:
        importing = vars(FeatureConnector)["cls_from_name"]
        FeatureConnector.cls_from_name = staticmethod(known)
        try:
            yield refused
        finally:
            FeatureConnector.cls_from_name = importing


def _how(where: str) -> str:
    return f"tfds.builder({where!r}, file_format='array_record').download_and_prepare()"
