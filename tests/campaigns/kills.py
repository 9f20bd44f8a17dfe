"""Kills a training run with SIGKILL at random moments and resumes it with the same command.

No committed step may be lost, and the losses must be those of an uninterrupted run: bit for bit, or
within 1e-5 where every start has another number of devices.

    python -m tests.campaigns.kills 100 0       # 100 kills, drawn from seed 0, on one device
    python -m tests.campaigns.kills 3 0 4 2 8   # on 4, 2 and 8 simulated devices in turn
"""

import random
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests import common
from tests.common import ROOT, TINY, environment
from tests.runtime.jobs import losses

CONFIG = TINY | {"train.save_every": 1, "train.steps": 100_000, "optimizer.warmup_steps": 20}
FARTHEST = 6  # steps that a start takes before it is killed


def stop_at(workdir: Path, devices: int, step: int, how: int, delay: float = 0.0) -> int:
    """Starts training, and sends a signal a moment after it printed `step`.

    Returns the step from which it started.
    """
    settings = CONFIG | {"mesh.fsdp": {1: 1, 2: 2}.get(devices, devices // 2)}
    process = common.start(
        ["-m", "launch.train", f"--config={ROOT}/experiments/digits.py", f"--workdir={workdir}",
         *(f"--config.{key}={value}" for key, value in settings.items())],
        env=environment(devices=devices))
    resumed = 0
    for line in process.stdout:
        found = re.search(r"resuming .* at step (\d+)", line)
        resumed = int(found[1]) if found else resumed
        if line.startswith(f"step {step}/"):
            time.sleep(delay)
            process.send_signal(how)
            break
    _, error = process.communicate(timeout=120)
    assert process.returncode == (0 if how == signal.SIGTERM else -how), error
    return resumed


def committed(workdir: Path) -> int:
    """The last step whose checkpoint is complete; 0 without one."""
    return max((int(path.name) for path in workdir.glob("checkpoints/*") if path.name.isdecimal()),
               default=0)


def main(kills: int, seed: int, *devices: int) -> None:
    devices, draw = devices or (1,), random.Random(seed)
    with tempfile.TemporaryDirectory() as root:
        workdir, uninterrupted = Path(root) / "killed", Path(root) / "uninterrupted"
        for kill in range(kills):
            before = committed(workdir)
            resumed = stop_at(workdir, devices[kill % len(devices)],
                              before + draw.randint(1, FARTHEST), signal.SIGKILL,
                              draw.uniform(0, 0.1))
            assert resumed == before, f"kill {kill}: step {before} was committed, not {resumed}"
            print(f"kill {kill + 1}: resumed at step {before}, killed after step "
                  f"{committed(workdir)} was saved", flush=True)
        last = committed(workdir) + 2
        stop_at(workdir, devices[kills % len(devices)], last, signal.SIGTERM)
        stop_at(uninterrupted, 1, last, signal.SIGTERM)
        found, expected = losses(workdir), losses(uninterrupted)
        steps = range(1, last + 1)
        difference = max(abs(found[step] - expected[step]) for step in steps)
        print(f"{last} steps, nothing lost; largest difference of a loss to the uninterrupted "
              f"run's: {difference:g}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
