"""A run's config.json: written and read back, what a resume may change, and damage."""

import dataclasses
import json

import jax.numpy as jnp
import pytest

from ntm_jax import backbones, files
from ntm_jax.backbones import BACKBONES
from ntm_jax.data.pipeline import DataSpec
from ntm_jax.errors import UserError
from ntm_jax.runtime import config, config_file
from ntm_jax.runtime.checkpoint import Checkpoints
from tests.common import tiny_config

SPEC = DataSpec((8, 8, 1), 2, 17, 10, 1500)


@pytest.fixture
def with_checkpoint(monkeypatch):
    """Every workdir holds a checkpoint, without settings."""
    monkeypatch.setattr(config_file.checkpoint, "saved_settings", lambda workdir: {})


def test_the_same_run_and_a_new_folder_are_resumable(tmp_path, monkeypatch):
    settings = tiny_config()
    assert config_file.check_resumable(str(tmp_path / "new"), settings, SPEC) == []
    assert not (tmp_path / "new").exists()
    config_file.write(str(tmp_path), settings, SPEC)
    assert config_file.load(str(tmp_path)) == (settings, SPEC)
    monkeypatch.setattr(config_file.checkpoint, "saved_settings", lambda workdir: {})
    assert config_file.check_resumable(str(tmp_path), settings, SPEC) == []


def test_a_run_whose_backbone_is_not_imported_is_not_called_damaged(tmp_path, monkeypatch):
    with monkeypatch.context() as registered:
        registered.setattr(BACKBONES, "_entries", dict(BACKBONES._entries))
        backbones.register("mixer", backbones.find("transformer"))
        settings = tiny_config(**{"model.backbone": "mixer", "model.head": "posterior"})
        config_file.write(str(tmp_path), settings, SPEC)
    message = (r"^config\.model\.backbone 'mixer' is not known: .* import the module that "
               "registers it, or give --import=MODULE$")
    with pytest.raises(UserError, match=message):
        config_file.load(str(tmp_path))


@pytest.mark.parametrize(("key", "value"), [
    ("mesh.fsdp", 2), ("data.workers", 3), ("train.steps", 9), ("evaluate.split", "train"),
    ("sample.decoder", "score"), ("optimizer.learning_rate", 1e-4)])
def test_what_a_resumed_run_may_change_is_reported(with_checkpoint, tmp_path, key, value):
    config_file.write(str(tmp_path), tiny_config(), SPEC)
    before = config.flatten(tiny_config().raw)[key]
    assert config_file.check_resumable(str(tmp_path), tiny_config(**{key: value}), SPEC) == [
        f"changed since the run began: {key}: {before!r} -> {value!r}"]


@pytest.mark.parametrize(("key", "value"), [
    ("seed", 7), ("model.width", 32), ("data.split", "train[:1000]"), ("trajectory.steps", (2, 4))])
@pytest.mark.usefixtures("with_checkpoint")
def test_another_configuration_is_refused_and_nothing_written(tmp_path, key, value):
    config_file.write(str(tmp_path), tiny_config(), SPEC)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    other = tiny_config(**{key: value})
    with pytest.raises(UserError) as error:
        config_file.check_resumable(str(tmp_path), other, SPEC)
    there, here = (config.flatten(c.raw)[key] for c in (tiny_config(), other))
    assert str(error.value).startswith(
        f"{tmp_path} holds a run with {key} = {there!r}, and this one has {here!r}")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_other_data_under_the_same_name_are_refused(with_checkpoint, tmp_path):
    config_file.write(str(tmp_path), tiny_config(), SPEC)
    with pytest.raises(UserError, match=r"spec\.count = 1500, and this one has 1501"):
        config_file.check_resumable(
            str(tmp_path), tiny_config(), dataclasses.replace(SPEC, count=1501))


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        config_file.load(str(tmp_path))
    with Checkpoints(tmp_path) as checkpoints:  # as earlier versions saved them, without settings
        checkpoints.save(1, {"x": jnp.ones(3)}, {})
    for content in (None, '{"seed": '):
        if content:
            (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match=r"holds checkpoints and no config\.json that can be"):
            config_file.check_resumable(str(tmp_path), tiny_config(), SPEC)
    with pytest.raises(UserError, match="is not JSON"):
        config_file.load(str(tmp_path))


