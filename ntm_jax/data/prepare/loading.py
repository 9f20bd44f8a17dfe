"""Worker processes that load images: decode them, crop and resize them."""

import collections
import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection

from ntm_jax.data.prepare.captioned import Item, Loaded
from ntm_jax.errors import UserError

_CHUNK = 16  # images that a worker takes at a time


@contextlib.contextmanager
def make_pool(workers: int) -> Iterator[concurrent.futures.Executor | None]:
    """A pool of worker processes, which end with this one however it ends; None for 0 workers."""
    if not workers:
        yield None
        return
    spawn = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(workers, spawn, _follow_parent)
    try:
        yield pool
    except concurrent.futures.BrokenExecutor:
        raise UserError(
            f"one of the {workers} worker processes was killed, perhaps for memory: start again "
            "with the same command, or with fewer --workers; complete shards stay"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _follow_parent() -> None:
    """Makes a worker ignore Ctrl-C, which is for the parent, and end when the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a worker

    def watch():
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def load_items(
    pool: concurrent.futures.Executor | None,
    workers: int,
    load: Callable[[Item], Loaded],
    items: Sequence[Item],
) -> Iterator[Loaded]:
    """The items in order, loaded a few chunks ahead by the pool, or here if there is none."""
    if pool is None:
        yield from map(load, items)
        return
    ahead = collections.deque()
    for start in range(0, len(items), _CHUNK):
        ahead.append(pool.submit(_load_all, load, items[start : start + _CHUNK]))
        if len(ahead) > 2 * workers:
            yield from ahead.popleft().result()
    while ahead:
        yield from ahead.popleft().result()


def _load_all(load: Callable[[Item], Loaded], items: Sequence[Item]) -> list[Loaded]:
    return [load(item) for item in items]
