"""Reports a run's metrics to the terminal and to its writers; see writers/__init__.py."""

import contextlib
import math
import os
import sys
import time
from collections.abc import Sequence

import jax
from etils import epath
from tqdm import tqdm

from ntm_jax import files
from ntm_jax.training.writers import MetricsWriter
from ntm_jax.training.writers.lines import Lines
from ntm_jax.training.writers.tensorboard import TensorBoard

BAR = "{n_fmt}/{total_fmt}{postfix}, {remaining} left |{bar}|"  # narrow terminals have no bar
ON_BAR = (("loss", "loss {:.4g}"), ("examples_per_second", "{:.0f} images/s"))
SHOWN = 6  # scalars on the terminal: the first ones in the caller's order


class MetricsReporter:
    """Prints a run's metrics, and writes them to metrics.jsonl, to TensorBoard and wherever else.

    Processes other than 0 write nothing.

    Args:
      workdir: a local folder, created if needed, or an object-storage address, which receives no
        TensorBoard events.
      total_steps: the last step of the run.
      start_step: steps taken before this run; 0 starts new files.
      quiet: prints nothing on the terminal.
      extra_writers: further writers, which this one opens and closes.
      settings: the run's settings, {"section.key": value}, for the writers.
    """

    def __init__(self, workdir, total_steps: int, start_step: int = 0, quiet: bool = False,
                 extra_writers: Sequence[MetricsWriter] = (), settings: dict | None = None):
        self._active = jax.process_index() == 0
        if not self._active:
            return
        workdir = epath.Path(workdir)
        self._quiet, self._total = quiet, total_steps
        self._last = None  # (step, seconds) of the last report, for the rate
        self._bar = None
        if sys.stderr.isatty() and not quiet:
            self._bar = tqdm(total=total_steps, initial=start_step, dynamic_ncols=True,
                             bar_format=BAR)
        workdir.mkdir(parents=True, exist_ok=True)
        remote = files.is_remote(workdir)
        if remote:
            self.message(f"no TensorBoard events: {workdir} is not a local folder; metrics.jsonl "
                         "has the same figures")
        self._lines = Lines()
        self._writers = [self._lines, *([] if remote else [TensorBoard()]), *extra_writers]
        with contextlib.ExitStack() as opened:
            for one in self._writers:
                one.open(os.fspath(workdir), start_step, settings or {})
                opened.callback(one.close)
            self._opened = opened.pop_all()

    @property
    def shows(self) -> bool:
        """Whether this writer prints on the terminal."""
        return self._active and not self._quiet

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Reports all scalars of a step, once per step; the terminal shows the first few.

        Raises OSError, which names the file, if it cannot be written.
        """
        if not self._active:
            return
        scalars = {name: float(value) for name, value in scalars.items()}
        for one in self._writers:
            one.scalars(int(step), scalars)
        shown = [(name, f"{value:.4g}") for name, value in list(scalars.items())[:SHOWN]]
        if self._bar is not None:
            text = ", ".join(form.format(scalars[name]) for name, form in ON_BAR if name in scalars)
            if text:
                self._bar.set_postfix_str(text, refresh=False)
            self.advance(step)
            self._bar.refresh()
        elif not self._quiet:
            figures = [f"{name} {value}" for name, value in shown]
            print(" ".join([f"step {step}/{self._total}", *figures, *self._pace(step)]), flush=True)

    def advance(self, step: int) -> None:
        """Moves the progress bar to a step.

        The first call starts the rate's clock, after the first step, which compiles.
        """
        if not self._active:
            return
        if self._last is None:
            self._last = (step, time.perf_counter())
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def picture(self, step: int, path) -> None:
        """Sends a PNG file to the writers that take pictures, under its name without its ending."""
        for one in self._writers if self._active else ():
            one.picture(int(step), epath.Path(path))

    def message(self, text: str) -> None:
        """Prints a line on the terminal, above the progress bar if there is one."""
        if not self.shows:
            return
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def flush(self) -> None:
        """Writes the remaining lines, which a run that resumes after a kill does not repeat."""
        if self._active:
            self._lines.flush()

    def close(self) -> None:
        """Writes the remaining lines and closes the files; a second call does nothing."""
        if not self._active:
            return
        self._active = False
        self._opened.close()
        if self._bar is not None:
            self._bar.close()

    def _pace(self, step):
        """The rate since the last report, as ["35.1 steps/s", "ETA 0:45"]; [] at the first."""
        last, self._last = self._last, (step, time.perf_counter())
        if last is None or step <= last[0]:
            return []
        rate = (step - last[0]) / max(self._last[1] - last[1], 1e-9)
        minutes, seconds = divmod(math.ceil((self._total - step) / rate), 60)
        hours, minutes = divmod(minutes, 60)
        left = f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
        return [f"{rate:.3g} steps/s", f"ETA {left}"]
