"""Settings that are chosen for a data set."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import ntm_jax
from ntm_jax import files
from ntm_jax.data import choices, pipeline
from ntm_jax.errors import UserError
from ntm_jax.experiments import captions, folder
from ntm_jax.runtime import config, config_file
from ntm_jax.runtime.checkpoint import Checkpoints
from tests.common import tiny_config


def write_images(root, count, size=(50, 40), classes=("cats", "dogs"), mode="RGB"):
    """A folder of `count` images a class; the heights of images differ by one pixel."""
    rng = np.random.default_rng(0)
    for name in classes:
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (size[1] + i % 2, size[0], 3), np.uint8)
            Image.fromarray(pixels).convert(mode).save(root / name / f"{i}.png")
    return f"folder:{root}"


def chosen(experiment, source: str, accelerator: bool = False, **given) -> dict:
    """The settings chosen for a source, where `given` are set on the command line."""
    c = experiment.get_config()
    c.data.source = source
    c.update_from_flattened_dict(given)
    return choices.choose(config.flatten(c.to_dict()), accelerator)[0]


def test_settings_suit_a_folder_of_images_with_classes(tmp_path):
    source = write_images(tmp_path, 30)
    found = chosen(folder, source)
    assert found == {
        "data.image_size": 32, "data.patch_size": 8, "data.batch_size": 32,
        "model.data_std": found["model.data_std"], "model.pixel_likelihood": "learned",
        "model.condition": "class",
        "train.condition_dropout": 0.1, "evaluate.num_samples": 200, "evaluate.batch_size": 6,
        "sample.num": 20, "sample.guidance": 0.2}
    assert 0.1 < found["model.data_std"] < 0.7  # uniform pixels have 0.58, and resizing blurs
    found = chosen(folder, source, **{"data.image_size": 8, "model.condition": "none"})
    assert found.keys().isdisjoint({"data.image_size", "model.condition"})  # what is given stays
    assert (found["data.patch_size"], found["train.condition_dropout"]) == (2, 0.0)
    found = chosen(folder, source, **{"data.image_size": 128})  # too large for a histogram
    assert found["model.pixel_likelihood"] == "binned"


def test_an_accelerator_takes_larger_images_and_batches_and_small_images_stay(tmp_path):
    source = write_images(tmp_path / "large", 100, (80, 70), ("cats",), "L")
    found = chosen(folder, source, accelerator=True)
    assert (found["data.image_size"], found["data.patch_size"]) == (64, 8)
    assert found["data.batch_size"] == 90  # the training images
    assert (found["model.condition"], found["evaluate.num_samples"]) == ("none", 0)
    found = chosen(folder, write_images(tmp_path / "small", 10, (21, 22)))
    assert (found["data.image_size"], found["data.patch_size"]) == (20, 5)


def captioned(tmp_path, text):
    """A folder of 20 images, the caption of image i `text(i)`."""
    lines = [{"file_name": f"all/{i}.png", "caption": text(i)} for i in range(20)]
    source = write_images(tmp_path / "captioned", 20, classes=("all",))
    (tmp_path / "captioned/metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return source


@pytest.mark.parametrize(("shape", "dtype", "size", "patch", "remark"), [
    ((20, 28), np.float32, 0, 4, ""),  # patches divide both sides
    ((28, 20), np.uint8, 0, 4, ""),
    ((22, 28), np.uint8, 20, 5, " (the central square of each image is taken)"),
    ((32, 64), np.uint8, 32, 8, " (the central square of each image is taken)"),
    ((22, 22), np.uint8, 20, 5, ""),
])
def test_python_prints_the_choices_for_arrays_that_are_not_square(
        shape, dtype, size, patch, remark, capsys):
    images = np.random.default_rng(0).integers(0, 256, (9, *shape)).astype(dtype)
    found = ntm_jax.experiment("folder", data=images)
    assert (found.data.image_size, found.data.patch_size) == (size, patch)
    printed = capsys.readouterr().out
    assert printed.startswith(f"chosen for the data: --config.data.image_size={size} --config.data."
                              f"patch_size={patch} ")
    assert printed.endswith(f"--config.sample.guidance=0.0{remark}\n")
    pipeline.spec(found.data.open("train"), patch)  # refuses a patch that does not divide


@pytest.mark.parametrize(("text", "encoder"), [
    (lambda i: f"A {'red' if i % 2 else 'blue, old'} house.", "words:4:a blue house old red"),
    (lambda i: " ".join(f"w{20 * i + j}" for j in range(20)), "minilm"),  # for many words
])
def test_an_encoder_suits_the_words(tmp_path, text, encoder):
    assert chosen(captions, captioned(tmp_path, text))["data.text_encoder"] == encoder


def test_mistakes_say_what_is_missing(tmp_path):
    source = write_images(tmp_path, 5, (21, 22))
    np.savez(tmp_path / "table.npz", data=np.random.default_rng(0).normal(size=(9, 128)))
    for experiment, given, message in (
        (folder, {"data.source": ""}, r"give your images, --config\.data\.source=folder:PATH"),
        (folder, {"data.source": f"npz:{tmp_path}/table.npz"},
         r"is a table \[n, 128\], .* of images: take the experiment arrays, or reshape"),
        (captions, {}, r"has no captions: put a metadata\.jsonl into it"),
    ):
        with pytest.raises(UserError, match=message):
            chosen(experiment, source, **given)


def test_a_resumed_run_keeps_its_own_choices(tmp_path, capsys):
    settings = tiny_config(**{"evaluate.batch_size": 7})
    spec = pipeline.spec(settings.data.open("train"), settings.data.patch_size)
    config_file.write(str(tmp_path), settings, spec)
    content = json.loads((tmp_path / "config.json").read_text())
    del content["model"]["pixel_likelihood"], content[files.SEAL]  # as earlier versions wrote it
    files.write_json(tmp_path / "config.json", content | {files.SEAL: files.digest(content)})
    with Checkpoints(tmp_path, settings=config_file.fixed(settings, spec)) as checkpoints:
        checkpoints.save(2, {"ema": jnp.zeros(2)}, {})
    c = folder.get_config()
    c.data.source = "digits"
    completed = config_file.complete(c, str(tmp_path))
    assert (completed.data.batch_size, completed.evaluate.batch_size) == (16, 7)
    assert completed.model.pixel_likelihood == "binned"
    assert capsys.readouterr().out.startswith("as the run there has them: ")
