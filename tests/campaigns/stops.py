"""Stops training runs by a signal in each phase; compares resumed runs with an undisturbed one.

python -m tests.campaigns.stops [--trials=3]; half an hour on two cores.
"""

import argparse
import itertools
import json
import pathlib
import shutil
import signal
import tempfile
import time

from tests.campaigns import phases
from tests.common import logged
from tests.runtime.jobs import Job

SETTINGS = {"train.steps": 12, "train.save_every": 4, "train.evaluate_every": 8,
            "train.log_every": 1, "evaluate.batch_size": 20}
LIMIT = 30  # seconds
DELAYS = 0.2, 1.0, 2.5  # seconds from the beginning of a phase to the signal, by trial


def job(workdir, count: int, announce: bool = True) -> Job:
    flags = ("--stop_status=75",) + ("--import=tests.campaigns.phases",) * announce
    return Job(workdir, count, devices=1, settings=(SETTINGS,), flags=flags)


def results(workdir: pathlib.Path) -> tuple:
    """({step: scalars}, the evaluation) of a run; a step evaluated after a stop has two lines."""
    lines = {}
    for line in logged(workdir):
        lines.setdefault(line["step"], {}).update(line)
    evaluation = json.loads((workdir / "evaluation.json").read_text())
    del evaluation["provenance"]["date"]
    return lines, evaluation


def trial(folder, saved, expected, phase: str, number: int, count: int, delay: float) -> str:
    """"" where the run stopped in time, with 75, and its restart gave what was expected."""
    workdir = folder / "run"
    shutil.rmtree(workdir, ignore_errors=True)
    if phase == "restore":
        shutil.copytree(saved, workdir)
    stopped = job(workdir, count)
    stopped.read_until(f"phase: {phase}$")
    time.sleep(delay)
    stopped.processes[-1].send_signal(number)
    begun = time.monotonic()
    said = stopped.end(75)[0][0]
    seconds = time.monotonic() - begun
    print(f"  {seconds:.1f} s: {said}", flush=True)
    if seconds > LIMIT:
        return f"took {seconds:.0f} s"
    job(workdir, count, announce=False).end()
    return "" if results(workdir) == expected else "the restart differs"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--phases", nargs="*", default=phases.NAMES)
    options = parser.parse_args()
    bad = total = 0
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for count in (1, 2):
            whole, saved = folder / f"whole-{count}", folder / f"saved-{count}"
            job(whole, count, announce=False).end()
            expected = results(whole)
            first = job(saved, count)
            first.read_until("phase: training")
            first.processes[-1].send_signal(signal.SIGTERM)
            first.end(75)
            for phase, kind, number in itertools.product(
                    options.phases, (signal.SIGTERM, signal.SIGINT), range(options.trials)):
                print(f"{phase}, {kind.name}, {count} processes, trial {number + 1}", flush=True)
                try:
                    wrong = trial(folder, saved, expected, phase, kind, count,
                                  DELAYS[number % len(DELAYS)])
                except Exception as error:
                    wrong = f"{type(error).__name__}: {error}"
                total, bad = total + 1, bad + bool(wrong)
                print(f"  {wrong or 'as expected'}", flush=True)
    print(f"{total - bad} of {total} as expected")


if __name__ == "__main__":
    main()
