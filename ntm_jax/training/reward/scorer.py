"""Scores samples on the host: their rewards, and how much samples of one condition differ.

Symbols: P records of a batch, p of them this process's share; G samples of each; N tokens, D token
channels; H, W, C image height, width, channels. Of an array, samples are rows of D columns.
"""

import concurrent.futures
import contextlib
import itertools
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor

import cloudpickle
import jax
import numpy as np

from ntm_jax.data.sources import Source
from ntm_jax.data.transforms import unstandardise
from ntm_jax.errors import UserError
from ntm_jax.runtime import sharding
from ntm_jax.runtime.run import Run
from ntm_jax.training.reward import rewards
from ntm_jax.training.reward.rewards import Scores
from ntm_jax.workers import start as start_workers

NAME_BYTES = 48  # of a group's name, by which processes exchange it

_reward = None  # of a worker process


def _open(pickled: bytes) -> None:
    global _reward
    jax.config.update("jax_platforms", "cpu")  # accelerators belong to the program
    _reward = cloudpickle.loads(pickled)  # made by this program, as grain's workers get a source


def _in_worker(name: str, images: np.ndarray, given: list):
    return _call(name, _reward, images, given)


def _call(name: str, reward, images: np.ndarray, given: list):
    return rewards.call(name, "a function of (images, conditions)", reward, images, given)


class Scorer:
    """Scores samples of a run by its reward, in a number of worker processes or in this one.

    source: what the samples' conditions are of, such as the held-out split. Raises UserError where
    the reward does not go with the training data.
    """

    def __init__(self, run: Run, source: Source, workers: int = 0):
        self._run, self._source, self._workers = run, source, workers
        self._reward = rewards.of_run(run.config)
        self._name = run.config.reward.name
        self._pool = self._start() if workers else None

    def _start(self) -> concurrent.futures.Executor:
        return start_workers(self._workers, _open, cloudpickle.dumps(self._reward))

    def close(self) -> None:
        """Ends the worker processes."""
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def __call__(self, parts: Sequence, batch: dict, detailed: bool = True) -> dict:
        """The scores of clean tokens [P, g, N, D], part by part, on every process.

        rewards [P, G], and traits [P, G, K] where the reward has them; if detailed also distance
        [P, G], see mean_distances, and groups [P, G], names, where the reward has them. Every
        process scores its share of the records. Raises UserError where the reward fails, or gives
        other scores than `Scores` says.
        """
        mesh, given = self._run.mesh, self.conditions(batch)
        images, pending = [], []
        for tokens in parts:  # waits for the devices
            images.append(self._run.spec.from_tokens(sharding.to_local(tokens)))
            pending.append(self._submit(images[-1], given))
        scored = [self._checked(wait(), part.shape[:2])
                  for wait, part in zip(pending, images, strict=True)]
        local = {"rewards": np.concatenate([one.rewards for one in scored], 1)}
        _check_alike(f"config.reward.name={self._name}", scored)
        traits = [one.traits for one in scored if one.traits is not None]
        if traits:
            local["traits"] = np.concatenate(traits, 1)
        if detailed:
            spec = self._run.spec
            unit = np.asarray(spec.std) if spec.columns else 1  # all columns count alike
            local["distance"] = mean_distances(
                np.concatenate(images, 1) / unit, spec.pixel_levels)
            if len(scored[0].groups):
                local["groups"] = np.concatenate(
                    [_bytes(one.groups, part.shape[:2])
                     for one, part in zip(scored, images, strict=True)], 1)
        found = sharding.to_host(sharding.to_global(local, mesh))
        if "groups" in found:
            names = np.ascontiguousarray(found["groups"]).view(f"S{NAME_BYTES}")[..., 0]
            found["groups"] = np.char.decode(names)
        return found

    def score(self, images: np.ndarray, given: list) -> Scores:
        """The scores of images [n, H, W, C] of n conditions. Raises as __call__."""
        found = self._submit(images[:, None], given)()
        scored = self._checked(found, (len(images), 1))
        traits = None if scored.traits is None else scored.traits[:, 0]
        return Scores(scored.rewards[:, 0], scored.groups, traits)

    def conditions(self, batch: dict) -> list:
        """The captions, vectors [E] or labels of this process's share of a batch, [p].

        Vectors are in their own units.
        """
        spec, model = self._run.spec, self._run.model.config
        if model.condition_width:
            vectors = sharding.to_local(batch["condition"])
            return list(unstandardise(vectors, spec.condition_mean, spec.condition_std))
        if self._source.captions is not None and model.text_width:
            return [self._source.captions[int(i)] for i in sharding.to_local(batch["index"])]
        return sharding.to_local(batch["label"]).tolist()

    def _submit(self, images: np.ndarray, given: list):
        """A function that waits for the scores of images [p, g, H, W, C] or rows [p, g, D]."""
        flat = images.reshape(-1, *images.shape[2:])
        repeated = [one for one in given for _ in range(images.shape[1])]
        if not self._pool:
            found = _call(self._name, self._reward, flat.copy(), repeated)  # it may change them
            return lambda: [found]
        bounds = np.linspace(0, len(flat), self._workers + 1).astype(int)
        jobs = [(flat[a:b], repeated[a:b]) for a, b in itertools.pairwise(bounds) if a < b]
        futures = self._send(jobs)

        def wait() -> list:
            try:
                return [future.result() for future in futures]
            except BrokenExecutor:  # such as by a scheduler's signal, which ends all processes
                return self._again(jobs)

        return wait

    def _send(self, jobs: list) -> list[concurrent.futures.Future]:
        """Gives jobs to the worker processes, which are started again where they have ended."""
        assert self._pool
        try:
            return [self._pool.submit(_in_worker, self._name, *job) for job in jobs]
        except BrokenExecutor:
            self._pool = self._start()
            return [self._pool.submit(_in_worker, self._name, *job) for job in jobs]

    def _again(self, jobs: list) -> list:
        """The scores of jobs whose worker processes have ended."""
        try:
            return [future.result() for future in self._send(jobs)]
        except BrokenExecutor:
            raise UserError(
                f"config.reward.name={self._name}: the processes that score have ended twice, "
                "perhaps for lack of memory: lower config.reward.workers, or set it to 0 to see "
                "the error") from None

    def _checked(self, found: list, shape: tuple[int, ...]) -> Scores:
        """The scores of a part of this shape [p, g], rewards in that shape."""
        name, count = f"config.reward.name={self._name}", int(np.prod(shape))
        found = [one if isinstance(one, Scores) else Scores(one) for one in found]
        numbers = [_numbers(name, one.rewards, count) for one in found]
        values = np.concatenate(numbers)
        if values.shape != (count,):
            raise UserError(f"{name} gave an array of shape {values.shape}: expected {count} "
                            "numbers, one for each image")
        if not np.isfinite(values).all():
            wrong = values[~np.isfinite(values)][0]
            raise UserError(f"{name} gave {wrong} for an image: expected finite numbers")
        for one, own in zip(found, numbers, strict=True):
            _check_details(name, one, len(own))
        _check_alike(name, found)
        traits = [one.traits for one in found if one.traits is not None]
        return Scores(values.reshape(shape), [name for one in found for name in one.groups],
                      np.concatenate(traits).reshape(*shape, -1) if traits else None)


