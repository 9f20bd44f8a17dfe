"""Rollouts of a tiny run, for the tests of post-training."""

import dataclasses

import jax
import numpy as np

from ntm_jax.runtime import sharding
from tests.common import batch_of, objective_of


def with_reward(run, **settings):
    """The run with other settings of its section `reward`."""
    reward = dataclasses.replace(run.config.reward, **settings)
    return dataclasses.replace(run, config=dataclasses.replace(run.config, reward=reward))


def with_objective(run, objective: str, **settings):
    """The run with another objective, and other settings of its section `reward`."""
    train = dataclasses.replace(run.config.train, objective=objective)
    config = dataclasses.replace(run.config, train=train)
    return with_reward(dataclasses.replace(run, config=config), **settings)


def made(run):
    """The Rollouts of a run."""
    source = run.config.data.open("train")
    if not run.config.reward.name:
        source = dataclasses.replace(source, records=Pairs(source.records))
    return objective_of(run).extend(run, source)


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Records, each with a rejected image, which is black."""

    records: object

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        record = self.records[index]
        return record | {"rejected": 0 * record["image"]}


def first_batch(run, records: int = 4) -> dict:
    """The global batch of the first training records."""
    return sharding.to_global(
        batch_of(run.config.data.open("train"), run.config, records), run.mesh)


def rolled(run, reference=None, step: int = 0, **more) -> tuple[dict, dict]:
    """(a batch of the first records with rollouts, the scalars to log); more: of the batch."""
    rollouts = made(run)
    return rollouts.finish(rollouts.begin(
        run.params, reference or run.params, first_batch(run) | more, step))


def moved(params, size: float, seed: int = 7):
    """Parameters plus normal noise of a size."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda a: np.asarray(a) + size * rng.normal(size=a.shape).astype(np.float32), params)


def flat(a):
    """[P, G, ...] -> [B, ...], on the host."""
    return np.asarray(a).reshape(-1, *a.shape[2:])
