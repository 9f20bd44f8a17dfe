"""Prints in one line that the process beside which it runs has ended, where that cannot say so.

The process is its parent. What C++ writes to the parent's standard error (file descriptor 2) passes
through here, without the pages that jax's coordination service prints when another process of the
job is gone: the line stands for them. It imports only the standard library, to start at once.

Arguments: the pipe with the parent's standard error; the line for a parent that the coordination
service aborted; the line for a parent that ended otherwise without a message. Standard input: the
parent's message when it ends in order, printed in place of these lines.
"""

import os
import re
import selectors
import sys

QUIET = "-"  # the message of a parent that ends in order and has nothing to print
_RECORD = re.compile(rb"[IWEF]\d{4} \d\d:\d\d:\d\d\.\d+ ")
_SERVICE = re.compile(rb"coordination_service|preemption_|"
                      rb"Terminating process because the JAX distributed service")


class Filter:
    """Passes on all lines but the records of the coordination service.

    ended: whether one of those was fatal.
    """

    def __init__(self, write):
        self._write, self._rest, self._passing, self.ended = write, b"", True, False

    def feed(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._line(line + b"\n")

    def close(self) -> None:
        if self._rest:
            self._line(self._rest)

    def _line(self, line: bytes):
        # A line without a record's head belongs to the record before.
        if _RECORD.match(line) and not self.ended:
            self._passing = not _SERVICE.search(line)
            self.ended = not self._passing and line.startswith(b"F")
        if self._passing:
            self._write(line)


def main(pipe: int, gone: str, died: str) -> None:
    said = b""
    errors = Filter(sys.stderr.buffer.write)
    running = True
    with selectors.DefaultSelector() as selector:
        selector.register(0, selectors.EVENT_READ)
        selector.register(pipe, selectors.EVENT_READ)
        # After the parent's end the rest is read without waiting: a child of it may hold the pipe.
        while selector.get_map() and (events := selector.select(None if running else 0)):
            for key, _ in events:
                data = os.read(key.fd, 65536)
                if key.fd == pipe:
                    errors.feed(data)
                    sys.stderr.flush()
                else:
                    said += data
                if not data:
                    selector.unregister(key.fd)
                    running = running and key.fd != 0
    errors.close()
    line = said.decode() or (gone if errors.ended else died)
    if line != QUIET:
        sys.stderr.buffer.write(line.encode() + b"\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