@pytest.mark.parametrize("damage", ["missing", "damaged"])
def test_the_last_checkpoint_mends_config_json(tmp_path, damage):
    settings = tiny_config()
    config_file.write(str(tmp_path), settings, SPEC)
    with Checkpoints(tmp_path, settings=config_file.fixed(settings, SPEC)) as checkpoints:
        checkpoints.save(1, {"x": jnp.ones(3)}, {})
    path = tmp_path / "config.json"
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes().replace(b"0.03", b"0.13"))
    with pytest.raises(UserError, match=r"config\.json"):
        config_file.load(str(tmp_path))
    other = tiny_config(**{"trajectory.t_min": 0.13})
    message = r"holds a run with trajectory\.t_min = 0\.03, and this one has 0\.13"
    with pytest.raises(UserError, match=message):
        config_file.check_resumable(str(tmp_path), other, SPEC)
    left_open = settings.raw
    left_open["data"] |= {"batch_size": None, "patch_size": None}
    left_open["evaluate"] |= {"batch_size": None}
    completed, line = config_file.complete(left_open, str(tmp_path))
    assert completed.data == settings.data
    assert line.startswith("chosen for the data: ")  # what a resume may change is not known
    assert config_file.check_resumable(str(tmp_path), settings, SPEC) == [
        "config.json was missing or damaged and is written anew: the last checkpoint has the same "
        "settings"]


def test_a_run_without_a_checkpoint_leaves_its_folder_to_any_other(tmp_path):
    config_file.write(str(tmp_path), tiny_config(), SPEC)
    assert config_file.check_resumable(str(tmp_path), tiny_config(seed=7), SPEC) == []
    (tmp_path / "config.json").write_text("[]")
    assert config_file.check_resumable(str(tmp_path), tiny_config(), SPEC) == []


def test_class_names_may_come_and_not_change(with_checkpoint, tmp_path):
    one, other = (dataclasses.replace(SPEC, class_names=names) for names in (("a",), ("b",)))
    config_file.write(str(tmp_path), tiny_config(), SPEC)
    assert config_file.check_resumable(str(tmp_path), tiny_config(), one) == []
    config_file.write(str(tmp_path), tiny_config(), one)
    assert config_file.load(str(tmp_path))[1] == one
    with pytest.raises(UserError, match=r"spec\.class_names = \['a'\], and this one has \['b'\]"):
        config_file.check_resumable(str(tmp_path), tiny_config(), other)
    assert "spec.class_names" not in config_file.fixed(tiny_config(), one)


def test_data_that_changed_since_a_run_began_are_named(with_checkpoint, tmp_path):
    one, other = (dataclasses.replace(SPEC, version=version) for version in ("a", "b"))
    config_file.write(str(tmp_path), tiny_config(), SPEC)  # as earlier versions, without one
    assert config_file.check_resumable(str(tmp_path), tiny_config(), one) == []
    config_file.write(str(tmp_path), tiny_config(), one)
    assert config_file.load(str(tmp_path))[1].version == "a"
    assert config_file.check_resumable(str(tmp_path), tiny_config(), one) == []
    assert config_file.check_resumable(str(tmp_path), tiny_config(), other) == [
        "digits changed since the run began, from version 'a' to 'b': its splits may hold other "
        "records, so held-out ones may be among those trained on"]
    assert "spec.version" not in config_file.fixed(tiny_config(), one)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"data": 3}'])
def test_an_unreadable_config_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"^[^\n]*config\.json cannot be used \([^\n]+$"):
        config_file.load(str(tmp_path))


def test_a_run_from_before_a_setting_goes_on_with_its_default(with_checkpoint, tmp_path):
    settings = tiny_config()
    config_file.write(str(tmp_path), settings, SPEC)
    stored = json.loads((tmp_path / "config.json").read_text())
    for section, key in (("sample", "inverse"), ("sample", "percentile"), ("evaluate", "features")):
        del stored[section][key]
    del stored["teacher"], stored["init_from"]
    del stored[files.SEAL]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    found, _ = config_file.load(str(tmp_path))
    expected = settings.sample, "none", ""
    assert (found.sample, found.evaluate.features, found.init_from) == expected
    assert config_file.check_resumable(str(tmp_path), settings, SPEC) == [
        "changed since the run began: evaluate.features: 'none' -> 'cnn'"]
