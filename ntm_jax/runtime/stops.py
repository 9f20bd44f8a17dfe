"""Stops a training job on SIGTERM, SIGHUP or Ctrl-C, saved, wherever each of its processes is.

A thread reads signals as they arrive (signal.set_wakeup_fd), also while the main thread compiles or
waits for another process. In the training loop the main thread counts points, and the processes
agree on one, the same in all, at which they save and stop. Outside the loop nothing is unsaved, and
the thread ends its process. It also does so where the main thread reaches no point in time.
"""

import contextlib
import itertools
import math
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator

from jax._src import distributed  # jax has no public way to its key-value store

POLL = 1.0  # seconds between two looks for a stop of another process
GRACE = 15.0  # seconds that the main thread has for reaching a point, at least
_jobs = itertools.count()  # of this process; each has its own keys
_current: "Watch | None" = None


class Stopped(Exception):
    """Ends an evaluation at the point where the job stops."""


def evaluation_point() -> None:
    """A point within an evaluation of the training loop, and nothing elsewhere.

    Raises Stopped where the job stops at it.
    """
    if _current:
        _current.evaluation_point()


@contextlib.contextmanager
def watch() -> "Iterator[Watch]":
    """The program's Watch; in a Python process without one, a new one that never ends it."""
    if _current:
        yield _current
    else:
        with Watch() as own:
            yield own


class Watch:
    """Watches for a signal to this process of a job, or to another one.

    status: the exit status of a process that the thread ends. None: it ends none.
    busy: whether a save is in progress, for which the end waits.

    A second Ctrl-C raises KeyboardInterrupt. A SIGHUP that is ignored, as under nohup, stays so.
    """

    def __init__(self, status: int | None = None):
        self.busy: Callable[[], bool] = lambda: False
        self._evaluating = False
        self._status, self._keys = status, f"ntm_jax/stop/{next(_jobs)}"
        self._change = threading.Condition()
        self._inside, self._points, self._longest, self._last = False, 0, 0.0, 0.0
        self._reason = ""  # of a stop; from then on points wait for the agreement
        self._stop_at: float | None = None  # the point agreed on; infinite: none
        self._interrupts = 0
        self._before = {}

    def __enter__(self) -> "Watch":
        global _current
        _current = self
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        with contextlib.suppress(ValueError):  # raised outside the main thread
            self._wakeup = signal.set_wakeup_fd(self._write)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind, *_):
        global _current
        if self._ending() and kind is not KeyboardInterrupt:
            self._thread.join()  # an error may come of the others' end
        if self._before:
            signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._write)  # ends the thread
        self._thread.join()
        os.close(self._read)
        _current = None

    def _handle(self, number, _):
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt

    def begin(self) -> None:
        """From here on there may be steps to save, at the next points."""
        with self._change:
            self._inside, self._last = True, time.monotonic()

    def end(self) -> None:
        """From here on all steps are saved, or being saved."""
        with self._change:
            self._inside = False
            self._change.notify_all()

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """A block that ends early where the job stops at an evaluation_point in it."""
        self._evaluating = True
        try:
            with contextlib.suppress(Stopped):
                yield
        finally:
            self._evaluating = False

    def evaluation_point(self) -> None:
        """Raises Stopped within `evaluation` where the job stops at this point."""
        if self._evaluating and self.point():
            raise Stopped

    def point(self) -> bool:
        """Counts a point; whether the job stops at it. All processes have the same points."""
        with self._change:
            now = time.monotonic()
            self._longest, self._last = max(self._longest, now - self._last), now
            self._points += 1
            self._change.wait_for(lambda: not self._reason or self._stop_at is not None)
            self._change.notify_all()
            return self.stopping

    @property
    def stopping(self) -> bool:
        """Whether the job stops at a point that is reached, or was; the same in all processes."""
        return self._stop_at is not None and self._points >= self._stop_at

    def _ending(self) -> bool:
        return bool(self._reason) and not self.stopping and self._status is not None

    def _run(self) -> None:
        reason = self._wait_for_stop()
        if not reason:
            return
        with self._change:
            self._reason = reason
            following = self._points + 1 if self._inside else math.inf
        stop_at = self._agree(following)
        with self._change:
            self._stop_at = stop_at
            self._change.notify_all()
            if self._inside:
                self._change.wait_for(lambda: self.stopping or not self._inside,
                                      max(GRACE, 2 * self._longest))
            unsaved = self._inside
        if self._ending():
            self._end_process(unsaved)

    def _wait_for_stop(self) -> str:
        """Why to stop; "" once the watch ends."""
        while True:
            store = distributed.global_state.client
            ready, _, _ = select.select([self._read], [], [], POLL if store else None)
            numbers = os.read(self._read, 64) if ready else b"\0"
            if not numbers:
                return ""
            for number in self._before.keys() & set(numbers):
                return signal.Signals(number).name
            if store and store.key_value_dir_get(self._keys):
                return "a stop of another process"

    def _agree(self, following: float) -> float:
        """The last of the points that follow in the processes: none of them has passed it."""
        store, job = distributed.global_state.client, distributed.global_state
        if not store:
            return following
        store.key_value_set(f"{self._keys}/{job.process_id}", str(following))
        end = time.monotonic() + GRACE
        while time.monotonic() < end:
            given = store.key_value_dir_get(self._keys)
            if len(given) == job.num_processes:
                return max(float(value) for _, value in given)
            time.sleep(0.1)
        return math.inf  # a process is lost, or has not come this far

    def _end_process(self, unsaved: bool) -> None:
        while self.busy():
            time.sleep(0.1)
        print(f"stopped by {self._reason}, " + (
            f"without a save, as no step ended in {max(GRACE, 2 * self._longest):.0f} s; the same "
            "command resumes at the last checkpoint" if unsaved else
            "with nothing to save; the same command goes on"), flush=True)
        job = distributed.global_state
        if job.client and job.num_processes > 1 and job.process_id == 0:
            time.sleep(2)  # jax aborts the others when process 0 ends
        assert self._status is not None
        os._exit(self._status)
