"""A run's config.json: written and read back, what a resume may change, and damage."""

import dataclasses
import json
import pathlib

import jax.numpy as jnp
import pytest

from ntm_jax import files
from ntm_jax.data.pipeline import DataSpec
from ntm_jax.errors import UserError
from ntm_jax.registry import present
from ntm_jax.runtime import config, config_file, renamed
from ntm_jax.runtime.checkpoint import Checkpoints
from tests.common import tiny_config

SPEC = DataSpec((8, 8, 1), 2, 17, 10, 1500)


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """The folder of a run that has a checkpoint."""
    monkeypatch.setattr(config_file.checkpoint, "latest_step", lambda workdir: 1)
    config_file.write(str(tmp_path), tiny_config(), SPEC)
    return str(tmp_path)


def check(folder, spec=SPEC, **changes) -> list[str]:
    return config_file.check_resumable(folder, tiny_config(**changes), spec)


def test_a_run_is_read_back_and_resumable(begun):
    assert config_file.load(begun) == (tiny_config(), SPEC)
    assert check(begun) == []


@pytest.mark.parametrize(("key", "value"), [("mesh.fsdp", 2), ("train.steps", 9)])
def test_what_a_resumed_run_may_change_is_reported(begun, key, value):
    before = config.flatten(tiny_config().raw)[key]
    assert check(begun, **{key: value}) == [
        f"changed since the run began: {key}: {before!r} -> {value!r}"]


@pytest.mark.parametrize(("key", "value"), [
    ("seed", 7), ("data.split", "train[:1000]"), ("trajectory.steps", (2, 4)),
    ("optimizer.name", "muon")])
def test_another_configuration_is_refused(begun, key, value):
    there, here = (config.flatten(c.raw)[key] for c in (tiny_config(), tiny_config(**{key: value})))
    with pytest.raises(UserError) as error:
        check(begun, **{key: value})
    assert str(error.value).startswith(
        f"{begun} holds a run with {key} = {there!r}, and this one has {here!r}")


def test_other_data_under_the_same_name_are_refused(begun):
    with pytest.raises(UserError, match=r"spec\.count = 1500, and this one has 1501"):
        check(begun, dataclasses.replace(SPEC, count=1501))


@pytest.mark.parametrize("damage", ["missing", "damaged"])
def test_a_lost_or_damaged_config_json_is_written_anew(begun, damage):
    path = pathlib.Path(begun, "config.json")
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes().replace(b"0.03", b"0.13"))
    with pytest.raises(UserError, match=r"config\.json"):
        config_file.load(begun)
    assert check(begun) == [
        "config.json was missing or damaged and is written anew: the last checkpoint has the same "
        "settings"]


def test_a_run_with_settings_names_of_an_earlier_version_is_read_and_resumed(tmp_path):
    settings = tiny_config(**{
        "model.head": "flow_matching", "data.text_encoder": "words:1:a", "evaluate.num_samples": 5,
        "train.level_weight_power": 2.0, "optimizer.min_learning_rate": 1e-5} | (
        {"reward.prefetch": True, "reward.data_loss_weight": 0.25, "reward.trainable": "both"}
        if present(config.SECTIONS["reward"]) else {}))
    config_file.write(str(tmp_path), settings, SPEC)
    path = tmp_path / "config.json"
    text = path.read_text().replace('"flow_matching"', '"posterior"')
    fixed = json.dumps(config_file.fixed(settings, SPEC)).replace("flow_matching", "posterior")
    for new, old in {"text_encoder": "text", "num_samples": "images", "trainable": "trains",
                     "level_weight_power": "level_power", "min_learning_rate": "floor",
                     "prefetch": "ahead", "data_loss_weight": "anchor"}.items():
        text, fixed = text.replace(f'"{new}"', f'"{old}"'), fixed.replace(f'.{new}"', f'.{old}"')
    given = renamed.argument("--config.model.transporter_text=True")
    assert given == "--config.model.transporter_condition=text"
    content = {key: value for key, value in json.loads(text).items() if key != files.SEAL}
    fixed = json.loads(fixed)
    del content["model"]["pixel_likelihood"], fixed["model.pixel_likelihood"]  # they are binned
    for saved, name in (content["model"], "transporter_"), (fixed, "model.transporter_"):
        del saved[f"{name}condition"]  # transporters saw classes
        saved[f"{name}text"] = False
    files.write_json(path, content | {files.SEAL: files.digest(content)})
    with Checkpoints(tmp_path, settings=fixed) as checkpoints:
        checkpoints.save(1, {"x": jnp.ones(3)}, {})
    assert config_file.load(str(tmp_path)) == (settings, SPEC)
    with Checkpoints(tmp_path, settings=config_file.fixed(settings, SPEC)) as checkpoints:
        checkpoints.restore({"x": jnp.ones(3)})
    assert config_file.check_resumable(str(tmp_path), settings, SPEC) == []


def test_a_run_without_a_checkpoint_leaves_its_folder_to_any_other(tmp_path):
    config_file.write(str(tmp_path), tiny_config(), SPEC)
    assert check(str(tmp_path), seed=7) == check(f"{tmp_path}/new") == []
    assert not (tmp_path / "new").exists()


def test_data_that_changed_since_a_run_began_are_named(begun):
    one, other = (dataclasses.replace(SPEC, version=version) for version in ("a", "b"))
    assert check(begun, one) == []  # earlier versions wrote none
    config_file.write(begun, tiny_config(), one)
    assert check(begun, other) == [
        "digits changed since the run began, from version 'a' to 'b': its splits may hold other "
        "records, so held-out ones may be among those trained on"]
    assert "spec.version" not in config_file.fixed(tiny_config(), one)


@pytest.mark.parametrize(("version", "same"), [("0123456789abcdef", True), ("3.0.1", False)])
def test_data_may_move_where_their_digest_is_the_same(tmp_path, begun, version, same):
    spec = dataclasses.replace(SPEC, version=version)
    config_file.write(begun, tiny_config(), spec)
    moved = {"data.source": f"folder:{tmp_path}"}
    if same:
        assert check(begun, spec, **moved) == [
            f"changed since the run began: data.source: 'digits' -> 'folder:{tmp_path}'"]
        spec = dataclasses.replace(spec, version="f" * 16)
    with pytest.raises(UserError, match=r"holds a run with data\.source = 'digits'"):
        check(begun, spec, **moved)


@pytest.mark.parametrize(("content", "message"), [
    ("", r"config\.json cannot be used"), ('{"data": 3}', "config.data is 3"),
    (None, "holds no run")])
def test_a_folder_without_a_readable_config_is_refused_in_one_line(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=rf"^[^\n]*{message}[^\n]*$"):
        config_file.load(str(tmp_path))


def test_a_run_from_before_a_setting_goes_on_with_its_default(begun):
    path = pathlib.Path(begun, "config.json")
    stored = json.loads(path.read_text())
    for section, key in (("sample", "inverse"), ("sample", "percentile"), ("evaluate", "features")):
        del stored[section][key]
    del stored["teacher"], stored["init_from"], stored["mesh"], stored[files.SEAL]
    path.write_text(json.dumps(stored))
    found, _ = config_file.load(begun)
    expected = tiny_config().sample, "none", ""
    assert (found.sample, found.evaluate.features, found.init_from) == expected
    assert check(begun) == ["changed since the run began: evaluate.features: 'none' -> 'cnn'"]
