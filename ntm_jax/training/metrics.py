"""Reports a run's metrics to metrics.jsonl, TensorBoard and the terminal."""

import json
import math
import sys
import time
from typing import Any, cast

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from ntm_jax import files

BAR = "{n_fmt}/{total_fmt}{postfix}, {remaining} left |{bar}|"  # narrow terminals have no bar
ON_BAR = (("loss", "loss {:.4g}"), ("examples_per_second", "{:.0f} images/s"))
SHOWN = 6  # scalars on the terminal: the first ones in the caller's order
REMOTE_LINES = 200  # object storage cannot append: lines between rewrites of the file


class Writer:
    """Writes a run's metrics to its workdir. Processes other than 0 write nothing.

    Each line of metrics.jsonl is an object: step, wall_time (seconds since 1970) and the scalars by
    name; a non-finite number is null. A resumed run drops the lines of the steps that it repeats,
    so each step has one line.

    Args:
      workdir: a local folder, created if needed, or an object-storage address, which receives no
        TensorBoard events.
      total_steps: the last step of the run.
      start_step: steps taken before this run; 0 starts a new file.
      quiet: prints nothing on the terminal.
    """

    def __init__(self, workdir, total_steps: int, start_step: int = 0, quiet: bool = False):
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
        self._lines = _Lines(workdir / "metrics.jsonl", start_step, remote=_is_remote(workdir))
        self._board = None
        if _is_remote(workdir):
            self.message(f"no TensorBoard events: {workdir} is not a local folder; metrics.jsonl "
                         "has the same figures")
        else:
            self._board = _Board(workdir, start_step)

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
        now = time.time()
        self._lines.append({"step": int(step), "wall_time": now} | {
            name: value if math.isfinite(value) else None for name, value in scalars.items()})
        if self._board:
            self._board.scalars(step, now, scalars)
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
        """Sends a PNG file to TensorBoard, under the file's name without its ending."""
        if self._active and self._board:
            self._board.picture(step, epath.Path(path))

    def message(self, text: str) -> None:
        """Prints a line on the terminal, above the progress bar if there is one."""
        if not self.shows:
            return
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Writes the remaining lines and closes the files; a second call does nothing."""
        if not self._active:
            return
        self._active = False
        self._lines.close()
        if self._board:
            self._board.close()
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


class _Board:
    """TensorBoard's event file, flushed with every step's scalars. OSErrors name the file.

    It writes in the caller's thread: tensorboardX's own thread dies on a full disk, and its queue
    then blocks the run.
    """

    def __init__(self, workdir, start_step):
        # Imported here, because tensorboardX imports torch if installed, which takes seconds.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        events = cast(Any, event_pb2)  # which makes its classes when it is imported
        self._events, self._folder = events, workdir
        with files.naming(workdir):
            self._file = EventsWriter(f"{workdir}/events")
            if start_step:  # makes TensorBoard drop events logged after the restored checkpoint
                start = events.SessionLog(status=events.SessionLog.START)
                for content in ({"file_version": "brain.Event:2"}, {"session_log": start}):
                    self._file.write_event(events.Event(step=start_step + 1, **content))

    def scalars(self, step, now, scalars):
        from tensorboardX import summary

        self._write(step, now, [summary.scalar(name, value) for name, value in scalars.items()])

    def picture(self, step, path):
        from PIL import Image
        from tensorboardX import summary

        with path.open("rb") as file, Image.open(file) as image:
            pixels = np.asarray(image.convert("RGB"))
        self._write(step, time.time(), [summary.image(path.stem, pixels, dataformats="HWC")])

    def _write(self, step, now, summaries):
        with files.naming(self._folder):
            for one in summaries:
                self._file.write_event(self._events.Event(step=step, wall_time=now, summary=one))
            self._file.flush()

    def close(self):
        with files.naming(self._folder):
            self._file.close()


class _Lines:
    """A file of one JSON object per line.

    Locally it appends and flushes each line. On object storage it rewrites the file every
    REMOTE_LINES lines.
    """

    def __init__(self, path, start_step, remote):
        self._path = path
        found = []
        if path.exists():
            found = path.read_bytes().decode(errors="replace").splitlines(keepends=True)
        self._kept = [line for line in found if line.endswith("\n") and _step(line) <= start_step]
        if len(self._kept) < len(found):
            self._replace()
        self._unwritten, self._file = 0, None
        if not remote:
            self._kept, self._file = [], open(path, "a")  # noqa: SIM115, open for the entire run

    def append(self, record):
        line = json.dumps(record, allow_nan=False) + "\n"
        if self._file:
            with files.naming(self._path):
                self._file.write(line)
                self._file.flush()
            return
        self._kept.append(line)
        self._unwritten += 1
        if self._unwritten >= REMOTE_LINES:
            self._replace()
            self._unwritten = 0

    def close(self):
        if self._file:
            with files.naming(self._path):
                self._file.close()
        elif self._unwritten:
            self._replace()

    def _replace(self):
        files.write(self._path, "".join(self._kept))


def _step(line) -> float:
    """The step of a line; infinity, so that it is dropped, for a truncated or damaged line."""
    try:
        return float(files.parse_json(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError):
        return math.inf


def _is_remote(path) -> bool:
    return "://" in str(path)
