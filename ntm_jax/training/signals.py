"""SIGTERM, SIGHUP and Ctrl-C as a request to stop after the current step."""

import contextlib
import signal


class StopRequest:
    """A context in which SIGTERM, SIGHUP or Ctrl-C sets `asked`; a second signal acts as before.

    A SIGHUP that is ignored, as under nohup, stays ignored.
    """

    def __init__(self):
        self.asked = False
        self._before = {}

    def __enter__(self):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            with contextlib.suppress(ValueError):  # raised outside the main thread
                self._before[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, *_):
        self.asked = True
        self.__exit__()

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)
