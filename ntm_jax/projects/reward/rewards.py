"""Rewards: functions that score samples, behind one table.

A reward of your own is registered in a module that --import names, by a function that makes it:

    def brightness(argument: str, source):
        return lambda images, conditions: images.mean((1, 2, 3)) / 255

    ntm_jax.projects.reward.rewards.register("brightness", brightness)  # reward.name=brightness
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

from ntm_jax.data.sources import Source
from ntm_jax.errors import UserError
from ntm_jax.projects.reward import classifier
from ntm_jax.registry import Registry
from ntm_jax.runtime.config import Config, Data


@dataclasses.dataclass(frozen=True)
class Scores:
    """Rewards [n], higher is better, and what else a reward knows of its samples.

    groups: names [n] by which the log lists the means too. traits: [n, K] bool, which of K traits
    each sample shows of those that its condition leaves open, for config.reward.novelty.
    """

    rewards: np.ndarray
    groups: Sequence[str] = ()
    traits: np.ndarray | None = None


# (images [n, H, W, C] uint8 or float32 latents, or rows [n, D] of an array in its own units;
# captions, labels or vectors [E] in their own units, [n]) -> [n], higher is better
Reward = Callable[[np.ndarray, Sequence], np.ndarray | Scores]


def _shapes(argument: str, source: Source) -> Reward:
    """1 where an image shows what its caption says, by the source's own check, otherwise 0."""
    checked = source.tasks
    if checked is None:
        raise UserError(f"config.reward.name=shapes needs a source that checks images against "
                        f"captions, and {source.name} does not: take config.data.source=shapes")

    def score(images, captions):
        found = checked(images, list(captions))
        return Scores(np.asarray(found["right"], float), found["task"], found.get("traits"))

    return score


def _classifier(argument: str, source: Source) -> Reward:
    """The log-probability of an image's class under a classifier, in nats; see classifier.py."""
    log_probabilities = classifier.saved(argument, source)
    names = source.class_names or [f"class_{label}" for label in range(source.num_classes)]

    def score(images, labels):
        labels = np.asarray(labels)
        if (labels < 0).any():
            raise UserError("config.reward.name=classifier scores images by their class, and a "
                            f"record of {source.name} has none: leave such records out, or take "
                            "another reward")
        found = log_probabilities(images)[np.arange(len(labels)), labels]
        return Scores(found, [names[label] for label in labels])

    return score


REWARDS: Registry[Callable[[str, Source], Reward]] = Registry("config.reward.name", {
    "shapes": _shapes,
    "classifier[:FILE]": _classifier,
})
register = REWARDS.register


def of_run(config: Config) -> Reward:
    """The reward of a configuration, made once from its training data. Raises as `find`."""
    return _of_data(config.reward.name, config.data)


@functools.lru_cache(maxsize=1)  # a classifier is trained, and evaluations ask again
def _of_data(name: str, data: Data) -> Reward:
    return find(name, data.open(data.split))


def find(name: str, source: Source) -> Reward:
    """The reward of a name for samples of a source. Raises UserError if it is unknown."""
    make, argument = REWARDS.find(name)
    return make(argument, source)


def scored(name: str, reward: Reward, images: np.ndarray, conditions: Sequence) -> Scores:
    """The scores of n images. Raises UserError where there are others than one for each image."""
    found = reward(images, conditions)
    found = found if isinstance(found, Scores) else Scores(found)
    values = np.asarray(found.rewards, np.float32)
    if values.shape != (len(images),) or not np.isfinite(values).all():
        raise UserError(f"config.reward.name={name} gave an array of shape {values.shape}, "
                        f"{np.isfinite(values).sum()} of them finite: expected {len(images)} "
                        "finite numbers, one for each image, or rewards.Scores of them")
    return dataclasses.replace(found, rewards=values)
