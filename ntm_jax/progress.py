"""Progress of long work: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
LINE_SECONDS = 20.0  # between lines where there is no terminal


def track(items: Iterable[Item], title: str, unit: str, total: int | None = None,
          show: bool = True) -> Iterator[Item]:
    """Yields the items, and shows on stderr how many are done, of `total` or len(items).

    show: False shows nothing.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    if not show:
        yield from items
        return
    if sys.stderr.isatty():
        yield from tqdm(items, title, total, unit=unit, leave=False)
        return
    begin = last = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - last >= LINE_SECONDS:
            last = now
            left = f", {(now - begin) / done * (total - done):.0f} s left" if total else ""
            number = f"{done}/{total}" if total else str(done)
            print(f"{title}: {number} {unit}{left}", file=sys.stderr, flush=True)
        yield item
