"""sample.py and the model card's example make the run's images without this package."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from ntm_jax.core.transformer.conditions import Text
from ntm_jax.export import sample_script
from ntm_jax.runtime import plots
from tests.campaigns import exports
from tests.common import alike
from tests.export.common import assert_close, refused_by_script, run_alone


def test_the_script_runs_without_the_package(run, exported, tmp_path):
    (tmp_path / "samples").mkdir()
    of_six_images = sample_script.png(np.zeros((8, 8, 1), np.uint8))
    (tmp_path / "samples/000005.png").write_bytes(of_six_images)
    np.savez(tmp_path / "samples.npz", images=np.zeros(6))
    (tmp_path / "samples/grid.png").write_text("another's, of a name that the script does not take")
    printed = run_alone(exported, tmp_path, "5", "3")
    assert printed == "5 images uint8[8, 8, 1] in samples.npz and samples/\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["samples", "samples.npz"]
    with np.load(tmp_path / "samples.npz") as archive:
        images = archive["images"]
    (tmp_path / "samples/grid.png").unlink()
    files = sorted((tmp_path / "samples").iterdir())
    assert [path.name for path in files] == [f"{i:06d}.png" for i in range(5)]
    for path, image in zip(files, images, strict=True):
        shown = plots.displayable(image, run.spec.pixel_levels)[..., 0]
        np.testing.assert_array_equal(np.asarray(Image.open(path)), shown)
    expected = run.sample_at(np.arange(5), seed=3)
    assert images.shape == expected.shape
    assert alike(images, expected)


@pytest.mark.parametrize("name", ["samples/000001.png", "samples/000005.png", "samples.npz"])
def test_the_script_leaves_the_files_of_others(exported, tmp_path, monkeypatch, name):
    """The files are such as launch.sample writes."""
    (tmp_path / "samples").mkdir()
    if name == "samples.npz":
        np.savez(tmp_path / name, np.zeros((2, 8, 8, 3), np.uint8))
    else:
        Image.new("L", (8, 8)).save(tmp_path / name)
    before = (tmp_path / name).read_bytes()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample_script, "FOLDER", exported)
    with pytest.raises(sample_script.Mistake, match="was not written by this script"):
        sample_script.main(["2"])
    assert (tmp_path / name).read_bytes() == before
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1


@pytest.mark.slow
def test_the_script_of_a_model_of_texts(on_texts):
    """Its condition is the null caption."""
    run, folder = on_texts
    _, _, _, images = exports.run_script(folder, "4")
    null = Text(np.zeros((4, 3, 8), np.float16), np.zeros((4, 3), bool))
    assert_close(images, run.sample_at(np.arange(4), null))


def test_the_example_of_the_card_makes_the_images_of_the_script(exported, monkeypatch):
    card = (exported / "README.md").read_text()
    example, likelihood = re.findall(r"```python\n(.*?)```", card, re.S)
    monkeypatch.chdir(exported)
    found, asked = {}, "number, seed = 16, 0\n"
    assert asked in example
    exec(example.replace(asked, "number, seed = 5, 3\n") + likelihood, found)
    status, out, _, images = exports.run_script(exported, "5", "3")
    assert (status, out) == (0, "5 images uint8[8, 8, 1] in samples.npz and samples/\n")
    np.testing.assert_array_equal(images, found["images"])
    assert found["nats"].shape == (5,)


def test_the_script_makes_many_images_in_parts(run, exported):
    _, out, _, images = exports.run_script(exported, "205", "3")
    assert out == "205 images uint8[8, 8, 1] in samples.npz and samples/\n"
    assert images.shape == (205, 8, 8, 1)
    assert alike(images[:5], run.sample_at(np.arange(5), seed=3))
    assert (images[100:200] != images[:100]).any()


def test_the_script_shows_the_classes_that_it_is_given(run, exported):
    *_, images = exports.run_script(exported, "5", "3", "7,2")
    expected = run.sample_at(np.arange(5), [7, 2, 7, 2, 7], seed=3)
    assert alike(images, expected)


ABOUT = {"config": {"model": {"condition": "vector"}}, "spec": {
    "columns": 1, "mean": [1.4e9], "std": [300.0], "condition_width": 2,
    "condition_mean": [1.4e9, 1.0], "condition_std": [300.0, 2.0]}}


def test_samples_of_an_array_are_as_fine_as_the_models_own_numbers():
    """float32 resolves 1.4e9 to 128 only."""
    rows = np.random.default_rng(0).normal(size=(50, 1)).astype(np.float32)
    sampler = SimpleNamespace(call=lambda *arguments: rows)
    samples = sample_script.sample(sampler, {}, ABOUT, 50, 0)
    np.testing.assert_allclose((samples - 1.4e9) / 300, rows, atol=1e-8)


def test_a_vector_is_given_in_its_own_units():
    chosen = sample_script.parse_vector("1400000150,-2", ABOUT)
    found, = sample_script.condition(ABOUT, np.arange(3), chosen)
    np.testing.assert_array_equal(found, np.array([[0.5, -1.5]] * 3, np.float32), strict=True)


@pytest.mark.parametrize("text", ["1", "1,2,3", "1,x", "1,", "", "nan,1", "1e999,1", "1,1e300"])
def test_a_vector_of_other_numbers_is_refused(text):
    message = (f"^CONDITION is '{text}': expected 2 numbers, separated by commas, in the units of "
               "the training conditions$")
    with pytest.raises(sample_script.Mistake, match=message):
        sample_script.parse_vector(text, ABOUT)


ARGUMENTS = {
    "abc": "NUMBER is 'abc': expected a whole number from 1 to 1000000",
    "-1": "NUMBER is '-1'",
    "1.5": "NUMBER is '1.5'",
    "0": "NUMBER is '0'",
    "9" * 5000: f"NUMBER is '{'9' * 37}...'",
    "1000001": "NUMBER is '1000001'",
    "": "NUMBER is ''",
    "1\n": r"NUMBER is '1\n'",
    "1 -1": "SEED is '-1': expected a whole number from 0 to 4294967295",
    "1 4294967296": "SEED is '4294967296'",
    "1 2 cat": "CLASSES has 'cat': expected of 0 to 9",
    "1 2 3 4": "4 arguments are given: expected at most three, python sample.py [NUMBER [SEED "}


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=lambda text: repr(text[:12]))
def test_the_script_refuses_other_arguments(exported, arguments):
    refused_by_script(exported, ARGUMENTS[arguments], *arguments.split(" "))


def test_the_script_on_a_full_disk(exported, monkeypatch):
    def fail(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    message = ("samples.npz cannot be written here (No space left on device): run this in a folder "
               "that you may write to, on a disk with space left")
    refused_by_script(exported, message, "2", "3")
