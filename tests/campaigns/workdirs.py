"""Damages a run's folder and reads it: every bit of config.json, and any file in any way.

    python -m tests.campaigns.workdirs 1000 0   # every bit of config.json, and 1,000 damages
"""

import random
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np

import ntm_jax
from ntm_jax.runtime import config_file
from tests.campaigns import damage
from tests.common import setup, tiny_config, write_run

SETTINGS = tiny_config()


def flip_config(workdir: Path, every: int, tally: damage.Tally) -> None:
    """Flips every `every`-th bit of config.json and loads it."""
    path = workdir / "config.json"
    content, expected = path.read_bytes(), config_file.load(str(workdir))
    for place in range(0, 8 * len(content), every):
        changed = bytearray(content)
        changed[place // 8] ^= 1 << place % 8
        path.write_bytes(changed)
        found, said = damage.outcome(lambda: config_file.load(str(workdir)),
                                     lambda loaded: loaded == expected)
        tally.add("config.json, one bit", found, f"bit {place % 8} of byte {place // 8}: {said}")
    path.write_bytes(content)


def damage_folder(workdir: Path, trials: int, seed: int, tally: damage.Tally) -> None:
    """Damages the folder in one place, `trials` times, and compares two images' likelihood."""
    source, _, _ = setup(SETTINGS)
    images, labels = (np.stack([source.records[i][name] for i in range(2)])
                      for name in ("image", "label"))

    def read(step=None):
        run = ntm_jax.load(str(workdir), step)
        return run.step, run.log_prob(images, labels, trajectories=1).tobytes()

    draw, expected = random.Random(seed), {step: read(step) for step in (2, 4)}
    assert expected[2][1] != expected[4][1]
    for trial in range(trials):
        kind, step = damage.KINDS[trial % len(damage.KINDS)], (None, 2, 4)[trial % 3]
        with damage.damaged(workdir, draw, kind) as what:
            # A checkpoint without its mark counts as not committed: then the one before is the
            # latest, and the run names its step.
            allowed = list(expected.values()) if step is None else [expected[step]]
            found, said = damage.outcome(lambda step=step: read(step),
                                         lambda found, allowed=allowed: found in allowed)
        tally.add(kind, found, f"{what}: {said}".replace(str(workdir), "WORKDIR"))


def run(trials: int, seed: int, every: int) -> damage.Tally:
    """Damages an untrained run's folder `trials` times, and its config.json.

    Every `every`-th bit of config.json is flipped.
    """
    tally = damage.Tally()
    with tempfile.TemporaryDirectory() as folder:
        workdir = write_run(Path(folder) / "run", SETTINGS)
        flip_config(workdir, every, tally)
        damage_folder(workdir, trials, seed, tally)
    return tally


if __name__ == "__main__":
    jax.config.update("jax_disable_most_optimizations", True)
    result = run(int(sys.argv[1]), int(sys.argv[2]), 1)
    print(result)
    sys.exit(bool(result.wrong()))
