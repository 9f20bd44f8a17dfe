"""A run's metrics: read from its steps, and reported to the terminal and to its writers."""

import contextlib
import math
import os
import sys
import time
from collections.abc import Sequence

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from ntm_jax.core import trajectory
from ntm_jax.errors import UserError
from ntm_jax.runtime import flops
from ntm_jax.runtime.run import Run
from ntm_jax.training.objectives import Objective
from ntm_jax.training.step import steps_of
from ntm_jax.training.writers import MetricsWriter
from ntm_jax.training.writers.lines import Lines
from ntm_jax.training.writers.tensorboard import TensorBoard

BAR = "{n_fmt}/{total_fmt}{postfix}, {remaining} left |{bar}|"  # narrow terminals have no bar
SHOWN = 6  # scalars on the terminal: the first ones in the caller's order; the bar has two
TERMS = ("log_det", "log_scale", "quadratic", "misalignment")  # metrics by level
DIVERGED = (
    "To go on from it, give the same command with a lower --config.optimizer.learning_rate or "
    "--config.optimizer.clip; if it stops again at once, first remove the latest folder in "
    "WORKDIR/checkpoints, to go on from the one before; to change config.trajectory.t_min_range, "
    "start a new run with another --workdir and --config.init_from=WORKDIR")


class MetricsReporter:
    """Prints a run's metrics, and writes them to metrics.jsonl, to TensorBoard and wherever else.

    Processes other than 0 write nothing.

    Args:
      workdir: a local folder, created if needed, or an object-storage address.
      total_steps: the last step of the run.
      start_step: steps taken before this run; 0 starts new files.
      quiet: prints nothing on the terminal.
      extra_writers: further writers, which this one opens and closes.
      settings: the run's settings, {"section.key": value}, for the writers.
    """

    def __init__(self, workdir, total_steps: int, start_step: int = 0, quiet: bool = False,
                 extra_writers: Sequence[MetricsWriter] = (), settings: dict | None = None):
        workdir = epath.Path(workdir)
        self.shows = jax.process_index() == 0 and not quiet  # prints on the terminal
        self._total = total_steps
        self._first = None  # (step, seconds) after the first step, which compiles
        self._bar = tqdm(total=total_steps, initial=start_step, dynamic_ncols=True, bar_format=BAR,
                         disable=not (self.shows and sys.stderr.isatty()))
        self._own, self._writers = (Lines(), TensorBoard()), []
        if jax.process_index() == 0:
            workdir.mkdir(parents=True, exist_ok=True)
            self._writers = [*self._own, *extra_writers]
        with contextlib.ExitStack() as opened:
            opened.callback(self._bar.close)
            for one in self._writers:
                one.open(os.fspath(workdir), start_step, settings or {})
                opened.callback(one.close)
            self._opened = opened.pop_all()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._opened.close()

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Reports all scalars of a step, once per step; the terminal shows the first few.

        Raises OSError, which names the file, if it cannot be written.
        """
        scalars = {name: float(value) for name, value in scalars.items()}
        if not scalars:
            return
        for one in self._writers:
            one.scalars(step, scalars)
        figures = [f"{name} {value:.4g}" for name, value in scalars.items()]
        self._bar.set_postfix_str(", ".join(figures[:2]))
        if self.shows and self._bar.disable:
            line = [f"step {step}/{self._total}", *figures[:SHOWN]]
            first, began = self._first or (step, 0.0)
            if step > first:
                rate = (step - first) / (time.perf_counter() - began)
                left = tqdm.format_interval(math.ceil((self._total - step) / rate))
                line += [f"{rate:.3g} steps/s", f"ETA {left}"]
            print(" ".join(line), flush=True)

    def advance(self, step: int) -> None:
        """Moves the progress bar to a step; the first call starts the rate's clock."""
        self._first = self._first or (step, time.perf_counter())
        self._bar.update(step - self._bar.n)

    def picture(self, step: int, path) -> None:
        """Sends a PNG file to the writers that take pictures, under its name without its ending."""
        for one in self._writers:
            one.picture(step, epath.Path(path))

    def message(self, text: str) -> None:
        """Prints a line on the terminal, above the progress bar if there is one."""
        if self.shows:
            self._bar.write(text)
            sys.stdout.flush()

    def flush(self) -> None:
        """Writes what is left to, which a run that resumes after a kill does not repeat."""
        if self._writers:
            for one in self._own:
                one.flush()


class Rates:
    """How fast a run's steps are, from `step` on.

    step_flops: the model's FLOPs in a step of the largest T; 0 where they are not reported.
    """

    def __init__(self, run: Run, objective: Objective, step: int, step_flops: int):
        self._run, self._objective = run, objective
        self._step_flops, self._peak = step_flops, 0.0
        if step_flops:
            self._peak = flops.matmul_rate_probe(run.config.model.dtype, run.mesh, 0.1)()
        self._clock = time.perf_counter(), step

    def read(self, step: int) -> dict[str, float]:
        """The scalars of the steps since the last call."""
        config, now, (before, first) = self._run.config, time.perf_counter(), self._clock
        speed, self._clock = (step - first) / (now - before), (now, step)
        scalars = {"examples_per_second": speed * config.data.batch_size}
        memory = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        if memory:
            scalars["device_memory_gib"] = memory / 2**30
        if self._step_flops:
            drawn = np.mean([steps_of(config, self._objective, n) for n in range(first, step)])
            rate = speed * self._step_flops * float(drawn) / max(config.trajectory.steps)
            scalars |= {"flops_per_second": rate, "flop_share": rate / self._peak}
        return scalars


def logged_scalars(metrics: dict, step: int) -> dict[str, float]:
    """A step's metrics on the host -> scalars to log, among them all single numbers of the loss.

    Raises UserError if one is not finite, naming the step, the level and the term.
    """
    metrics = dict(metrics)
    finite = metrics.pop("finite")
    terms = {name: metrics.pop(name) for name in TERMS if name in metrics}
    order = ["loss", "grad_norm", *metrics]  # the terminal shows the first ones
    scalars = {name: float(metrics[name]) for name in order if name in metrics}
    if not (finite and all(map(math.isfinite, scalars.values()))):
        bad = [f"{term} at level {k}" for term in terms for k, value in enumerate(terms[term])
               if not np.isfinite(value)]
        first = bad[0] if bad else "the gradient or the update, every term being finite,"
        raise UserError(f"step {step}: {first} is not a finite number, so the run stopped; the "
                        "last checkpoint is untouched. First check that the data hold finite "
                        f"numbers only. {DIVERGED}")
    by_level = {"misalignment": terms.get("misalignment", ())}
    if "quadratic" in terms:
        nll = terms["quadratic"] + terms["log_scale"] - terms["log_det"]
        by_level["nll"] = nll + trajectory.LOG_2PI / 2
    return scalars | {f"{name}/level_{k}": float(value) for name, values in by_level.items()
                      for k, value in enumerate(values)}
