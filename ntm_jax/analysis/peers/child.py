"""The process of one peer, which answers the parent's questions over a pipe.

Each peer has its own, since the threads of PyTorch and of JAX disturb each other.
"""

import importlib
import os
import sys
import time
import traceback
from multiprocessing.connection import Connection

from ntm_jax.analysis.peers.work import Peer, Work


def serve(connection: Connection, peer: Peer, folder: str) -> None:
    """Answers (name of a method of Answers, arguments) with (its result, None) or (None, error).

    Ends with the parent.
    """
    _only_these_cores()
    if peer.url:
        sys.path.insert(0, str(peer.path(folder)))
    answers = Answers(peer)
    try:
        while True:
            method, *arguments = connection.recv()
            try:
                connection.send((getattr(answers, method)(*arguments), None))
            except Exception as error:
                traceback.print_exc()
                connection.send((None, f"{type(error).__name__}: {error}"))
    except (EOFError, KeyboardInterrupt):
        pass


def _only_these_cores() -> None:
    """As many threads as this process has cores, before any framework starts its own."""
    cores = str(len(os.sched_getaffinity(0)))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = cores
    os.environ["JAX_PLATFORMS"] = "cpu"


class Answers:
    """One peer's answers; it holds the work of one row at a time."""

    def __init__(self, peer: Peer):
        self.module = importlib.import_module(peer.module)
        self.work: Work | None = None
        self.products = self.module.products()

    def prepare(self, method: str, *arguments) -> dict | None:
        """Builds the work of a row and does it twice: its FLOPs, error, note and seconds.

        None if the peer has no such work.
        """
        self.work = None  # frees the memory of the row before
        self.work = work = getattr(self.module, method)(*arguments)
        if work is None:
            return None
        error = work.error() if work.error else None
        work.once()
        return {"flops": work.flops, "note": work.note, "error": error, "seconds": self.time(1)[0]}

    def time(self, count: int) -> tuple[float, float]:
        """(seconds of each of `count` calls, FLOP/s of large products right before and after)."""
        assert self.work is not None  # prepared
        before, start = self.products(), time.perf_counter()
        for _ in range(count):
            self.work.once()
        seconds = (time.perf_counter() - start) / count
        return seconds, max(before, self.products())
