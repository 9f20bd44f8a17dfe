"""A user's own parts, from outside the package: the examples of docs/howto/extend.md, trained."""

import re

import pytest

from tests.common import ROOT, TINY, environment, python

PAGE = (ROOT / "docs/howto/extend.md").read_text()
EXAMPLES = dict(re.findall(r"```python\n# (\w+)\.py\n(.*?)```", PAGE, re.S))
DIGITS = ["--config=digits", *(f"--config.{key}={value}" for key, value in TINY.items())]
SETTINGS = {
    "my_source": [*DIGITS, "--config.data.source=stripes:3", "--config.evaluate.split=test"],
    "my_encoder": ["--config=shapes:runlocal", "--config.data.text=letters:6",
                   "--config.sample.decoder=inverse", "--config.model.transporter_blocks=1",
                   "--config.evaluate.images=0"],
    "my_objective": [*DIGITS, "--config.train.objective=robust"],
    "my_backbone": [
        *DIGITS, "--config.model.backbone=mixer", "--config.model.head=posterior",
        "--config.train.objective=flow_matching", "--config.model.transporter_blocks=0",
        "--config.sample.decoder=euler"],
}


def program(folder, name, *flags, check=True):
    """Runs a program in a folder that holds a user's modules."""
    path = environment()["PYTHONPATH"]
    return python("-m", f"launch.{name}", *flags, check=check, cwd=folder, PYTHONPATH=path)


def test_the_page_has_every_part():
    assert set(EXAMPLES) == set(SETTINGS)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "my_objective"])
def test_a_part_from_outside_the_package_trains(tmp_path, name):
    train_with(tmp_path, name)


def train_with(folder, name):
    """Trains with a part of a user's, in folder/run; without --import it is refused in one line."""
    (folder / f"{name}.py").write_text(EXAMPLES[name])
    program(folder, "train", f"--import={name}", f"--workdir={folder}/run", *SETTINGS[name])
    assert (folder / "run/evaluation.json").exists()
    unknown = program(folder, "train", f"--workdir={folder}/other", *SETTINGS[name], check=False)
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
    again = program(tmp_path, "train", f"--workdir={tmp_path}/run", *SETTINGS["my_objective"],
                    check=False)
    assert again.returncode == 2
    assert "needs --import=MODULE, the module that registers it" in again.stderr
