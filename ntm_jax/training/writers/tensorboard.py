"""TensorBoard events in the workdir."""

import contextlib
import io
import pathlib
import tempfile
import time
from typing import Any, cast

import numpy as np
from etils import epath

from ntm_jax import files

REMOTE_SECONDS = 60  # object storage cannot append: between uploads of the file


class TensorBoard:
    """TensorBoard's event file, flushed with every step's scalars. OSErrors name the file.

    It writes in the caller's thread: tensorboardX's own thread dies on a full disk, and its queue
    then blocks the run. For object storage the file lies in a temporary folder. It is uploaded
    every REMOTE_SECONDS, after pictures, and when the run is saved.
    """

    def open(self, workdir: str, start_step: int, settings: dict) -> None:
        """Starts an event file, which hides the events of earlier ones after `start_step`."""
        # Imported here, because tensorboardX imports torch if installed, which takes seconds.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        events = cast(Any, event_pb2)  # which makes its classes when it is imported
        self._events, self._workdir, self._due = events, workdir, 0.0  # when to upload the file
        self._local = tempfile.TemporaryDirectory() if files.is_remote(workdir) else None
        self._folder = self._local.name if self._local else workdir
        with files.naming(self._folder):
            self._file = EventsWriter(f"{self._folder}/events")
            # Makes TensorBoard drop what an earlier process logged after the restored checkpoint.
            start = events.SessionLog(status=events.SessionLog.START)
            for content in ({"file_version": "brain.Event:2"}, {"session_log": start}):
                self._file.write_event(events.Event(step=start_step + 1, **content))

    def scalars(self, step: int, scalars: dict[str, float]) -> None:
        """Writes a step's scalars."""
        from tensorboardX import summary

        self._write(step, [summary.scalar(name, value) for name, value in scalars.items()])
        if time.monotonic() >= self._due:
            self.flush()

    def picture(self, step: int, path) -> None:
        """Writes a PNG file's pixels."""
        from PIL import Image
        from tensorboardX import summary

        with Image.open(io.BytesIO(files.read(path))) as image:
            pixels = np.asarray(image.convert("RGB"))
        self._write(step, [summary.image(path.stem, pixels, dataformats="HWC")])
        self._due = 0.0

    def flush(self) -> None:
        """Uploads the file to object storage; elsewhere it is complete."""
        if self._local:
            self._due = time.monotonic() + REMOTE_SECONDS
            [file] = pathlib.Path(self._folder).iterdir()
            files.write(epath.Path(self._workdir) / file.name, file.read_bytes())

    def close(self) -> None:
        """Closes the file."""
        with self._local or contextlib.nullcontext():
            with files.naming(self._folder):
                self._file.close()
            self.flush()

    def _write(self, step, summaries):
        now = time.time()
        with files.naming(self._folder):
            for one in summaries:
                self._file.write_event(self._events.Event(step=step, wall_time=now, summary=one))
            self._file.flush()
