"""Damages an export, one place at a time, and reads it in all three ways.

They are ntm_jax.load with log_prob, config.init_from, and the export's own sample.py, which runs in
this process. python -m tests.campaigns.exports 1000 0 prints how often a reader gave the undamaged
result (ok), one line that names the damage (refused), another result (silent) or an exception with
its traceback.
"""

import contextlib
import dataclasses
import gc
import io
import os
import random
import runpy
import sys
import tempfile
from pathlib import Path
from unittest import mock

import jax
import numpy as np

import ntm_jax
from ntm_jax.errors import UserError
from ntm_jax.export.read import load_run
from ntm_jax.export.write import write_export
from ntm_jax.training import finetune, state
from tests.campaigns import damage
from tests.common import as_run, bits, setup, tiny_config, write_run

SETTINGS = tiny_config()


def make(folder: Path) -> Path:
    """An export of a run that was never trained."""
    run = load_run(str(write_run(folder / "run", SETTINGS)))
    with contextlib.redirect_stdout(io.StringIO()):
        write_export(run, str(folder / "export"))
    return folder / "export"


def run_script(folder: Path, *arguments: str) -> tuple[int, str, str, np.ndarray | None]:
    """Runs an export's sample.py in this process, in an empty folder.

    Returns its exit status, stdout, stderr and the images, if it wrote any.
    """
    out, err, status, images = io.StringIO(), io.StringIO(), 0, None
    script = str((folder / "sample.py").resolve())
    with tempfile.TemporaryDirectory() as empty, contextlib.chdir(empty), mock.patch.object(
        sys, "argv", [script, *arguments]):
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                runpy.run_path(script, run_name="__main__")
            except SystemExit as end:
                status = end.code
        if os.path.exists("samples.npz"):
            with np.load("samples.npz") as archive:
                images = archive["images"]
        # nothing is left of what was written aside
        assert set(os.listdir()) <= ({"samples", "samples.npz"} if images is not None else set())
    return status, out.getvalue(), err.getvalue(), images


class Readers:
    """The three ways to read an export: each returns comparable values or raises UserError."""

    def __init__(self, exported: Path):
        settings = ntm_jax.load(str(exported)).config
        source, model, mesh = setup(settings)
        self._run = as_run(settings, model, mesh)
        self._state = state.initialize(self._run)
        records = [source.records[i] for i in range(2)]
        self._images, self._labels = (
            np.stack([record[name] for record in records]) for name in ("image", "label"))

    def load(self, folder: Path):
        run = ntm_jax.load(str(folder))
        nats = run.log_prob(self._images, self._labels, trajectories=1)
        return run.config, run.spec, run.step, run.raw, nats.tobytes()

    def init_from(self, folder: Path):
        settings = dataclasses.replace(self._run.config, init_from=str(folder))
        run = dataclasses.replace(self._run, config=settings)
        return bits(finetune.start_from(run, self._state))

    def sample(self, folder: Path):
        status, out, err, images = run_script(folder, "2", "3")
        if status == 2 and not out and images is None:
            raise UserError(err.removesuffix("\n"))
        return status, out, err, images.tobytes()

    def all(self) -> dict:
        """{name: function of a folder}."""
        return {"load": self.load, "init_from": self.init_from, "sample.py": self.sample}


def run(trials: int, seed: int, exported: Path | None = None) -> damage.Tally:
    """Damages an export of digits `trials` times, by each kind in turn; the rows are readers.

    exported: the export, made here by default.
    """
    draw, tally = random.Random(seed), damage.Tally()
    with tempfile.TemporaryDirectory() as folder:
        exported = exported or make(Path(folder))
        readers = Readers(exported).all()
        expected = {name: read(exported) for name, read in readers.items()}
        for trial in range(trials):
            with damage.damaged(exported, draw, damage.KINDS[trial % len(damage.KINDS)]) as what:
                for name, read in readers.items():
                    if name == "sample.py" and "sample.py" in what:
                        continue  # a program that was changed may do anything
                    found, said = damage.outcome(lambda read=read: read(exported),
                                                 lambda found, name=name: found == expected[name])
                    example = f"{what}: {said}".replace(f"{exported}/", "")
                    tally.add(name, found, example.replace(str(exported), "EXPORT"))
            if trial % 20 == 19:
                gc.collect()  # of the programs that sample.py loaded
    return tally


def main(trials: int, seed: int) -> bool:
    """Prints the tally; returns whether anything went wrong."""
    jax.config.update("jax_disable_most_optimizations", True)
    with tempfile.TemporaryDirectory() as cache:  # sample.py compiles its program at every run
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        tally = run(trials, seed)
    print(tally)
    return bool(tally.wrong())


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
