"""The file metrics.jsonl in the workdir."""

import json
import math
import time

from etils import epath

from ntm_jax import files

NAME = "metrics.jsonl"
REMOTE_LINES = 200  # object storage cannot append: lines between rewrites of the file


class Lines:
    """WORKDIR/metrics.jsonl, which has one line for each step.

    A line is an object: step, wall_time (seconds since 1970) and the scalars by name; a non-finite
    number is null. Locally each line is appended and flushed. On object storage the file is
    rewritten every REMOTE_LINES lines, and when the run is saved.
    """

    def open(self, workdir: str, start_step: int, settings: dict) -> None:
        """Opens the file; drops the lines of the steps that a resumed run repeats."""
        self._path = epath.Path(workdir) / NAME
        self._lines = [json.dumps(line) + "\n" for line in files.read_lines(self._path)
                       if line["step"] <= start_step]
        self._written, self._file = -1, None  # lines in the file; -1: others
        self.flush()
        if not files.is_remote(workdir):
            self._file = open(self._path, "a")  # noqa: SIM115, open for the entire run

    def scalars(self, step: int, scalars: dict[str, float]) -> None:
        """Appends a step's line."""
        finite = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        line = json.dumps({"step": step, "wall_time": time.time()} | finite, allow_nan=False) + "\n"
        if self._file:
            with files.naming(self._path):
                self._file.write(line)
                self._file.flush()
            return
        self._lines.append(line)
        if len(self._lines) - self._written >= REMOTE_LINES:
            self.flush()

    def flush(self) -> None:
        """Writes the remaining lines."""
        if self._written != len(self._lines):
            files.write(self._path, "".join(self._lines))
            self._written = len(self._lines)

    def picture(self, step: int, path) -> None:
        """Pictures have files of their own."""

    def close(self) -> None:
        """Writes the remaining lines and closes the file."""
        if self._file:
            with files.naming(self._path):
                self._file.close()
        self.flush()
