"""What the tests of exports share: settings, and how the readers of a folder refuse it."""

import dataclasses
import json
import shutil
import subprocess
import sys
from unittest import mock

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import ntm_jax
from ntm_jax import files
from ntm_jax.errors import UserError
from ntm_jax.training import loop, state
from tests.campaigns import exports
from tests.common import bits, environment, tiny_config

SETTINGS = tiny_config(**{"evaluate.trajectories": 3})
TEXTS = tiny_config(**{
    "data.source": "mock:4x4x2,text=3x8", "model.condition": "text", "data.patch_size": 1,
    "evaluate.split": "test", "sample.decoder": "inverse"})
FILES = ["README.md", "config.json", "log_likelihood.bin", "model.safetensors", "sample.py",
         "sampler.bin"]
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


def copy_of(folder, tmp_path, *missing: str):
    """A copy of an export; with `missing`, as earlier versions wrote it.

    config.json then lacks these keys and its own checksum.
    """
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    if missing:
        about = json.loads((copy / "config.json").read_text())
        kept = {key: about[key] for key in about if key not in (files.SEAL, *missing)}
        (copy / "config.json").write_text(json.dumps(kept))
    return copy


def run_alone(folder, cwd, *arguments: str) -> str:
    """Runs an export's sample.py in a process that cannot import this package: its output."""
    command = [sys.executable, "-I", "-c", BLOCKED, str(folder / "sample.py"), *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True,
                          timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refused_by_load(folder, message: str) -> None:
    """Asserts that ntm_jax.load raises one line that names the folder and has `message`."""
    with pytest.raises(UserError) as error:
        ntm_jax.load(str(folder))
    assert str(error.value).startswith(str(folder))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def refused_by_script(folder, message: str, *arguments: str) -> None:
    """Asserts that sample.py ends with status 2, one line with `message`, and no images."""
    status, out, err, images = exports.run_script(folder, *arguments)
    assert (status, out, images) == (2, "", None)
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


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
