"""Worker processes that load images: decode them, crop and resize them."""

import collections
import concurrent.futures
import contextlib
from collections.abc import Callable, Iterator, Sequence

from ntm_jax.data.prepare.captioned import Item, Loaded
from ntm_jax.errors import UserError
from ntm_jax.workers import start as start_workers

_CHUNK = 16  # images that a worker takes at a time


@contextlib.contextmanager
def make_pool(workers: int) -> Iterator[concurrent.futures.Executor | None]:
    """A pool of worker processes, which end with this one however it ends; None for 0 workers."""
    if not workers:
        yield None
        return
    pool = start_workers(workers)
    try:
        yield pool
    except concurrent.futures.BrokenExecutor:
        raise UserError(
            f"one of the {workers} worker processes was killed, perhaps for memory: start again "
            "with the same command, or with fewer --workers; complete shards stay"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


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
