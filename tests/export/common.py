"""What the tests of exports share: settings, and how the readers of a folder refuse it."""

import contextlib
import dataclasses
import io
import json
import runpy
import shutil
import sys
import tempfile
from unittest import mock

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import ntm_jax
from ntm_jax.errors import UserError
from ntm_jax.training import loop, state
from tests.common import bits, tiny_config

SETTINGS = tiny_config(**{
    "evaluate.trajectories": 3, "model.pixel_likelihood": "learned"})
TEXTS = tiny_config(**{
    "data.source": "mock:4x4x2,text=3x8", "model.condition": "text", "data.patch_size": 1,
    "evaluate.split": "test", "sample.decoder": "inverse"})
FILES = ["README.md", "config.json", "log_likelihood.bin", "model.safetensors", "sample.py",
         "sampler.bin"]


def program(folder, name: str):
    """A program of an export, and the parameters that it takes."""
    content = bytearray((folder / f"{name}.bin").read_bytes())
    return jax.export.deserialize(content), load_file(folder / "model.safetensors")


def assert_close(found, expected, tolerance: float = 1e-6) -> None:
    """Asserts that latents are equal up to roundings, which the inverse multiplies a little."""
    largest = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=tolerance * largest)


def assert_same_numbers(found, run, label) -> None:
    """Asserts that two runs have the same parameters, samples and likelihoods, bit for bit."""
    assert bits(found.params) == bits(run.params)
    index = np.arange(len(label))
    images = found.sample_at(index, label)
    np.testing.assert_array_equal(images, run.sample_at(index, label))
    count = run.config.evaluate.trajectories
    np.testing.assert_array_equal(
        found.log_prob(images, label, count), run.log_prob(images, label, count))


def copy_of(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def edit_config(folder, change) -> None:
    """Writes change(the content of config.json) in its place."""
    path = folder / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def run_script(folder, *arguments: str) -> tuple[str, np.ndarray]:
    """Runs an export's sample.py in this process, in an empty folder: its output, the images."""
    script, out = str((folder / "sample.py").resolve()), io.StringIO()
    with tempfile.TemporaryDirectory() as empty, contextlib.chdir(empty), mock.patch.object(
        sys, "argv", [script, *arguments]), contextlib.redirect_stdout(out):
        runpy.run_path(script, run_name="__main__")
        with np.load("samples.npz") as archive:
            return out.getvalue(), archive["images"]


def refused_by_load(where, message: str) -> None:
    """Asserts that ntm_jax.load raises one line with `message`."""
    with pytest.raises(UserError) as error:
        ntm_jax.load(str(where))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def refused_by_training(settings, source, tmp_path, message: str) -> None:
    """Asserts that a run from `source` is refused in one line with `message`, nothing written."""
    settings = dataclasses.replace(settings, init_from=str(source))
    # What is refused needs no initial state, which takes seconds to compile.
    initial = mock.patch.object(state, "initialize", return_value=None)
    with initial, pytest.raises(UserError) as error:
        loop.train(settings, str(tmp_path / "new"), progress=False)
    assert str(error.value).startswith(f"config.init_from is {source}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()
