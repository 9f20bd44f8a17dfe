"""Scores samples on the host: their rewards, and how much samples of one condition differ.

Symbols: P records of a batch, p of them this process's share; G samples of each; N tokens, D token
channels; H, W, C image height, width, channels. Of an array, samples are rows of D columns.
"""

import itertools
from collections.abc import Sequence

import cloudpickle
import jax
import numpy as np

from ntm_jax.data.sources import Source
from ntm_jax.projects.reward import rewards
from ntm_jax.projects.reward.rewards import Scores
from ntm_jax.runtime import sharding
from ntm_jax.runtime.run import Run
from ntm_jax.workers import start as start_workers

NAME_BYTES = 48  # of a group's name, by which processes exchange it

_reward = None  # of a worker process


def _open(pickled: bytes) -> None:
    global _reward
    jax.config.update("jax_platforms", "cpu")  # accelerators belong to the program
    _reward = cloudpickle.loads(pickled)  # made by this program, as grain's workers get a source


def _in_worker(name: str, images: np.ndarray, given: list) -> Scores:
    assert _reward
    return rewards.scored(name, _reward, images, given)


class Scorer:
    """Scores samples of a run by its reward, in a number of worker processes or in this one.

    source: what the samples' conditions are of, such as the held-out split. Raises UserError where
    the reward does not go with the training data.
    """

    def __init__(self, run: Run, source: Source, workers: int = 0):
        self._run, self._source, self._workers = run, source, workers
        self._reward = rewards.of_run(run.config)
        self._name = run.config.reward.name
        self._pool = None
        if workers:
            self._pool = start_workers(workers, _open, cloudpickle.dumps(self._reward))

    def close(self) -> None:
        """Ends the worker processes."""
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def __call__(self, parts: Sequence, batch: dict, detailed: bool = True) -> dict:
        """The scores of clean tokens [P, g, N, D], part by part, on every process.

        rewards [P, G], and traits [P, G, K] where the reward has them; if detailed also distance
        [P, G], see mean_distances, and groups [P, G], names, where the reward has them. Every
        process scores its share of the records. Raises UserError where the reward gives other
        scores than one for each image.
        """
        spec, given = self._run.spec, self._conditions(batch)
        images, pending = [], []
        for tokens in parts:  # waits for the devices
            images.append(spec.from_tokens(sharding.to_local(tokens)))
            pending.append(self._submit(images[-1], given))
        scored = [wait() for wait in pending]

        def together(arrays: list) -> np.ndarray:
            """The arrays of the parts, [n, ...], as [p, G, ...]."""
            return np.concatenate([a.reshape(*part.shape[:2], *a.shape[1:])
                                   for a, part in zip(arrays, images, strict=True)], 1)

        local = {"rewards": together([one.rewards for one in scored])}
        traits = [one.traits for one in scored if one.traits is not None]
        if traits:
            local["traits"] = together(traits)
        if detailed:
            unit = np.asarray(spec.std) if spec.columns else 1  # all columns count alike
            local["distance"] = mean_distances(
                np.concatenate(images, 1) / unit, spec.pixel_levels)
            if len(scored[0].groups):
                local["groups"] = together([_as_bytes(one.groups) for one in scored])
        found = sharding.to_host(sharding.to_global(local, self._run.mesh))
        if "groups" in found:
            names = np.ascontiguousarray(found["groups"]).view(f"S{NAME_BYTES}")[..., 0]
            found["groups"] = np.char.decode(names)
        return found

    def score(self, images: np.ndarray, given: list) -> Scores:
        """The scores of images [n, H, W, C] of n conditions. Raises as __call__."""
        return self._submit(images[:, None], given)()

    def _conditions(self, batch: dict) -> list:
        """The captions, vectors [E] or labels of this process's share of a batch, [p].

        Vectors are in their own units.
        """
        names = "label", "condition", "index"
        local = {name: sharding.to_local(batch[name]) for name in names if name in batch}
        return self._run.condition.given(local, self._source.captions)

    def _submit(self, images: np.ndarray, given: list):
        """A function that waits for the scores of images [p, g, H, W, C] or rows [p, g, D]."""
        flat = images.reshape(-1, *images.shape[2:])
        repeated = [one for one in given for _ in range(images.shape[1])]
        if not self._pool:
            # a reward may change its images
            found = rewards.scored(self._name, self._reward, flat.copy(), repeated)
            return lambda: found
        bounds = np.linspace(0, len(flat), self._workers + 1).astype(int)
        futures = [self._pool.submit(_in_worker, self._name, flat[a:b], repeated[a:b])
                   for a, b in itertools.pairwise(bounds) if a < b]

        def wait() -> Scores:
            found = [future.result() for future in futures]
            traits = [one.traits for one in found if one.traits is not None]
            return Scores(np.concatenate([one.rewards for one in found]),
                          [name for one in found for name in one.groups],
                          np.concatenate(traits) if traits else None)

        return wait


def _as_bytes(names: Sequence[str]) -> np.ndarray:
    """Names as bytes, [n, NAME_BYTES] uint8; longer ones are cut after a character."""
    encoded = [str(name).encode()[:NAME_BYTES].decode(errors="ignore").encode() for name in names]
    return np.array(encoded, f"S{NAME_BYTES}").reshape(-1, 1).view(np.uint8)


def mean_distances(images: np.ndarray, pixel_levels: int) -> np.ndarray:
    """The mean distance of each sample to its record's others, [p, G], of images [p, G, ...].

    A distance is the root of the mean squared difference of pixels in [0, 1], or of numbers. It
    falls where a reward makes all samples of a caption alike.
    """
    values = images.reshape(*images.shape[:2], -1).astype(np.float64)
    values /= max(pixel_levels - 1, 1)
    squares = np.square(values).sum(-1)
    products = values @ values.transpose(0, 2, 1)
    squared = squares[:, :, None] + squares[:, None, :] - 2 * products
    distances = np.sqrt(np.maximum(squared, 0) / values.shape[-1])
    count = images.shape[1]
    return (distances.sum(2) / (count - 1)).astype(np.float32)
