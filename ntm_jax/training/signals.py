"""SIGTERM, SIGHUP and Ctrl-C as a request to stop after the current step."""

import contextlib
import os
import signal

import jax
from jax.experimental import multihost_utils


class StopRequest:
    """A context in which SIGTERM, SIGHUP or Ctrl-C asks for a stop; a second signal acts as before.

    A SIGHUP that is ignored, as under nohup, stays ignored. In a job of several processes SIGTERM
    or Ctrl-C to any of them stops all; jax itself catches SIGTERM there.
    """

    def __init__(self):
        self._asked = False
        self._before = {}

    def __enter__(self):
        caught = {signal.SIGINT}
        if jax.process_count() == 1:
            caught |= {signal.SIGTERM, signal.SIGHUP}
        for number in caught:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            with contextlib.suppress(ValueError):  # raised outside the main thread
                self._before[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, *_):
        self._asked = True
        self.__exit__()
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agreed(self, step: int) -> bool:
        """Whether all processes stop at this step. Each must call it at every step."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked
