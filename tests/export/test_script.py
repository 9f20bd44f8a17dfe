"""sample.py makes the run's images without this package, and shows what it was asked for."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from ntm_jax.core.conditions import Text
from ntm_jax.export import sample_script
from ntm_jax.runtime import plots
from tests.common import alike, environment
from tests.export.common import assert_close, run_script

BLOCKED = """
import runpy, sys
blocked = ("ntm_jax", "flax", "optax", "orbax", "grain", "ml_collections", "absl")
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Block())
try:
    import ntm_jax
except ImportError:
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_script_runs_without_the_package(run, exported, tmp_path):
    command = [sys.executable, "-I", "-c", BLOCKED, str(exported / "sample.py"), "5", "3"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert (done.stdout, done.returncode) == (
        "5 images uint8[8, 8, 1] in samples.npz and samples/\n", 0), done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["samples", "samples.npz"]
    with np.load(tmp_path / "samples.npz") as archive:
        images = archive["images"]
    files = sorted((tmp_path / "samples").iterdir())
    assert [path.name for path in files] == [f"{i:06d}.png" for i in range(5)]
    for path, image in zip(files, images, strict=True):
        shown = plots.displayable(image, run.spec.pixel_levels)[..., 0]
        np.testing.assert_array_equal(np.asarray(Image.open(path)), shown)
    assert alike(images, run.sample_at(np.arange(5), seed=3))


def test_the_script_shows_the_classes_that_it_is_given_in_parts(run, exported):
    out, images = run_script(exported, "205", "3", "7,2")
    assert out == "205 images uint8[8, 8, 1] in samples.npz and samples/\n"
    assert images.shape == (205, 8, 8, 1)
    assert alike(images[:5], run.sample_at(np.arange(5), [7, 2, 7, 2, 7], seed=3))
    assert (images[100:200] != images[:100]).any()


@pytest.mark.slow
def test_the_script_of_a_model_of_texts(on_texts):
    """Its condition is the null caption."""
    run, folder = on_texts
    _, images = run_script(folder, "4")
    null = Text(np.zeros((4, 3, 8), np.float16), np.zeros((4, 3), bool))
    assert_close(images, run.sample_at(np.arange(4), null))


def test_the_script_refuses_another_class(exported, monkeypatch, capsys):
    monkeypatch.setattr(sample_script, "FOLDER", exported)
    with pytest.raises(SystemExit) as end:
        sample_script.main(["1", "2", "cat"])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: CLASSES has 'cat': expected of 0, 1, 2")
