"""The tfds source, on data sets that tfds prepared, and on hostile and damaged ones."""

import importlib
import io
import json
import pickle
import shutil
import subprocess

import pytest
from PIL import Image

from ntm_jax.data.sources import open_source
from ntm_jax.errors import UserError
from tests.data.sources.common import labels, values


def test_tfds_by_name_and_by_folder(squares_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(squares_dir))
    for name in ("tfds:squares", f"tfds:{squares_dir / 'squares' / '1.2.3'}"):
        train, test, both = (open_source(name, split) for split in ("train", "test", "all"))
        assert (train.image_shape, train.pixel_levels, train.num_classes) == ((6, 6, 3), 256, 3)
        assert train.version == "1.2.3"
        assert sorted(values(train)) == list(range(10))
        assert sorted(values(test)) == list(range(10, 14))
        assert sorted(values(both)) == list(range(14))
        assert labels(train) == [value % 3 for value in values(train)]
        assert values(open_source(name, "train[50%:]")) == values(train)[5:]
        assert open_source(name, "all[:12]", image_size=4).records[11]["image"].shape == (4, 4, 3)
        assert values(pickle.loads(pickle.dumps(train))) == values(train)


def test_what_is_not_prepared_or_without_random_access_is_refused(
    squares_dir, tmp_path, monkeypatch
):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    for file in (squares_dir / "squares" / "1.2.3").glob("*.json"):
        (tmp_path / file.name).write_text(file.read_text().replace("array_record", "tfrecord"))
    for name, message in (
        ("mnist", rf"is not prepared for random access in {tmp_path}/mnist/.*'array_record'"),
        (tmp_path, f"is not prepared for random access in {tmp_path}: set TFDS_DATA_DIR"),
    ):
        with pytest.raises(UserError, match=f"^tfds:{name} {message}"):
            open_source(f"tfds:{name}", "train")


FOREIGN = {"type": "foreign_module.Feature", "content": {}}
HOSTILE = {  # files of a data set that name a class, in JSON within a string as well
    "features.json": {
        "pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
        "jsonFeature": {"json": json.dumps({"image": FOREIGN})}},
    "dataset_info.json": {
        "features": {"pythonClassName": FOREIGN["type"], "jsonFeature": {"json": "{}"}}},
}


@pytest.fixture
def imported(tmp_path, monkeypatch):
    """A function that returns whether foreign_module, which can be imported here, was imported."""
    marker = tmp_path / "imported"
    for name in ("foreign_module.py", "foreign_module_dataset_builder.py"):
        (tmp_path / name).write_text(f"open({str(marker)!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(tmp_path)
    return marker.exists


@pytest.mark.parametrize("file", HOSTILE)
def test_tfds_imports_no_module_that_a_folder_names(
    squares_dir, tmp_path, monkeypatch, imported, file
):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))
    folder = tmp_path / "data" / "hostile" / "1.2.3"
    shutil.copytree(squares_dir / "squares" / "1.2.3", folder)
    for part in folder.glob("squares-*"):
        part.rename(folder / part.name.replace("squares", "hostile"))
    info = json.loads((folder / "dataset_info.json").read_text())
    info |= {"name": "hostile", "moduleName": "foreign_module"}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    # A module's name alone does not matter: this folder opens. What is written next is refused.
    assert len(open_source(f"tfds:{folder}", "train").records) == 10
    there = info if file == "dataset_info.json" else {}
    (folder / file).write_text(json.dumps(there | HOSTILE[file]))
    for name in (f"tfds:{folder}", "tfds:hostile:1.2.3"):
        message = f"^{name} is neither .*'foreign_module.Feature', which its files name, is no"
        with pytest.raises(UserError, match=message):
            open_source(name, "train")
    assert not imported()


@pytest.mark.parametrize("name", ["huggingface:foreign_module", "squares/data_dir=."])
def test_tfds_accepts_only_its_own_names(squares_dir, monkeypatch, imported, name):
    monkeypatch.setenv("TFDS_DATA_DIR", str(squares_dir))
    message = rf"^tfds:{name} is neither a data set known to tfds nor a folder"
    with pytest.raises(UserError, match=message):
        open_source(f"tfds:{name}", "train")
    assert not imported()


def test_an_eps_image_starts_no_program(monkeypatch):
    # tfds decodes an image's bytes like this, in whatever format they are.
    importlib.import_module("ntm_jax.data.sources.tfds")
    monkeypatch.setattr(subprocess, "check_call", lambda *_, **__: pytest.fail("it was started"))
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    eps = io.BytesIO()
    Image.new("L", (4, 4)).save(eps, "eps")
    with pytest.raises(OSError, match="Ghostscript"):
        Image.open(eps).load()
