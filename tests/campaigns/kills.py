"""Kills a training run with SIGKILL at random moments and resumes it with the same command.

No committed step may be lost, and the losses must be those of an uninterrupted run: bit for bit, or
within 1e-5 where every start has another number of devices.

    python -m tests.campaigns.kills 100 0       # on one device
    python -m tests.campaigns.kills 3 0 4 2 8   # on 4, 2 and 8 simulated devices in turn
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests import common, forked
from tests.common import ROOT, TINY, environment

CONFIG = TINY | {"train.save_every": 1, "train.steps": 100_000, "optimizer.warmup_steps": 20,
                 "data.batch_size": 16}
Process = subprocess.Popen | forked.Program
FARTHEST = 6  # steps that a start takes before it is killed


def start(workdir: Path, devices: int, cache: Path, changes: dict) -> Process:
    """Starts training on simulated devices, in a new folder or that of the run."""
    settings = CONFIG | changes | {"mesh.fsdp": {1: 1, 2: 2}.get(devices, devices // 2)}
    arguments = [f"--config={ROOT}/experiments/digits.py", f"--workdir={workdir}",
                 *(f"--config.{k}={v}" for k, v in settings.items())]
    variables = environment(devices=devices)
    if "JAX_COMPILATION_CACHE_DIR" not in variables:
        variables |= {"JAX_COMPILATION_CACHE_DIR": str(cache),
                      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
    return common.start(["-m", "launch.train", *arguments], env=variables)


def committed(workdir: Path) -> int:
    """The last step whose checkpoint is complete."""
    folder = workdir / "checkpoints"
    return max((int(path.name) for path in folder.iterdir() if path.name.isdecimal()),
               default=0) if folder.exists() else 0


def stop_at(process: Process, step: int, how: int, delay: float = 0.0) -> int | None:
    """Sends a signal a moment after the run printed `step`; returns the step that it resumed at.

    Asserts that nothing is on stderr.
    """
    resumed = None
    for line in process.stdout:
        found = re.search(r"resuming .* at step (\d+)", line)
        resumed = int(found[1]) if found else resumed
        if line.startswith(f"step {step}/"):
            time.sleep(delay)
            process.send_signal(how)
            break
    _, error = process.communicate(timeout=120)
    assert process.returncode == (0 if how == signal.SIGTERM else -how), error
    # XLA's warnings of a mesh are no matter here
    assert not re.sub(r"^W\d{4} .*\n", "", error, flags=re.MULTILINE), error
    return resumed


def losses(workdir: Path) -> dict[int, float]:
    return {line["step"]: line["loss"]
            for line in map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())}


def run(kills: int, seed: int, devices: tuple[int, ...] = (1,), folder: Path | None = None,
        settings: dict | None = None) -> tuple[int, float]:
    """(the steps taken, the largest difference of a loss to the uninterrupted run's).

    The uninterrupted run has one device. settings: overrides of CONFIG.
    """
    changes = settings or {}
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory(dir=folder) as root:
        workdir, uninterrupted, cache = (
            Path(root) / name for name in ("killed", "uninterrupted", "cache"))
        for kill in range(kills):
            before = committed(workdir)
            process = start(workdir, devices[kill % len(devices)], cache, changes)
            resumed = stop_at(process, before + draw.randint(1, FARTHEST), signal.SIGKILL,
                              draw.uniform(0, 0.1))
            assert (resumed or 0) == before, (
                f"kill {kill}: step {before} was committed, and the run resumed at {resumed}")
            print(f"kill {kill + 1}: resumed at step {before}, killed after step "
                  f"{committed(workdir)} was saved", flush=True)
        last = committed(workdir) + 2
        stop_at(start(workdir, devices[kills % len(devices)], cache, changes), last,
                signal.SIGTERM)
        stop_at(start(uninterrupted, 1, cache, changes), last, signal.SIGTERM)
        found, expected = losses(workdir), losses(uninterrupted)
        steps = sorted(found.keys() & expected.keys())
        assert steps == list(range(1, steps[-1] + 1))
        assert steps[-1] >= last
        return steps[-1], max(abs(found[step] - expected[step]) for step in steps)


if __name__ == "__main__":
    begin = time.time()
    count, difference = run(int(sys.argv[1]), int(sys.argv[2]),
                            tuple(map(int, sys.argv[3:])) or (1,))
    print(f"{sys.argv[1]} kills in {time.time() - begin:.0f} s on {os.cpu_count()} cores: {count} "
          f"steps, nothing lost, largest difference of a loss to the uninterrupted run's "
          f"{difference:g}")
