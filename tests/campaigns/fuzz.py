"""Random values of random settings of an experiment.

Each gives a configuration that a model and its state can be built from, or is refused in one line.

    python -m tests.campaigns.fuzz 700 50 0   # 700 in this process, 50 by the command line

Those by the command line start to train.
"""

import ast
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ntm_jax import typed
from ntm_jax.data import pipeline
from ntm_jax.runtime import config, sharding
from ntm_jax.runtime.run import untrained
from ntm_jax.training import objectives, state
from ntm_jax.training.step import check_batch
from tests.campaigns import damage
from tests.common import ROOT, TINY, environment, experiment

SECONDS = 120  # within which a program has ended or is training
NUMBERS = (0, 1, -1, 2, 3, 7, 16, 31, 64, 1000, 10**6, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63,
           -(2**63), 10**30, 10**400)
REALS = (0.0, -0.0, 0.5, 1.0, -1.5, 1e-300, 1e-12, 1e-3, 0.999999, 100.0, 1e9, 1e300, -1e300,
         float("inf"), float("nan"))
TEXTS = ("", "a", "none", "train", "train[:1]", "train[5:2]", "test[:0]", "train[-3:]", "\n",
         "\x00", "é" * 300, "../..", "toy:moons", "mock:4x4x1", "mock:1000000x1000000x3",
         "folder:/dev", "tfds:os", "records:/", "words:3:a b", "minilm:0", "transformers:/")
OTHERS = (True, False, None, (), (0,), (1,), (2, 4), (4, "a"), (1.5,), (0.02, 0.04), (0.5, 0.1),
          (1e-300, 1e-300), (0.0,) * 4, [], [1, [2]], {}, {"a": 1}, {"steps": 3})


def overrides(draw: random.Random) -> dict:
    """One to three settings with new values, mostly of their type."""
    flat = config.flatten(experiment().to_dict() | {"teacher": "", "init_from": ""})
    declared = {key: field.metadata["setting"]
                for key, _, field in typed.settings(config.config_class())}
    chosen = {}
    for key in draw.sample(sorted(flat), draw.choice((1, 1, 2, 3))):
        now = flat[key]
        alike = {int: NUMBERS, float: REALS, str: TEXTS}.get(type(now), OTHERS)
        if isinstance(now, (int, float)) and not isinstance(now, bool):
            part = now / 3 if isinstance(now, float) else now // 2
            alike = (*alike, *(now + 1, now * 2, now * 1000, part) * 5)
        choices = list(declared[key].choices)
        if choices and draw.random() < 0.7:
            candidates = choices
        else:
            candidates = alike if draw.random() < 0.8 else (*NUMBERS, *REALS, *TEXTS, *OTHERS)
        chosen[key] = draw.choice(candidates)
    return chosen


def build(values: dict) -> str:
    """Builds the shrunk digits experiment with settings replaced, up to the shapes of its state.

    Nothing is computed. Returns an empty string.
    """
    raw = experiment().to_dict()
    for key, value in {**TINY, **values}.items():
        section, _, name = key.rpartition(".")
        (raw[section] if section else raw)[name] = value
    settings = config.read(raw)
    mesh = sharding.make_mesh(settings.mesh)
    objectives.checked(settings)
    check_batch(settings, mesh)
    source = settings.data.open(settings.data.split)
    settings.data.open(settings.evaluate.split)
    spec = pipeline.spec(source, settings.data.patch_size)
    state.check_state_fits(untrained(settings, spec, mesh))
    return ""


def in_process(count: int, seed: int, tally: damage.Tally) -> None:
    draw = random.Random(seed)
    for _ in range(count):
        values, begin = overrides(draw), time.monotonic()
        found, said = damage.outcome(lambda values=values: build(values), lambda _: True)
        slow = time.monotonic() - begin > SECONDS
        if time.monotonic() - begin > 5:
            print(f"{time.monotonic() - begin:.0f} s: {values}", flush=True)
        tally.add("in process", "traceback" if slow else found,
                  f"{values} -> {'too slow' if slow else said}"[:400])


def by_command_line(count: int, seed: int, tally: damage.Tally) -> None:
    """Starts launch.train with overrides as flags: it must end with one line, or train."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        for trial in range(count):
            values = overrides(draw)
            flags = [f"--config.{key}={value}"
                     for key, value in (TINY | {"train.steps": 3} | values).items()]
            program = [sys.executable, "-m", "launch.train",
                       f"--config={ROOT}/experiments/digits.py", f"--workdir={folder}/{trial}"]
            found, said = _end_of([*program, *flags], Path(folder))
            tally.add("command line", found, f"{values} -> {said}"[:400])


def _end_of(command, folder: Path) -> tuple[str, str]:
    try:
        variables = environment(JAX_COMPILATION_CACHE_DIR=str(folder / "cache"),
                                JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0.1")
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS,
                              env=variables)
    except subprocess.TimeoutExpired as error:
        trained = b"step 1/" in (error.stdout or b"")
        return ("ok", "trains") if trained else ("traceback", f"nothing within {SECONDS} s")
    except ValueError as error:  # a NUL that no command line can hold
        return "ok", str(error)
    if done.returncode == 0:
        return "ok", ""
    error = done.stderr
    one_line = done.returncode == 2 and error.count("\n") == 1 and error.startswith("error: ")
    return ("refused" if one_line else "traceback"), error[-300:]


def run(inside: int, outside: int, seed: int) -> damage.Tally:
    tally = damage.Tally()
    in_process(inside, seed, tally)
    by_command_line(outside, seed, tally)
    return tally


if __name__ == "__main__":
    result = run(*map(ast.literal_eval, sys.argv[1:4]))
    print(result)
    print("\n".join(result.wrong()))
    sys.exit(bool(result.wrong()))
