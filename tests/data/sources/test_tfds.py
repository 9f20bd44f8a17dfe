"""The tfds source on data sets that tfds prepared; hostile ones are in test_foreign_code.py."""

import importlib
import io
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
        assert (train.image_shape, train.num_classes, train.version) == ((6, 6, 3), 3, "1.2.3")
        assert sorted(values(train)) == list(range(10))
        assert sorted(values(test)) == list(range(10, 14))
        assert sorted(values(both)) == list(range(14))
        assert labels(train) == [value % 3 for value in values(train)]
        assert values(pickle.loads(pickle.dumps(train))) == values(train)


def test_what_is_not_prepared_or_without_random_access_is_refused(
    squares_dir, tmp_path, monkeypatch
):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    for file in (squares_dir / "squares" / "1.2.3").glob("*.json"):
        (tmp_path / file.name).write_text(file.read_text().replace("array_record", "tfrecord"))
    for name, place in (("mnist", f"{tmp_path}/mnist/"), (tmp_path, f"{tmp_path}: set ")):
        with pytest.raises(UserError, match=f"is not prepared for random access in {place}"):
            open_source(f"tfds:{name}", "train")


def test_an_eps_image_starts_no_program(monkeypatch):
    # tfds decodes an image's bytes like this, in whatever format they are.
    importlib.import_module("ntm_jax.data.sources.tfds")
    monkeypatch.setattr(subprocess, "check_call", lambda *_, **__: pytest.fail("it was started"))
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    eps = io.BytesIO()
    Image.new("L", (4, 4)).save(eps, "eps")
    with pytest.raises(OSError, match="Ghostscript"):
        Image.open(eps).load()
