"""Exports read back as runs, and the damaged or foreign ones that are refused."""

import json

import numpy as np
import pytest

import ntm_jax
from ntm_jax import files
from ntm_jax.errors import UserError
from tests.common import bits
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
    """It has digests of its files and a seal, which is verified."""
    old = copy_of(exported, tmp_path)
    content = json.loads((old / "config.json").read_text()) | {"files": {"sampler.bin": "0" * 64}}
    files.write_json(old / "config.json", content | {files.SEAL: files.digest(content)})
    assert bits(ntm_jax.load(str(old)).params) == bits(run.params)
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


def test_damaged_parameters_are_refused(exported, tmp_path):
    copy = copy_of(exported, tmp_path)
    content = (copy / "model.safetensors").read_bytes()
    flipped = content[:-6] + bytes([content[-6] ^ 4]) + content[-5:]
    for changed, message in ((content[:-8], "model.safetensors is damaged ("),
                             (flipped, "model.safetensors is damaged: params/")):
        (copy / "model.safetensors").write_bytes(changed)
        refused_by_load(copy, message)
        refused_by_training(SETTINGS, copy, tmp_path, message)
    (copy / "config.json").unlink()
    refused_by_load(copy, "config.json is missing")
