"""Exports read back as runs, and the damaged or foreign ones that are refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import ntm_jax
from ntm_jax import files
from ntm_jax.errors import UserError
from ntm_jax.export import write
from ntm_jax.runtime.run import abstract_pixel_params
from tests.common import bits, new_run
from tests.export.common import (
    SETTINGS,
    assert_same_numbers,
    copy_of,
    edit_config,
    refused_by_load,
    refused_by_training,
)


def test_the_export_of_a_run_is_that_run(run, exported):
    found = ntm_jax.load(str(exported))
    assert (found.config, found.spec, found.step) == (run.config, run.spec, 4)
    assert (found.raw, found.workdir) == (False, str(exported))
    assert_same_numbers(found, run, np.arange(5))
    assert ntm_jax.load(str(exported), step=4).step == 4
    with pytest.raises(UserError, match="tiny is an export of step 4, and --step asks for step 2: "
                                        "leave --step out, or give the workdir"):
        ntm_jax.load(str(exported), step=2)
    with pytest.raises(UserError, match="tiny is an export of the moving average of the parameters"
                                        ", and --raw asks for the raw ones: leave --raw out"):
        ntm_jax.load(str(exported), raw=True)


def test_an_export_of_e7b899a_is_read(run, exported, tmp_path):
    """It has digests of its files and a seal, which is verified. Its p(x | x_0) is `binned`."""
    old, weights = copy_of(exported, tmp_path), load_file(exported / "model.safetensors")
    content = json.loads((old / "config.json").read_text()) | {"files": {"sampler.bin": "0" * 64}}
    del content["config"]["model"]["pixel_likelihood"]
    del content["config"]["model"]["transporter_condition"]  # it saw classes
    weights = {name: array for name, array in weights.items() if "pixels/" not in name}
    save_file(weights, old / "model.safetensors")
    files.write_json(old / "config.json", content | {files.SEAL: files.digest(content)})
    found = ntm_jax.load(str(old))
    assert bits(found.params["params"]) == bits(
        {name: tree for name, tree in run.params["params"].items() if name != "pixels"})
    assert (set(found.params), found.pixels.kind) == ({"params"}, "binned")
    text = (old / "config.json").read_text()
    (old / "config.json").write_text(text.replace('"levels": 17', '"levels": 16'))
    refused_by_load(old, "its content does not match its checksum")


@pytest.mark.parametrize(("change", "message"), [
    (lambda about: {"model_type": "llama"}, "is of format None, and this version of ntm_jax reads"),
    (lambda about: about | {"format": 2}, "is of format 2, and this version of ntm_jax reads 1"),
    (lambda about: {"format": 1, "step": 4}, "config.json.parameters is missing")])
def test_another_config_is_refused(exported, tmp_path, change, message):
    copy = copy_of(exported, tmp_path)
    edit_config(copy, change)
    refused_by_load(copy, message)
    refused_by_training(SETTINGS, copy, tmp_path, message)


def test_a_network_of_the_pixels_is_exported(run, tmp_path, monkeypatch):
    monkeypatch.setattr(write, "programs", lambda run: {})  # they take long to compile
    model = dataclasses.replace(run.config.model, pixel_likelihood="network")
    config, params = dataclasses.replace(run.config, model=model), dict(run.params["params"])
    del params["pixels"]  # learned noise
    run = dataclasses.replace(
        run, config=config, model=new_run(config).model, params={"params": params})
    own = jax.tree.map(lambda a: np.random.default_rng(0).normal(size=a.shape).astype(a.dtype),
                       abstract_pixel_params(run))
    run = dataclasses.replace(run, params=run.params | own)
    run.export(str(tmp_path / "out"))
    found = ntm_jax.load(str(tmp_path / "out"))
    assert bits(found.params) == bits(run.params)
    assert found.pixels == run.pixels


def test_damaged_parameters_are_refused(exported, tmp_path):
    copy = copy_of(exported, tmp_path)
    content = (copy / "model.safetensors").read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]
    for changed, message in ((content[:-8], "model.safetensors is damaged ("),
                             (flipped, "model.safetensors is damaged: params/")):
        (copy / "model.safetensors").write_bytes(changed)
        refused_by_load(copy, message)
        refused_by_training(SETTINGS, copy, tmp_path, message)
    (copy / "config.json").unlink()
    refused_by_load(copy, "config.json is missing")
