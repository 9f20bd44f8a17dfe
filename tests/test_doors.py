"""A user's own parts, from outside the package: the examples of docs/howto/extend.md, trained."""

import re

import pytest

from tests.common import ROOT, TINY, environment, python

PAGE = (ROOT / "docs/howto/extend.md").read_text()
EXAMPLES = dict(re.findall(r"```python\n# (\w+)\.py\n(.*?)```", PAGE, re.S))
DIGITS = ["--config=digits", *(f"--config.{key}={value}" for key, value in TINY.items())]
SETTINGS = {  # modules that train together: settings that use their parts
    ("my_source", "my_backbone"): [
        *DIGITS, "--config.data.source=stripes:3", "--config.evaluate.split=test",
        "--config.model.backbone=mixer", "--config.model.head=posterior",
        "--config.train.objective=flow_matching", "--config.model.transporter_blocks=0",
        "--config.sample.decoder=euler"],
    ("my_encoder", "my_decoder"): [
        "--config=shapes:runlocal", "--config.data.text=letters:6",
        "--config.sample.decoder=level_0", "--config.trajectory.steps=(2,)",
        "--config.sample.steps=2", "--config.evaluate.images=0"],
    ("my_objective",): [*DIGITS, "--config.train.objective=robust"],
}


def program(folder, name, *flags, check=True):
    """Runs a program in a folder that holds a user's modules."""
    path = environment()["PYTHONPATH"]
    return python("-m", f"launch.{name}", *flags, check=check, cwd=folder, PYTHONPATH=path)


def test_the_page_has_every_part():
    assert set(EXAMPLES) == {name for names in SETTINGS for name in names}


@pytest.mark.slow
@pytest.mark.parametrize("names", [names for names in SETTINGS if names != ("my_objective",)])
def test_parts_from_outside_the_package_train(tmp_path, names):
    train_with(tmp_path, *names)


def train_with(folder, *names):
    """Trains with a user's modules, in folder/run; without one of them, it refuses in one line."""
    imports = [f"--import={name}" for name in names]
    for name in names:
        (folder / f"{name}.py").write_text(EXAMPLES[name])
    program(folder, "train", *imports, f"--workdir={folder}/run", *SETTINGS[names])
    assert (folder / "run/evaluation.json").exists()
    for left_out in imports:
        others = [flag for flag in imports if flag != left_out]
        unknown = program(folder, "train", *others, f"--workdir={folder}/other", *SETTINGS[names],
                          check=False)
        assert unknown.returncode == 2
        assert "--import" in unknown.stderr
        assert len(unknown.stderr.strip().splitlines()) == 1
        assert not (folder / "other").exists()


@pytest.mark.slow
def test_loading_a_run_imports_nothing_that_was_not_named(tmp_path):
    """A run of a user's objective is sampled without its module; training it needs the module."""
    train_with(tmp_path, "my_objective")
    (tmp_path / "my_objective.py").write_text("raise SystemExit('imported')")
    program(tmp_path, "sample", f"--workdir={tmp_path}/run", "--num=2")
    again = program(tmp_path, "train", f"--workdir={tmp_path}/run", *SETTINGS["my_objective",],
                    check=False)
    assert again.returncode == 2
    assert "import the module that registers it, or give --import=MODULE" in again.stderr
