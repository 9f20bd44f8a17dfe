"""Exports read back as runs, and the damaged or foreign ones that are refused."""

import json

import numpy as np
import pytest

import ntm_jax
from ntm_jax import files
from ntm_jax.backbones import BACKBONES
from ntm_jax.errors import UserError
from ntm_jax.export import read as export_read
from tests.campaigns import damage, exports
from tests.common import bits
from tests.export.common import (
    SETTINGS,
    assert_same_numbers,
    copy_of,
    refused_by_load,
    refused_by_script,
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


def test_a_part_that_is_not_imported_is_named(exported, monkeypatch):
    """The export is not damaged: its backbone, here one of the package, is not in the table."""
    monkeypatch.delitem(BACKBONES._entries, "transformer")
    message = "^config.model.backbone 'transformer' is not known: .* import the module that regis"
    with pytest.raises(UserError, match=message):
        ntm_jax.load(str(exported))


CONFIGS = {
    "a list": b"[]", "null": b"null", "empty": b"", "not UTF-8": b"\xff",
    "too deep": b"[" * 100_000, "a long number": b'{"format": ' + b"9" * 5000 + b"}",
    "an object": b"{}", "a true format": b'{"format": true}',
    "a word as format": b'{"format": "1"}', "another's": b'{"model_type": "llama"}',
    "missing sections": b'{"format": 1, "step": 4}'}


@pytest.mark.parametrize("kind", CONFIGS)
def test_another_config_is_refused(exported, tmp_path, kind):
    copy = copy_of(exported, tmp_path)
    (copy / "config.json").write_bytes(CONFIGS[kind])
    refused_by_load(copy, f"{copy}/config.json")
    refused_by_script(copy, "config.json was damaged or edited: its content does not match its "
                            "checksum; copy the folder again")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "sampler.bin"])
def test_a_damaged_or_missing_file_is_refused(exported, tmp_path, name):
    """ntm_jax itself does not open sampler.bin."""
    copy = copy_of(exported, tmp_path)
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    damaged = f"{copy}/{name} was damaged or edited: "
    missing = f"{copy}/{name} cannot be read (No such file or directory): "
    refused_by_script(copy, damaged)
    if name != "sampler.bin":
        unusable = f"{copy}/{name} cannot be used (it "
        refused_by_load(copy, damaged if name == "model.safetensors" else unusable)
    (copy / name).unlink()
    refused_by_script(copy, missing)
    if name != "sampler.bin":
        refused_by_load(copy, missing)
        refused_by_training(SETTINGS, copy, tmp_path, missing)


def test_an_edited_config_is_refused(exported, tmp_path):
    copy = copy_of(exported, tmp_path)
    text = (copy / "config.json").read_text()
    for old, new, message in (
            ('"levels": 17', '"levels": 16', "its content does not match its checksum"),
            (files.SEAL, "content_sha257", "its checksum content_sha256 is missing"),
            ('"files"', '"filet"', "its content does not match its checksum")):
        edited = text.replace(old, new)
        assert edited != text
        (copy / "config.json").write_text(edited)
        refused_by_load(copy, message)
        refused_by_script(copy, "its content does not match its checksum")


def test_an_export_of_another_format_is_refused(exported, tmp_path):
    copy = copy_of(exported, tmp_path, "files")
    about = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(about | {"format": 2}))
    message = "of format 2, and this version of ntm_jax reads 1"
    refused_by_load(copy, message)
    refused_by_training(SETTINGS, copy, tmp_path, message)
    (copy / "config.json").write_text(json.dumps(about | {"from_a_later_version": 2}))
    assert ntm_jax.load(str(copy)).step == 4


def test_an_export_without_digests_is_read(run, exported, tmp_path):
    """Earlier versions wrote no digests of files; the checksums of arrays still find damage."""
    old = copy_of(exported, tmp_path, "files")
    assert bits(ntm_jax.load(str(old)).params) == bits(run.params)
    content = (old / "model.safetensors").read_bytes()
    flipped = content[:-6] + bytes([content[-6] ^ 4]) + content[-5:]
    unreadable = "model.safetensors is damaged (SafetensorError"
    for changed, message in (
            (content[:-8], unreadable), (flipped, "is damaged: params/"), (b"", unreadable)):
        (old / "model.safetensors").write_bytes(changed)
        refused_by_load(old, message)
        refused_by_training(SETTINGS, old, tmp_path, message)


WRONG = (None, [], {}, "x", -1, 0, 1.5, True, 10**12, float("nan"))
SHAPES = ([8, 8], [8, 8, 0], [7, 8, 1], [10**12] * 3, [2**30, 2**30, 1])


def test_a_value_of_another_type_is_refused_or_does_no_harm(run, exported, tmp_path, monkeypatch):
    """Each value of config.json, as earlier versions wrote it without a checksum, is exchanged.

    Only a wrong step goes unnoticed. What depends on the arrays alone is left out.
    """
    copy = copy_of(exported, tmp_path, "files")
    text = (copy / "config.json").read_text()
    monkeypatch.setattr(export_read, "read_parameters", lambda folder, about, abstract: run.params)
    changes = [(("spec", "image_shape"), shape) for shape in SHAPES]
    for number, path in enumerate(paths(json.loads(text))):
        every = path in (("step",), ("spec",), ("format",))
        values = WRONG if every else WRONG[number % len(WRONG) :: len(WRONG)]
        changes += [(path, value) for value in values]
    outcomes = {}
    for path, value in changes:
        about = json.loads(text)
        *sections, last = path
        inner = about
        for key in sections:
            inner = inner[key]
        inner[last] = value
        (copy / "config.json").write_text(json.dumps(about))
        outcomes[path, str(value)] = damage.outcome(
            lambda: ntm_jax.load(str(copy)).step, lambda step: step == 4)
    assert not [found for found in outcomes.items() if found[1][0] == "traceback"]
    silent = {key for key, (found, _) in outcomes.items() if found == "silent"}
    assert silent == {(("step",), str(step)) for step in (-1, 0, 10**12)}
    assert sum(found == "refused" for found, _ in outcomes.values()) > 80
    assert all(outcomes[("spec", "image_shape"), str(shape)][0] == "refused" for shape in SHAPES)


def paths(value, path=()):
    """The keys that lead to each value of a JSON object, and to each of its sections."""
    found = [path] if path else []
    if isinstance(value, dict) and path[:1] != ("checksums",):
        for key, inner in value.items():
            found += paths(inner, (*path, key))
    return found


@pytest.mark.slow
def test_damaged_exports_give_the_undamaged_result_or_one_line(exported, tmp_path):
    tally = exports.run(12, seed=0, exported=copy_of(exported, tmp_path))
    assert tally.wrong() == []
    for reader in ("load", "init_from", "sample.py"):
        assert tally.counts[reader, "refused"] >= 2
