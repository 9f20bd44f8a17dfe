"""Damages prepared records, one place at a time, and reads them all.

They must be identical, or refused in one line of a UserError.

    python -m tests.campaigns.records 1000 0
"""

import contextlib
import hashlib
import io
import json
import random
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from ntm_jax.data.prepare import Choices, prepare
from ntm_jax.data.sources import open_source
from tests.campaigns import damage

FOLDERS = ("first", "second")  # of records, whose shards fit each other's place


def write(root: Path) -> None:
    """Prepares two folders of records from different images of the same names.

    Each has captions, labels, three training shards and one of the test split.
    """
    for seed, name in enumerate(FOLDERS):
        photos = root / "photos"
        photos.mkdir(exist_ok=True)
        draw = np.random.default_rng(seed)
        for i in range(16):
            Image.fromarray(draw.integers(256, size=(4, 4, 3), dtype=np.uint8)).save(
                photos / f"{i}.png")
        rows = [{"file_name": f"{i}.png", "caption": f"picture {i}", "label": i % 3}
                for i in range(16)]
        (photos / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        with contextlib.redirect_stdout(io.StringIO()):
            prepare(Choices(f"folder:{photos}", image_size=4, test=4, shard_size=4),
                    str(root / "records" / name))


def content(root: Path) -> str:
    """A digest of all records of both folders, as a source reads them."""
    digest = hashlib.sha256()
    for name in FOLDERS:
        records = open_source(f"records:{root / name}", "all").records
        for i in range(len(records)):
            record = records[i]
            digest.update(
                record["image"].tobytes() + f" {record['label']} {record['caption']} ".encode())
    return digest.hexdigest()


def run(trials: int, seed: int) -> damage.Tally:
    """Damages the records `trials` times, by each kind in turn, and reads them each time."""
    draw, tally = random.Random(seed), damage.Tally()
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        root = Path(folder) / "records"
        expected = content(root)
        for trial in range(trials):
            kind = damage.KINDS[trial % len(damage.KINDS)]
            with damage.damaged(root, draw, kind) as what:
                found, said = damage.outcome(lambda: content(root), lambda found: found == expected)
            tally.add(kind, found, f"{what}: {said}".replace(str(root), ""))
    return tally


if __name__ == "__main__":
    result = run(*map(int, sys.argv[1:]))
    print(result)
    sys.exit(bool(result.wrong()))
