"""Damages files of a run's folder, one place at a time, and reads the run again.

It must be the undamaged run or one line of an error, never another result or a traceback.

    python -m tests.campaigns.workdirs 1000 0   # 1,000 damages, drawn from seed 0
"""

import collections
import random
import shutil
import sys
import tempfile
from pathlib import Path

import jax

import ntm_jax
from ntm_jax.errors import UserError
from tests.common import bits, tiny_config, write_run


def damage(folder: Path, draw: random.Random) -> str:
    """Flips a bit of a file, cuts it, removes it or exchanges it with another; what was done."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    # There are many small files, and most of what counts is in a few large ones.
    sizes = [path.stat().st_size for path in files] if draw.random() < 0.5 else None
    [path], other = draw.choices(files, sizes), draw.choice(files)
    content = bytearray(path.read_bytes())
    kind, place = draw.choice(("flip", "cut", "remove", "exchange")), draw.randrange(len(content))
    if kind == "flip":
        content[place] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
    elif kind == "cut":
        path.write_bytes(content[:place])
    elif kind == "remove":
        path.unlink()
    else:
        path.write_bytes(other.read_bytes())
        other.write_bytes(content)
    return f"{kind} {path.relative_to(folder)}, byte {place}, {other.relative_to(folder)}"


def read(workdir: Path):
    run = ntm_jax.load(str(workdir))
    return run.config, run.spec, bits(run.params)


def main(trials: int, seed: int) -> bool:
    """Prints the outcomes; returns whether any was wrong."""
    draw, counts = random.Random(seed), collections.Counter()
    with tempfile.TemporaryDirectory() as root:
        whole, copy = write_run(Path(root) / "run", tiny_config()), Path(root) / "copy"
        expected = [read(whole), read(whole / "checkpoints/2")]  # the first may lose its mark
        for _ in range(trials):
            shutil.copytree(whole, copy)
            done = damage(copy, draw)
            try:
                outcome, said = ("undamaged" if read(copy) in expected else "SILENT"), ""
            except UserError as error:
                outcome, said = ("TWO LINES" if "\n" in str(error) else "refused"), str(error)
            except Exception as error:
                outcome, said = "TRACEBACK", repr(error)
            counts[outcome] += 1
            if outcome.isupper():
                print(f"{outcome}: {done}: {said}")
            shutil.rmtree(copy)
    print(dict(counts))
    return any(outcome.isupper() for outcome in counts)


if __name__ == "__main__":
    jax.config.update("jax_disable_most_optimizations", True)
    sys.exit(main(*map(int, sys.argv[1:])))
