"""What a run reports while it trains: metrics.jsonl, TensorBoard events, and a progress bar or plain lines on the terminal."""

import json
import math
import sys
import time

import jax
from etils import epath
from tqdm import tqdm

from ntm_jax import files

SHOWN = 6  # scalars on the terminal, the first in the caller's order
REMOTE_LINES = 200  # object storage cannot append: the file is written anew every so many lines


class Writer:
    """Writes a run's metrics in its workdir. Only process 0 writes; in the others every method does nothing.

    metrics.jsonl has one object a line: step, wall_time (seconds since 1970) and the scalars by name; a number that is not finite is
    null. A run that resumes drops the lines of steps it is about to take again, so a step has one line.

    Args:
      workdir: a local folder, made if it is not there, or an object-storage address, which gets no TensorBoard events.
      total_steps: where the run ends.
      start_step: steps taken before this run; 0 begins the file anew.
      quiet: nothing goes to the terminal.
    """

    def __init__(self, workdir, total_steps: int, start_step: int = 0, quiet: bool = False):
        self._active = jax.process_index() == 0
        if not self._active:
            return
        workdir = epath.Path(workdir)
        self._quiet, self._total = quiet, total_steps
        self._since = None  # (step, seconds) of the last report, for the rate
        self._bar = None
        if sys.stderr.isatty() and not quiet:
            self._bar = tqdm(total=total_steps, initial=start_step, unit=" steps", dynamic_ncols=True)
        workdir.mkdir(parents=True, exist_ok=True)
        self._lines = _Lines(workdir / "metrics.jsonl", start_step, remote=_is_remote(workdir))
        self._board = None
        if _is_remote(workdir):
            self.message(f"no TensorBoard events: {workdir} is not a local folder; metrics.jsonl has the same figures")
        else:
            self._board = _Board(workdir, start_step)

    @property
    def shows(self) -> bool:
        """Whether anything goes to the terminal."""
        return self._active and not self._quiet

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Reports the scalars of a step. Call it once a step with all of them; the terminal shows the first few."""
        if not self._active:
            return
        scalars = {name: float(value) for name, value in scalars.items()}
        now = time.time()
        self._lines.append({"step": int(step), "wall_time": now} | {n: v if math.isfinite(v) else None for n, v in scalars.items()})
        if self._board:
            self._board.scalars(step, now, scalars)
        shown = list(scalars.items())[:SHOWN]
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(f"{name} {value:.4g}" for name, value in shown), refresh=False)
            self.advance(step)
            self._bar.refresh()
        elif not self._quiet:
            figures = [f"{name} {value:.4g}" for name, value in shown]
            print(" ".join([f"step {step}/{self._total}", *figures, *self._pace(step)]), flush=True)

    def advance(self, step: int) -> None:
        """Moves the bar to a step, and starts the clock of the rate after the first (which compiles)."""
        if not self._active:
            return
        if self._since is None:
            self._since = (step, time.perf_counter())
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def image(self, step: int, name: str, image) -> None:
        """Sends a uint8 array [H, W, C], C 1 or 3, to TensorBoard."""
        if self._active and self._board:
            self._board.image(step, name, image)

    def message(self, text: str) -> None:
        """Prints a line, above the bar where there is one."""
        if not self._active or self._quiet:
            return
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Writes what is still held back. Nothing may be written after it; a second close does nothing."""
        if not self._active:
            return
        self._active = False
        self._lines.close()
        if self._board:
            self._board.close()
        if self._bar is not None:
            self._bar.close()

    def _pace(self, step):
        """["35.1 steps/s", "ETA 0:45"] since the last report; nothing at the first."""
        before, self._since = self._since, (step, time.perf_counter())
        if before is None or step <= before[0]:
            return []
        rate = (step - before[0]) / max(self._since[1] - before[1], 1e-9)
        minutes, seconds = divmod(math.ceil((self._total - step) / rate), 60)
        hours, minutes = divmod(minutes, 60)
        return [f"{rate:.3g} steps/s", "ETA " + (f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}")]


class _Board:
    """TensorBoard's event file, written in this thread: tensorboardX's own thread dies on a full disk, and its queue then blocks the run.

    It is flushed with every step's scalars. OSErrors name the file.
    """

    def __init__(self, workdir, start_step):
        from tensorboardX.event_file_writer import (
            EventsWriter,  # here, since it imports torch where that is: seconds of every start
        )
        from tensorboardX.proto import event_pb2

        self._events, self._folder = event_pb2, workdir
        with files.naming(workdir):
            self._file = EventsWriter(f"{workdir}/events")
            if start_step:  # TensorBoard forgets what the run logged after the save that this one resumes from
                start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
                self._file.write_event(event_pb2.Event(step=start_step + 1, file_version="brain.Event:2"))
                self._file.write_event(event_pb2.Event(step=start_step + 1, session_log=start))

    def scalars(self, step, now, scalars):
        from tensorboardX import summary

        self._write(step, now, [summary.scalar(name, value) for name, value in scalars.items()])

    def image(self, step, name, image):
        from tensorboardX import summary

        self._write(step, time.time(), [summary.image(name, image, dataformats="HWC")])

    def _write(self, step, now, summaries):
        with files.naming(self._folder):
            for one in summaries:
                self._file.write_event(self._events.Event(step=step, wall_time=now, summary=one))
            self._file.flush()

    def close(self):
        with files.naming(self._folder):
            self._file.close()


class _Lines:
    """The file of one JSON object a line: appended and flushed line by line locally, written anew every so often elsewhere."""

    def __init__(self, path, start_step, remote):
        self._path = path
        found = path.read_bytes().decode(errors="replace").splitlines(keepends=True) if path.exists() else []
        self._kept = [line for line in found if line.endswith("\n") and _step(line) <= start_step]
        if len(self._kept) < len(found):
            self._replace()
        self._unwritten, self._file = 0, None
        if not remote:
            self._kept, self._file = [], open(path, "a")  # noqa: SIM115, held for the run

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
    """The step of a line; infinity for a line that a kill cut short or garbled, so that it is dropped."""
    try:
        return float(files.parse_json(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError):
        return math.inf


def _is_remote(path) -> bool:
    return "://" in str(path)
