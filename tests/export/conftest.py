"""Runs and their exports, made once for all test modules of this folder, which only read them."""

import dataclasses
import fcntl
import os
import shutil

import pytest

import ntm_jax
from ntm_jax.core import denoising
from ntm_jax.export.write import write_export
from ntm_jax.runtime import config
from ntm_jax.runtime.run import with_denoiser
from ntm_jax.training import loop
from tests.common import as_run, python, random_run, setup, tiny_config, write_run
from tests.export.common import SETTINGS, TEXTS


def shared(tmp_path_factory, name: str, make):
    """A folder for all of pytest's workers, which the first of them fills: make(folder)."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, done = base / name, base / f"{name}.done"
    with (base / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def workdir(tmp_path_factory):
    """The folder of a run of digits, never trained, with checkpoints of steps 2 and 4."""
    return shared(tmp_path_factory, "run", lambda folder: write_run(folder, SETTINGS))


@pytest.fixture(scope="session")
def run(workdir):
    """The run at step 4, guided as its export is."""
    found = ntm_jax.load(str(workdir))
    return dataclasses.replace(found, config=found.config.with_sampling(guidance=0.5))


@pytest.fixture(scope="session")
def exported(workdir, tmp_path_factory):
    """The folder that launch/export.py wrote of the run."""
    inside = "new/parents/tiny"

    def export(folder):
        out = folder / inside
        done = python("-m", "launch.export", f"--workdir={workdir}", f"--out={out}",
                      "--guidance=0.5")
        assert done.stdout.startswith(f"6 files in {out}, ")

    return shared(tmp_path_factory, "export", export) / inside


@pytest.fixture(scope="session")
def on_texts(tmp_path_factory):
    """A run of latents conditioned on text, and its export."""
    run = _random(TEXTS, setup(TEXTS)[1], seed=0, step=4, workdir="runs/none")
    folder = shared(tmp_path_factory, "texts", lambda made: write_export(run, str(made / "out")))
    return run, folder / "out"


@pytest.fixture(scope="session")
def denoised(tmp_path_factory):
    """A run of normalised latents with a learned denoiser, and its export.

    It is guided at the first step alone.
    """
    settings = tiny_config(**{
        "data.source": "mock:4x4x2,classes=3", "data.patch_size": 1, "evaluate.split": "test",
        "sample.guidance": (0.5, 0.0)})
    values = settings.raw
    own = config.read(values | {
        "teacher": "runs/teacher", "model": values["model"] | {"width": 32},
        "train": values["train"] | {"objective": "denoiser", "condition_dropout": 0.0},
        "sample": values["sample"] | {"decoder": "denoiser"}})
    _, model, _ = setup(settings)
    wider = model.clone(config=dataclasses.replace(model.config, width=32))
    folder = tmp_path_factory.mktemp("exports") / "denoiser"
    normalised = {"mean": (1.0, -2.0), "std": (0.5, 4.0)}
    teacher = _random(settings, model, seed=0, step=4, workdir="runs/teacher", **normalised)
    module = denoising.make_denoiser(wider)
    student = _random(own, module, seed=1, step=6, workdir="runs/none", **normalised)
    run = with_denoiser(teacher, student)
    write_export(run, str(folder))
    return run, folder


def _random(settings, model, seed: int, step: int, workdir: str, **spec):
    """A run with random parameters, and other fields of its DataSpec where they are given."""
    run = as_run(settings, model, setup(settings)[2])
    spec = dataclasses.replace(run.spec, **spec)
    return random_run(run, seed, spec=spec, step=step, workdir=workdir)


@pytest.fixture
def started(monkeypatch):
    """A function (settings, workdir) -> the state that training begins with, and its step."""
    seen = []

    def record(self, last):
        seen.append((self.current, self.step))

    def start(settings, workdir):
        assert loop.train(settings, str(workdir), progress=False) is None
        return seen.pop()

    monkeypatch.setattr(loop._Loop, "train", record)
    return start
