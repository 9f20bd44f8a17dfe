"""A user's own parts, from outside the package: the examples of docs/extending.md, trained."""

import re

import pytest

from tests.common import ROOT, TINY, environment, python

EXAMPLES = dict(
    re.findall(r"```python\n# (\w+)\.py\n(.*?)```", (ROOT / "docs/extending.md").read_text(), re.S)
)
TRAIN = ["-m", "launch.train", "--config=digits"]
SHRUNK = [f"--config.{key}={value}" for key, value in TINY.items()]
WORDS = {"my_source": "4 training", "my_encoder": "encoder"}
TRAINED = {
    "my_source": ["--config.data.source=stripes:3", "--config.evaluate.split=test"],
    "my_encoder": ["--config=shapes:runlocal", "--config.data.text=letters:6"],
    "my_objective": ["--config.train.objective=robust"],
    "my_backbone": [
        "--config.model.backbone=mixer",
        "--config.model.head=posterior",
        "--config.train.objective=flow_matching",
        "--config.model.transporter_blocks=0",
        "--config.sample.decoder=euler",
    ],
}


def run(folder, *arguments, check=True):
    """Runs a program in a folder that holds a user's modules."""
    path = environment()["PYTHONPATH"]
    return python(*arguments, check=check, cwd=folder, PYTHONPATH=path)


def test_the_page_has_every_part():
    assert set(EXAMPLES) == set(TRAINED)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name == "my_source" else pytest.mark.slow) for name in TRAINED],
)
def test_a_part_from_outside_the_package_trains(tmp_path, name):
    (tmp_path / f"{name}.py").write_text(EXAMPLES[name])
    settings = TRAINED[name]
    shrunk = [] if settings[0].startswith("--config=") else SHRUNK
    done = run(
        tmp_path, *TRAIN, f"--import={name}", f"--workdir={tmp_path}/run", *shrunk, *settings
    )
    assert (tmp_path / "run/evaluation.json").exists(), done.stdout
    unknown = run(
        tmp_path,
        "-m",
        "launch.train",
        "--config=digits",
        f"--workdir={tmp_path}/other",
        *SHRUNK,
        *settings,
        check=False,
    )
    assert unknown.returncode == 2
    assert "--import" in unknown.stderr
    assert len(unknown.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "other").exists()


def test_loading_a_run_imports_nothing_that_was_not_named(tmp_path):
    """A run of a user's objective is loaded and sampled without its module; training it needs
    it."""
    (tmp_path / "my_objective.py").write_text(EXAMPLES["my_objective"])
    run(
        tmp_path,
        *TRAIN,
        "--import=my_objective",
        f"--workdir={tmp_path}/run",
        *SHRUNK,
        *TRAINED["my_objective"],
    )
    (tmp_path / "my_objective.py").write_text("raise SystemExit('imported')")
    run(tmp_path, "-m", "launch.sample", f"--workdir={tmp_path}/run", "--num=2")
    again = run(
        tmp_path,
        *TRAIN,
        f"--workdir={tmp_path}/run",
        *SHRUNK,
        *TRAINED["my_objective"],
        check=False,
    )
    assert again.returncode == 2
    assert "--import the module that registers it" in again.stderr
