"""What runs in the process of one peer; the parent submits `prepare`, then `timed`.

Each peer has its own, since the threads of PyTorch and of JAX disturb each other.
"""

import importlib
import os
import sys
import time
from typing import Any

from tests.peers.work import Peer

_here: dict[str, Any] = {}  # the peer's module, its products and the work of the row being timed


def begin(peer: Peer, folder: str) -> None:
    """Imports the peer, with as many threads as this process has cores."""
    cores = str(len(os.sched_getaffinity(0)))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = cores
    os.environ["JAX_PLATFORMS"] = "cpu"
    if peer.url:
        sys.path.insert(0, str(peer.path(folder)))
    module = importlib.import_module(peer.module)
    _here.update(module=module, products=module.products())


def prepare(method: str, *arguments) -> dict | None:
    """Builds the work of a row and does it twice: its FLOPs, error, note and seconds.

    None if the peer has no such work.
    """
    _here.pop("work", None)  # frees the memory of the row before
    work = getattr(_here["module"], method)(*arguments)
    if work is None:
        return None
    _here["work"] = work
    error = work.error() if work.error else None
    work.once()
    return {"flops": work.flops, "note": work.note, "error": error, "seconds": timed(1)[0]}


def timed(count: int) -> tuple[float, float]:
    """(seconds of each of `count` calls, FLOP/s of large products right before and after)."""
    before, start = _here["products"](), time.perf_counter()
    for _ in range(count):
        _here["work"].once()
    seconds = (time.perf_counter() - start) / count
    return seconds, max(before, _here["products"]())
