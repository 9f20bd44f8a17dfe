"""Damages prepared records, one place at a time, and reads them all: they must come out identical, or as one line of a UserError.

    python -m tests.campaigns.records 1000 0
"""

import collections
import contextlib
import hashlib
import io
import json
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ntm_jax.data.prepare import Choices, prepare
from ntm_jax.data.sources import open_source
from ntm_jax.errors import UserError
from tests.campaigns import damage

OUTCOMES = ("ok", "refused", "silent", "traceback")
FOLDERS = ("first", "second")  # of records, whose shards fit each other's place


class Trial(NamedTuple):
    """kind: of damage. what: was damaged. outcome: one of OUTCOMES. answer: what reading said."""

    kind: str
    what: str
    outcome: str
    answer: str


def write(root: Path) -> None:
    """Prepares two folders of records from other images of the same names: 3 shards to train on and 1 to test, captions and labels."""
    for seed, name in enumerate(FOLDERS):
        photos = root / "photos"
        photos.mkdir(exist_ok=True)
        draw = np.random.default_rng(seed)
        for i in range(16):
            Image.fromarray(draw.integers(256, size=(4, 4, 3), dtype=np.uint8)).save(photos / f"{i}.png")
        rows = [{"file_name": f"{i}.png", "caption": f"picture {i}", "label": i % 3} for i in range(16)]
        (photos / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        with contextlib.redirect_stdout(io.StringIO()):
            prepare(Choices(f"folder:{photos}", image_size=4, test=4, shard_size=4), str(root / "records" / name))


def content(root: Path) -> str:
    """A digest of all records of both folders, as a source reads them."""
    digest = hashlib.sha256()
    for name in FOLDERS:
        records = open_source(f"records:{root / name}", "all").records
        for i in range(len(records)):
            record = records[i]
            digest.update(record["image"].tobytes() + f" {record['label']} {record['caption']} ".encode())
    return digest.hexdigest()


def read(root: Path, expected: str) -> tuple[str, str]:
    """(outcome, answer) of reading folders whose records should have the digest `expected`."""
    try:
        same = content(root) == expected
    except UserError as error:
        return "traceback" if "\n" in str(error) else "refused", str(error).replace(str(root), "")
    except Exception as error:
        return "traceback", f"{type(error).__name__}: {error}"
    return ("ok", "the same records") if same else ("silent", "other records")


def trials(count: int, seed: int) -> Iterator[Trial]:
    """Damages the records `count` times, by all kinds of damage in turn, and reads them each time."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        root = Path(folder) / "records"
        expected = content(root)
        for i in range(count):
            kind = damage.KINDS[i % len(damage.KINDS)]
            with damage.damaged(root, draw, kind) as what:
                yield Trial(kind, what, *read(root, expected))


def run(count: int, seed: int) -> dict[str, int]:
    """How many of `count` trials had each outcome."""
    found = collections.Counter(trial.outcome for trial in trials(count, seed))
    return {outcome: found[outcome] for outcome in OUTCOMES}


def main(count: int, seed: int) -> int:
    """Prints how often each kind of damage had each outcome, with an example -> the number of wrong records and of tracebacks."""
    counts, examples = collections.Counter(), {}
    for trial in trials(count, seed):
        counts[trial.kind, trial.outcome] += 1
        examples.setdefault((trial.kind, trial.outcome), f"{trial.what} -> {trial.answer}")
    print(f"{'damage':10}" + "".join(f"{outcome:>11}" for outcome in OUTCOMES))
    for kind in damage.KINDS:
        print(f"{kind:10}" + "".join(f"{counts[kind, outcome]:11}" for outcome in OUTCOMES))
    for (kind, outcome), example in sorted(examples.items()):
        print(f"{kind}, {outcome}: {example}")
    return sum(counts[kind, outcome] for kind in damage.KINDS for outcome in ("silent", "traceback"))


if __name__ == "__main__":
    sys.exit(1 if main(*map(int, sys.argv[1:])) else 0)
