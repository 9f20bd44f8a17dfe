"""TensorBoard events in the workdir."""

import time
from typing import Any, cast

import numpy as np

from ntm_jax import files


class TensorBoard:
    """TensorBoard's event file, flushed with every step's scalars. OSErrors name the file.

    It writes in the caller's thread: tensorboardX's own thread dies on a full disk, and its queue
    then blocks the run.
    """

    def open(self, workdir: str, start_step: int, settings: dict) -> None:
        """Starts an event file, which hides the events of earlier ones after `start_step`."""
        # Imported here, because tensorboardX imports torch if installed, which takes seconds.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        events = cast(Any, event_pb2)  # which makes its classes when it is imported
        self._events, self._folder = events, workdir
        with files.naming(workdir):
            self._file = EventsWriter(f"{workdir}/events")
            # Makes TensorBoard drop what an earlier process logged after the restored checkpoint.
            start = events.SessionLog(status=events.SessionLog.START)
            for content in ({"file_version": "brain.Event:2"}, {"session_log": start}):
                self._file.write_event(events.Event(step=start_step + 1, **content))

    def scalars(self, step: int, scalars: dict[str, float]) -> None:
        """Writes a step's scalars."""
        from tensorboardX import summary

        self._write(step, [summary.scalar(name, value) for name, value in scalars.items()])

    def picture(self, step: int, path) -> None:
        """Writes a PNG file's pixels."""
        from PIL import Image
        from tensorboardX import summary

        with path.open("rb") as file, Image.open(file) as image:
            pixels = np.asarray(image.convert("RGB"))
        self._write(step, [summary.image(path.stem, pixels, dataformats="HWC")])

    def close(self) -> None:
        """Closes the file."""
        with files.naming(self._folder):
            self._file.close()

    def _write(self, step, summaries):
        now = time.time()
        with files.naming(self._folder):
            for one in summaries:
                self._file.write_event(self._events.Event(step=step, wall_time=now, summary=one))
            self._file.flush()
