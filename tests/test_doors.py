"""A user's own parts, from outside the package: the examples of the guide, trained."""

import json
import re

import pytest

from ntm_jax.training.objectives import OBJECTIVES
from tests.common import ROOT, TINY, environment, python, tiny_config, write_run

PAGE = (ROOT / "docs/howto/extend.md").read_text()
FILES = sorted((ROOT / "docs/howto/examples").glob("*.py"))
EXAMPLES = dict(re.findall(r"```python\n# (\w+)\.py\n(.*?)```", PAGE, re.S))
EXAMPLES |= {path.stem: path.read_text() for path in FILES}
SETTINGS = {  # modules that train together: settings that use their parts
    ("my_source", "my_condition", "my_objective", "my_optimizer", "my_decoder"): [
        "--config=digits", *(f"--config.{key}={value}" for key, value in TINY.items()),
        "--config.data.source=stripes:3", "--config.evaluate.split=test",
        "--config.model.condition=grade", "--config.train.objective=robust",
        "--config.optimizer.name=adafactor",
        "--config.sample.decoder=level_1", "--config.model.transporter_blocks=0"],
    ("my_encoder", "my_backbone", "my_writer"): [
        "--config=shapes:smoke", "--config.data.text_encoder=letters:6",
        "--config.model.backbone=mixer", "--config.model.head=flow_matching",
        "--config.train.objective=flow_matching", "--config.model.transporter_blocks=0",
        "--config.sample.decoder=euler", "--config.train.log_every=1",
        "--config.evaluate.num_samples=0", "--writer=table:losses"],
    ("my_autoencoder",): [
        "--config=digits", *(f"--config.{key}={value}" for key, value in TINY.items()),
        "--config.data.source=mock:4x4x12,levels=0,classes=10", "--config.data.patch_size=1",
        "--config.sample.autoencoder=squares:2"],
}


def program(folder, name, *flags, check=True):
    """Runs a program in a folder that holds a user's modules."""
    path = environment()["PYTHONPATH"]
    return python("-m", f"launch.{name}", *flags, check=check, cwd=folder, PYTHONPATH=path)


def test_every_example_is_on_the_page_and_trained():
    assert set(EXAMPLES) == {name for names in SETTINGS for name in names}
    assert [path.name for path in FILES if f"(examples/{path.name})" not in PAGE] == []


@pytest.mark.slow
@pytest.mark.parametrize("names", SETTINGS)
def test_parts_from_outside_the_package_train(tmp_path, names):
    """Without one of the modules, training refuses in one line."""
    imports = [f"--import={name}" for name in names]
    for name in names:
        (tmp_path / f"{name}.py").write_text(EXAMPLES[name])
    program(tmp_path, "train", *imports, f"--workdir={tmp_path}/run", *SETTINGS[names])
    assert (tmp_path / "run/evaluation.json").exists()
    if "my_objective" in names:
        assert json.loads((tmp_path / "run/evaluation.json").read_text())["robust"]["stderr"] > 0
    if "my_writer" in names:
        text = (tmp_path / "run/losses.csv").read_text()
        rows = [row.split(",") for row in text.splitlines()]
        assert [row[0] for row in rows if row[1] == "loss"][:3] == ["1", "2", "3"]
        assert any(row[1] == "picture" for row in rows)
    for left_out in imports:
        others = [flag for flag in imports if flag != left_out]
        unknown = program(tmp_path, "train", *others, f"--workdir={tmp_path}/other",
                          *SETTINGS[names], check=False)
        assert unknown.returncode == 2
        assert "--import" in unknown.stderr
        assert len(unknown.stderr.strip().splitlines()) == 1
        assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_loading_a_run_imports_nothing_that_was_not_named(tmp_path, monkeypatch):
    """A run of a user's objective is sampled without its module; training it needs the module."""
    robust = {"train.objective": "robust"}
    with monkeypatch.context() as patched:
        patched.setitem(OBJECTIVES._entries, "robust", ("robust", OBJECTIVES.find("end_to_end")[0]))
        write_run(tmp_path / "run", tiny_config(**robust))
    (tmp_path / "robust.py").write_text("raise SystemExit('imported')")
    program(tmp_path, "sample", f"--workdir={tmp_path}/run", "--num=2")
    settings = [f"--config.{key}={value}" for key, value in (TINY | robust).items()]
    again = program(tmp_path, "train", "--config=digits", f"--workdir={tmp_path}/run", *settings,
                    check=False)
    assert again.returncode == 2
    assert "import the module that registers it, or give --import=MODULE" in again.stderr
