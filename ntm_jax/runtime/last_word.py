"""A program beside each process of a job, which says in one line that the process has ended where the process itself cannot.

The process is its parent. From the parent's standard error (file descriptor 2, what C++ writes) it passes on all but the pages that jax's
coordination service prints when another process of the job is gone: the line stands for them. Only the standard library is imported, so
that it starts at once.

Arguments: the pipe with the parent's standard error; the line for a parent that the coordination service ended; the line for one that
ended in another way without a word. Standard input: what the parent says before it ends in order, which is printed in their place.
"""

import os
import re
import selectors
import sys

QUIET = "-"  # said by a parent that ends in order and has nothing to print
_RECORD = re.compile(rb"[IWEF]\d{4} \d\d:\d\d:\d\d\.\d+ ")
_SERVICE = re.compile(rb"coordination_service|preemption_sync_manager|Terminating process because the JAX distributed service")


class Filter:
    """Passes on whole lines, but not the records of the coordination service; ended: whether one of them ended the process."""

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
        if _RECORD.match(line) and not self.ended:  # lines without its head belong to the record before
            self._passing = not _SERVICE.search(line)
            self.ended = not self._passing and line.startswith(b"F")
        if self._passing:
            self._write(line)


def main(pipe: int, gone: str, died: str) -> None:
    said = b""
    errors = Filter(lambda line: os.write(2, line))
    with selectors.DefaultSelector() as selector:
        selector.register(0, selectors.EVENT_READ)
        selector.register(pipe, selectors.EVENT_READ)
        running = True
        # After the parent's end, what it wrote is read without waiting: a child of it may hold the pipe open.
        while events := selector.select(None if running else 0):
            for key, _ in events:
                data = os.read(key.fd, 65536)
                if key.fd == pipe:
                    errors.feed(data)
                else:
                    said += data
                if not data:
                    selector.unregister(key.fd)
                    running = running and key.fd != 0
            if not selector.get_map():
                break
    errors.close()
    line = said.decode() or (gone if errors.ended else died)
    if line != QUIET:
        os.write(2, line.encode() + b"\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