def _numbers(name: str, values, count: int) -> np.ndarray:
    """Values as a float32 array, at least [1]. UserError if they are not numbers."""
    with contextlib.suppress(Exception):  # such as ValueError of (numbers, names); torch has others
        array = np.atleast_1d(np.asarray(values))
        if array.dtype.kind in "biufV":  # V: bfloat16
            return array.astype(np.float32)
    raise UserError(f"{name} gave a {type(values).__name__}, not numbers: expected {count} "
                    "numbers, one for each image, or rewards.Scores(numbers, groups)")


def _check_details(name: str, scores: Scores, count: int) -> None:
    """Raises UserError unless groups and traits, where given, are those of `count` samples."""
    groups = np.asarray(scores.groups, object).shape
    if groups not in ((0,), (count,)):
        raise UserError(f"{name} gave Scores.groups of shape {groups}: expected {count} names, one "
                        "for each image")
    traits = np.asarray(scores.traits)
    if scores.traits is not None and (
            traits.dtype != bool or traits.ndim != 2 or len(traits) != count):
        raise UserError(f"{name} gave Scores.traits of shape {traits.shape} and {traits.dtype}: "
                        f"expected [{count}, K] bool, a row for each image")


def _check_alike(name: str, scores: Sequence[Scores]) -> None:
    """Raises UserError unless all scores have groups, or none has, and as many traits."""
    kinds = {(len(one.groups) > 0, one.traits is not None and np.shape(one.traits)[-1])
             for one in scores}
    if len(kinds) > 1:
        raise UserError(f"{name} gave groups or traits of some images alone, or another number of "
                        "traits: expected the same of every call")


def _bytes(names: Sequence[str], shape: tuple[int, ...]) -> np.ndarray:
    """Names as bytes, [*shape, NAME_BYTES] uint8; longer ones are cut after a character."""
    encoded = [str(name).encode()[:NAME_BYTES].decode(errors="ignore").encode() for name in names]
    return np.array(encoded, f"S{NAME_BYTES}").reshape(*shape, 1).view(np.uint8)


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
