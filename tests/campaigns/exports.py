"""Damages an export, one place at a time, and reads it in the three ways there are: ntm_jax.load with log_prob, config.init_from, and the
export's own sample.py, which runs in this process.

python -m tests.campaigns.exports 1000 0 prints how often the reader gave the undamaged result (ok), one line that says what is wrong
(refused), another result (silent) or an exception with its traceback.
"""

import collections
import contextlib
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
from ntm_jax.runtime import export, load, state
from tests.campaigns import damage
from tests.common import bits, setup, tiny_config, write_run

SETTINGS = tiny_config()
OUTCOMES = ("ok", "refused", "silent", "traceback")


def make(folder: Path) -> Path:
    """An export of a run that was never trained."""
    run = load.load(str(write_run(folder / "run", SETTINGS)))
    with contextlib.redirect_stdout(io.StringIO()):
        export.write_export(run, str(folder / "export"))
    return folder / "export"


def run_script(folder: Path, *arguments: str) -> tuple[int, str, str, np.ndarray | None]:
    """Runs an export's sample.py in this process and an empty folder: exit status, stdout, stderr and the images, if it wrote any."""
    out, err, status, images = io.StringIO(), io.StringIO(), 0, None
    script = str((folder / "sample.py").resolve())
    with tempfile.TemporaryDirectory() as empty, contextlib.chdir(empty), mock.patch.object(sys, "argv", [script, *arguments]):
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                runpy.run_path(script, run_name="__main__")
            except SystemExit as end:
                status = end.code
        if os.path.exists("samples.npz"):
            with np.load("samples.npz") as archive:
                images = archive["images"]
        assert os.listdir() == (["samples.npz"] if images is not None else [])  # nothing is left of what was written aside
    return status, out.getvalue(), err.getvalue(), images


class Readers:
    """The three ways to read an export, each of which returns what can be compared or raises UserError."""

    def __init__(self, exported: Path):
        self._settings = ntm_jax.load(str(exported)).config
        source, self._model, self._mesh = setup(self._settings)
        self._state = state.initialize(self._settings, self._model, self._mesh)
        records = [source.records[i] for i in range(2)]
        self._images, self._labels = (np.stack([record[name] for record in records]) for name in ("image", "label"))

    def load(self, folder: Path):
        run = ntm_jax.load(str(folder))
        return run.config, run.spec, run.step, run.raw, run.log_prob(self._images, self._labels, trajectories=1).tobytes()

    def init_from(self, folder: Path):
        return bits(export.start_from(str(folder), self._settings, self._model, self._mesh, self._state))

    def sample(self, folder: Path):
        status, out, err, images = run_script(folder, "2", "3")
        if status == 2 and not out and images is None:
            raise UserError(err.removesuffix("\n"))
        return status, out, err, images.tobytes()

    def all(self) -> dict:
        """{name: function of a folder}."""
        return {"load": self.load, "init_from": self.init_from, "sample.py": self.sample}


def outcome(read, folder: Path, expected) -> tuple[str, str]:
    """(one of OUTCOMES, what was said) of reading a damaged export."""
    try:
        found = read(folder)
    except UserError as error:
        return ("refused" if str(error) and "\n" not in str(error) else "traceback"), str(error)
    except Exception as error:
        return "traceback", f"{type(error).__name__}: {error}"
    return ("ok" if found == expected else "silent"), ""


def run(trials: int, seed: int, exported: Path | None = None, examples: dict | None = None) -> dict:
    """{(reader, outcome): how often} of so many damages, of each kind in turn, to an export of digits, made here unless given.

    examples: is given one text for each (reader, outcome).
    """
    counts, draw, examples = collections.Counter(), random.Random(seed), {} if examples is None else examples
    with tempfile.TemporaryDirectory() as folder:
        exported = exported or make(Path(folder))
        readers = Readers(exported).all()
        expected = {name: read(exported) for name, read in readers.items()}
        for trial in range(trials):
            with damage.damaged(exported, draw, damage.KINDS[trial % len(damage.KINDS)]) as what:
                for name, read in readers.items():
                    if name == "sample.py" and "sample.py" in what:
                        continue  # a program that was changed may do anything
                    found, said = outcome(read, exported, expected[name])
                    counts[name, found] += 1
                    examples.setdefault((name, found), f"{what}: {said}".replace(f"{exported}/", "").replace(str(exported), "EXPORT"))
            if trial % 20 == 19:
                gc.collect()  # of the programs that sample.py loaded
    return dict(counts)


def main(trials: int, seed: int) -> None:
    jax.config.update("jax_disable_most_optimizations", True)
    with tempfile.TemporaryDirectory() as cache:  # sample.py compiles its program at every run
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        examples = {}
        counts = run(trials, seed, examples=examples)
    print(f"{'reader':<10}" + "".join(f"{name:>10}" for name in OUTCOMES))
    for reader in dict.fromkeys(name for name, _ in counts):
        print(f"{reader:<10}" + "".join(f"{counts.get((reader, name), 0):>10}" for name in OUTCOMES))
    for (reader, found), text in sorted(examples.items()):
        print(f"{reader}, {found}: {text}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
