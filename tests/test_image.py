"""The Dockerfile, as far as it can be checked without Docker: its files, and its commands."""

import re
import shlex
import subprocess
import tomllib

import pytest

from tests.common import ROOT, environment

TEXT = (ROOT / "Dockerfile").read_text().replace("\\\n", "")
STEPS = [line.partition(" ") for line in TEXT.splitlines() if line and not line.startswith("#")]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def arguments(step: str) -> list[str]:
    """What follows the steps of one kind, such as RUN, in order."""
    return [rest for name, _, rest in STEPS if name == step]


COPIED = [name for rest in arguments("COPY") for name in rest.split()[:-1]]


def plain(name: str) -> str:
    """A package's name as pip compares it, without version and extras."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", name)[0]).lower()


def test_what_is_copied_is_there_and_not_ignored():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    kept = {line.removeprefix("!") for line in lines if line.startswith("!")}
    assert lines[1] == "*"
    assert set(COPIED) == kept
    assert [name for name in COPIED if not (ROOT / name).exists()] == []


def test_the_last_user_is_not_root_by_default():
    steps = [name for name, _, _ in STEPS]
    assert steps.index("USER") > max(i for i, name in enumerate(steps) if name == "RUN")
    assert arguments("USER") == ["${RUN_AS}"]
    assert "RUN_AS=1000" in arguments("ARG")
    assert "useradd --uid 1000" in arguments("RUN")[0]


@pytest.mark.parametrize("extra", ["", "tpu", "cuda", "hub,wandb"])
def test_requirements_are_the_projects(tmp_path, extra):
    """Runs the step with a pip that records what it is asked for."""
    [command] = [run for run in arguments("RUN") if "tomllib" in run]
    asked = tmp_path / "asked"
    (tmp_path / "pip").write_text(f"#!/bin/sh\necho $* > {shlex.quote(str(asked))}\n")
    (tmp_path / "pip").chmod(0o755)
    command = command.replace("/tmp/requirements.txt", shlex.quote(str(tmp_path / "found")))
    path = f"{tmp_path}:{environment()['PATH']}"
    subprocess.run(["sh", "-ec", command], cwd=ROOT, check=True,
                   env=environment(EXTRA=extra, PATH=path))
    expected = PROJECT["build-system"]["requires"] + PROJECT["project"]["dependencies"]
    for name in filter(None, extra.split(",")):
        expected = expected + PROJECT["project"]["optional-dependencies"][name]
    assert (tmp_path / "found").read_text().splitlines() == expected
    assert asked.read_text().split()[:4] == ["install", "-c", "constraints.txt", "-r"]


def test_constraints_pin_every_requirement():
    pinned = {plain(line) for line in (ROOT / "constraints.txt").read_text().splitlines()}
    optional = PROJECT["project"]["optional-dependencies"]
    required = PROJECT["build-system"]["requires"] + PROJECT["project"]["dependencies"]
    assert [name for name in required + optional["test"] if plain(name) not in pinned] == []
