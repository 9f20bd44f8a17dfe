"""Progress of long work: a bar on a terminal, a line now and then elsewhere."""

import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
LINE = "{desc}: {n_fmt}/{total_fmt} {unit}, {remaining} left\n"
LINE_SECONDS = 20.0  # between lines where there is no terminal


def track(items: Iterable[Item], title: str, unit: str, total: int | None = None,
          show: bool = True) -> Iterable[Item]:
    """Yields the items, and shows on stderr how many are done, of `total` or len(items).

    show: False shows nothing.
    """
    if not show or sys.stderr.isatty():
        return tqdm(items, title, total, unit=unit, leave=False, disable=not show)
    return tqdm(items, title, total, unit=unit, bar_format=LINE, delay=LINE_SECONDS,
                mininterval=LINE_SECONDS, maxinterval=LINE_SECONDS)
