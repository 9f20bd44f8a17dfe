"""Pools of worker processes, which data preparation and post-training use."""

import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing import connection, resource_tracker

STOPS = signal.SIGINT, signal.SIGHUP, signal.SIGTERM  # the parent decides when work ends


@contextlib.contextmanager
def out_of_reach() -> Iterator[None]:
    """Signals that stop this process do not reach processes that are started in the block."""
    resource_tracker.ensure_running()  # its start would unblock them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # which they inherit
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start(workers: int, begin: Callable | None = None, *arguments
          ) -> concurrent.futures.ProcessPoolExecutor:
    """A pool of processes that ignore signals that stop this process, and end with this process.

    begin: called with the arguments in each process, before its first work.
    """
    return concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _begin, (begin, arguments))


def _begin(begin: Callable | None, arguments: tuple) -> None:
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a worker

    def watch():
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    if begin:
        begin(*arguments)
