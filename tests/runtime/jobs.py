"""Starts jobs of several processes, as a user does."""

import json
import re
import socket

from tests.common import TINY, environment, start

SETTINGS = TINY | {"train.steps": 12, "train.save_every": 4, "sample.decoder": "inverse",
                   "evaluate.batch_size": 20}  # TINY's split: one program scores any split


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


class Job:
    """The processes of one training run, or of another program that reads its workdir.

    settings: overrides of SETTINGS for a training run, in turn over the processes.
    variables: a function from the number of devices to the processes' environment.
    """

    def __init__(self, workdir, count, devices=2, settings=({},), program="train", flags=(),
                 variables=environment):
        port, self.processes = free_port(), []
        for number in range(count):
            config = []
            if program == "train":
                overrides = SETTINGS | settings[number % len(settings)]
                config = ["--config=experiments/digits.py",
                          *(f"--config.{key}={value}" for key, value in overrides.items())]
            self.processes.append(start(
                ["-m", f"launch.{program}", f"--coordinator_address=localhost:{port}",
                 f"--num_processes={count}", f"--process_id={number}", f"--workdir={workdir}",
                 "--heartbeat_timeout=10", *flags, *config], env=variables(devices)))

    def read_until(self, pattern) -> str:
        """The next line of process 0 that has the pattern."""
        for line in self.processes[0].stdout:
            if re.search(pattern, line):
                return line
        raise AssertionError(f"no line like {pattern}: {self.processes[0].stderr.read()}")

    def end(self, status: int = 0) -> list[tuple[str, str]]:
        """(last line of stdout, of stderr) of every process; each must have this status."""
        texts = [process.communicate(timeout=240) for process in self.processes]
        assert [process.returncode for process in self.processes] == [status] * len(texts), texts
        return [tuple((text.strip().splitlines() or [""])[-1] for text in both) for both in texts]


def losses(workdir) -> dict[int, float]:
    """{step: loss} of a run."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}
