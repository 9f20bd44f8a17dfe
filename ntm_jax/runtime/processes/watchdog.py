"""Watchdog that prints one error line if the runtime aborts its parent process.

The parent's standard error (file descriptor 2), to which C++ writes, passes through here. Records
of jax's coordination service are dropped: it logs pages when another process of the job is gone,
and the one line replaces them. Imports only the standard library, to start fast.

Arguments: the pipe with the parent's standard error; the line for a parent that the coordination
service aborted; the line for a parent that died in another way. Standard input: the message of a
parent that exits in order, printed instead of these lines.
"""

import os
import re
import selectors
import sys

QUIET = "-"  # the message of a parent that has nothing to print
_RECORD = re.compile(rb"[IWEF]\d{4} \d\d:\d\d:\d\d\.\d+ ")
_SERVICE = re.compile(rb"coordination_service|preemption_|"
                      rb"Terminating process because the JAX distributed service")


class Filter:
    """Passes lines to write(line: bytes), except the coordination service's log records.

    aborted: whether one of these records was fatal.
    """

    def __init__(self, write):
        self._write, self._rest, self._passing, self.aborted = write, b"", True, False

    def feed(self, data: bytes) -> None:
        """Takes the next bytes, which may end within a line."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._line(line + b"\n")

    def close(self) -> None:
        """Handles a last line without a line feed."""
        if self._rest:
            self._line(self._rest)

    def _line(self, line: bytes):
        # A line without a record's head belongs to the record before it.
        if _RECORD.match(line) and not self.aborted:
            self._passing = not _SERVICE.search(line)
            self.aborted = not self._passing and line.startswith(b"F")
        if self._passing:
            self._write(line)


def main(pipe: int, aborted: str, died: str) -> None:
    """Runs until the parent has ended, then prints its message, or `aborted` or `died`."""
    message = b""
    errors = Filter(sys.stderr.buffer.write)
    running = True
    with selectors.DefaultSelector() as selector:
        selector.register(0, selectors.EVENT_READ)
        selector.register(pipe, selectors.EVENT_READ)
        # Once the parent has ended, reads without waiting: a child of it may hold the pipe open.
        while selector.get_map() and (events := selector.select(None if running else 0)):
            for key, _ in events:
                data = os.read(key.fd, 65536)
                if key.fd == pipe:
                    errors.feed(data)
                    sys.stderr.flush()
                else:
                    message += data
                if not data:
                    selector.unregister(key.fd)
                    running = running and key.fd != 0
    errors.close()
    line = message.decode() or (aborted if errors.aborted else died)
    if line != QUIET:
        sys.stderr.buffer.write(line.encode() + b"\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
