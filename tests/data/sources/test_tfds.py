"""The tfds source, on data sets that tfds prepared, and on hostile and damaged ones."""

import importlib
import io
import json
import pickle
import re
import shutil
import subprocess

import pytest
import tensorflow_datasets as tfds
from PIL import Image

from ntm_jax.data.prepare import inputs
from ntm_jax.data.sources import open_source
from ntm_jax.errors import UserError
from tests.data.sources.common import labels, values


class Squares(tfds.core.GeneratorBasedBuilder):
    """Grey levels as images: 10 to train on, 4 to test."""

    VERSION = tfds.core.Version("1.2.3")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(num_classes=3),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(0, 10), "test": self._generate_examples(10, 14)}

    def _generate_examples(self, first, last):
        for i in range(first, last):
            file = io.BytesIO()
            Image.new("RGB", (6, 6), (i, i, i)).save(file, "png")
            file.seek(0)
            yield i, {"image": file, "label": i % 3}


@pytest.fixture(scope="module")
def squares_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    Squares(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def test_tfds_by_name_and_by_folder(squares_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(squares_dir))
    for name in ("tfds:squares", f"tfds:{squares_dir / 'squares' / '1.2.3'}"):
        train, test, both = (open_source(name, split) for split in ("train", "test", "all"))
        assert (train.image_shape, train.pixel_levels, train.num_classes, train.version) == (
            (6, 6, 3),
            256,
            3,
            "1.2.3",
        )
        assert sorted(values(train)) == list(range(10))
        assert sorted(values(test)) == list(range(10, 14))
        assert sorted(values(both)) == list(range(14))
        assert labels(train) == [value % 3 for value in values(train)]
        assert values(open_source(name, "train[50%:]")) == values(train)[5:]
        assert open_source(name, "all[:12]", image_size=4).records[11]["image"].shape == (4, 4, 3)
        assert values(pickle.loads(pickle.dumps(train))) == values(train)
        with pytest.raises(UserError, match=r"has no split 'validation': it has train, test, all$"):
            open_source(name, "validation")


def test_tfds_not_prepared(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(
        UserError,
        match=rf"tfds:mnist is not prepared in {tmp_path}/mnist/.*file_format='array_record'",
    ):
        open_source("tfds:mnist", "train")


def test_tfds_without_random_access(squares_dir, tmp_path):
    folder = tmp_path / "1.2.3"
    folder.mkdir()
    for file in (squares_dir / "squares" / "1.2.3").glob("*.json"):
        (folder / file.name).write_text(file.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match=r"is prepared as tfrecord, without random access"):
        open_source(f"tfds:{folder}", "train")


FEATURES = "tensorflow_datasets.core.features.features_dict.FeaturesDict"
FOREIGN = {"pythonClassName": "foreign_module.Feature", "jsonFeature": {"json": "{}"}}
HOSTILE = {  # ways to name a class in a data set's files
    "feature": ("features.json", FOREIGN),
    "nested": (
        "features.json",
        {"pythonClassName": FEATURES, "featuresDict": {"features": {"image": FOREIGN}}},
    ),
    "in a string": (
        "features.json",
        {
            "pythonClassName": FEATURES,
            "jsonFeature": {
                "json": json.dumps({"image": {"type": "foreign_module.Feature", "content": {}}})
            },
        },
    ),
    "old": (
        "features.json",
        {"type": FEATURES, "content": {"image": {"type": "foreign_module.Feature", "content": {}}}},
    ),
    "old, in a string": (
        "features.json",
        {
            "type": FEATURES,
            "proto_cls": "tensorflow_datasets.FeaturesDict",
            "content": json.dumps({"features": {"image": FOREIGN}}),
        },
    ),
    "info": ("dataset_info.json", {"features": FOREIGN}),
}


@pytest.fixture
def imported(tmp_path, monkeypatch):
    """A function that returns whether foreign_module, which can be imported here, was imported."""
    marker = tmp_path / "imported"
    for name in ("foreign_module.py", "foreign_module_dataset_builder.py"):
        (tmp_path / name).write_text(f"open({str(marker)!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(tmp_path)
    return marker.exists


@pytest.mark.parametrize("way", HOSTILE)
def test_tfds_imports_no_module_that_a_folder_names(
    squares_dir, tmp_path, monkeypatch, imported, way
):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))
    file, content = HOSTILE[way]
    folders = [tmp_path / "data" / name / "1.2.3" for name in ("hostile", "squares")]
    for folder in folders:
        shutil.copytree(squares_dir / "squares" / "1.2.3", folder)
        info = json.loads((folder / "dataset_info.json").read_text()) | {
            "name": folder.parent.name,
            "moduleName": "foreign_module",
        }
        (folder / "dataset_info.json").write_text(json.dumps(info))
        for part in folder.glob("squares-*"):
            part.rename(folder / part.name.replace("squares", folder.parent.name))
    # A module's name alone does not matter: this folder opens. Those written next are refused.
    assert len(open_source(f"tfds:{folders[0]}", "train").records) == 10
    for folder in folders:
        there = json.loads((folder / file).read_text()) if file == "dataset_info.json" else {}
        (folder / file).write_text(json.dumps(there | content))
    for name in (f"tfds:{folders[0]}", "tfds:hostile", "tfds:hostile:1.2.3", "tfds:squares:1.2.3"):
        for opened in (
            lambda name=name: open_source(name, "train"),
            lambda name=name: inputs.open_input(name, feature="label"),
        ):
            with pytest.raises(
                UserError,
                match=rf"^{name} names the class 'foreign_module.Feature' in its features.json or",
            ) as error:
                opened()
            assert "\n" not in str(error.value)
    assert not imported()


@pytest.mark.parametrize(
    "name",
    [
        "foreign_module",
        "huggingface:foreign_module",
        "squares/data_dir=.",
        "../foreign_module",
    ],
)
def test_tfds_accepts_only_its_own_names(squares_dir, monkeypatch, imported, name):
    monkeypatch.setenv("TFDS_DATA_DIR", str(squares_dir))
    for opened in (
        lambda: open_source(f"tfds:{name}", "train"),
        lambda: inputs.open_input(f"tfds:{name}"),
    ):
        with pytest.raises(
            UserError,
            match=rf"^tfds:{re.escape(name)} is neither a data set known to tfds nor a folder",
        ) as error:
            opened()
        assert "\n" not in str(error.value)
    assert not imported()


def test_an_eps_image_starts_no_program(monkeypatch):
    # tfds decodes an image's bytes like this, in whatever format they are.
    importlib.import_module("ntm_jax.data.sources.tfds")
    monkeypatch.setattr(
        subprocess, "check_call", lambda *_, **__: pytest.fail("a program was started")
    )
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    eps = io.BytesIO()
    Image.new("L", (4, 4)).save(eps, "eps")
    with pytest.raises(OSError, match="Ghostscript"):
        Image.open(eps).load()


@pytest.mark.parametrize("file", ["features.json", "dataset_info.json"])
def test_damaged_files_of_tfds_are_refused_in_one_line(squares_dir, tmp_path, file):
    folder = shutil.copytree(squares_dir / "squares" / "1.2.3", tmp_path / "1.2.3")
    (folder / file).write_bytes(b"[]")
    with pytest.raises(
        UserError,
        match=rf"^tfds:{folder} is neither a data set known to tfds nor a folder with a "
        r"dataset_info",
    ) as error:
        open_source(f"tfds:{folder}", "train")
    assert "\n" not in str(error.value)
