"""Ways to damage a folder, drawn from a seed: a bit flipped, a file truncated, swapped or removed.

The campaigns of this folder damage files that the project wrote, one place at a time, and read them
again. The result must be the undamaged one or one line of an error, never another result or a
traceback. The tests run each campaign with few trials; from the command line it takes the number of
trials and a seed: python -m tests.campaigns.NAME 1000 0.
"""

import collections
import contextlib
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from ntm_jax.errors import UserError

KINDS = ("flip", "truncate", "swap", "delete")


def files(folder: Path, skip=()) -> list[Path]:
    """The files below a folder that are not empty, in order.

    skip: beginnings of the names of files that are left out.
    """
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    return [path for path in found if not path.name.startswith(tuple(skip))]


@contextlib.contextmanager
def damaged(folder: Path, draw: random.Random, kind: str, skip=()) -> Iterator[str]:
    """Damages one file of a folder, or exchanges two, until the block ends.

    Yields what was done, in words.
    """
    every = files(folder, skip)
    # there are many small files, and most of what counts is in a few large ones
    by_size = draw.random() < 0.5
    chosen = draw.choices(every, [path.stat().st_size for path in every] if by_size else None)[0]
    content = chosen.read_bytes()
    other = None
    if kind == "flip":
        place, bit = draw.randrange(len(content)), draw.randrange(8)
        changed = bytearray(content)
        changed[place] ^= 1 << bit
        what = f"bit {bit} of byte {place} of {chosen.relative_to(folder)}"
    elif kind == "truncate":
        changed = content[: draw.randrange(len(content))]
        what = f"{chosen.relative_to(folder)} cut to {len(changed)} of {len(content)} bytes"
    elif kind == "swap":
        # Mostly files of one name, which fit each other's place.
        alike = [path for path in every if path.name == chosen.name and path != chosen]
        other = draw.choice(
            alike if alike and draw.random() < 0.7 else [path for path in every if path != chosen])
        changed, replaced = other.read_bytes(), other.read_bytes()
        what = f"{chosen.relative_to(folder)} exchanged with {other.relative_to(folder)}"
    else:
        changed, what = None, f"{chosen.relative_to(folder)} removed"
    times = {path: path.stat() for path in (chosen, other) if path}
    try:
        if changed is None:
            chosen.unlink()
        else:
            chosen.write_bytes(changed)
        if other:
            other.write_bytes(content)
        yield what
    finally:
        chosen.write_bytes(content)
        if other:
            other.write_bytes(replaced)
        for path, stat in times.items():
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


OUTCOMES = ("ok", "refused", "silent", "traceback")


def outcome(read: Callable, same: Callable) -> tuple[str, str]:
    """(one of OUTCOMES, the message) of reading a damaged folder.

    same(result): whether the result of read() is the undamaged one.
    """
    try:
        found = read()
    except UserError as error:
        return ("refused" if str(error) and "\n" not in str(error) else "traceback"), str(error)
    except Exception as error:
        return "traceback", f"{type(error).__name__}: {error}"
    return ("ok", "") if same(found) else ("silent", "another result")


class Tally:
    """Counts of outcomes by rows, such as kinds of damage, with the first example of each."""

    def __init__(self):
        self.counts, self.examples, self._wrong = collections.Counter(), {}, []

    def add(self, row: str, outcome: str, example: str) -> None:
        self.counts[row, outcome] += 1
        self.examples.setdefault((row, outcome), example)
        if outcome in ("silent", "traceback"):
            self._wrong.append(f"{row}, {outcome}: {example}")

    def wrong(self) -> list[str]:
        """All silent outcomes and tracebacks; a campaign has succeeded if there are none."""
        return self._wrong

    def __str__(self) -> str:
        rows = list(dict.fromkeys(row for row, _ in self.counts))
        width = max(map(len, rows), default=0)
        lines = [f"{'':{width}}" + "".join(f"{name:>11}" for name in OUTCOMES)]
        lines += [f"{row:{width}}" + "".join(f"{self.counts[row, name]:11}" for name in OUTCOMES)
                  for row in rows]
        return "\n".join([*lines, *(f"{row}, {name}: {text}"
                                    for (row, name), text in sorted(self.examples.items()))])
