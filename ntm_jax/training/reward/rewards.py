"""Rewards: functions that score samples, behind one table.

A reward of your own is registered in a module that --import names:

    def brightness(argument: str, source):
        return lambda images, conditions: images.mean((1, 2, 3)) / 255

    ntm_jax.training.reward.rewards.register("brightness", brightness)  # reward.name=brightness
"""

from collections.abc import Callable, Sequence

import numpy as np

from ntm_jax.data.sources import Source
from ntm_jax.errors import UserError
from ntm_jax.registry import Registry

# (images [n, H, W, C] uint8 or float32 latents, captions or labels [n]) -> [n], higher is better
Reward = Callable[[np.ndarray, Sequence], np.ndarray]


def _shapes(argument: str, source: Source) -> Reward:
    """1 where an image shows what its caption says, by the source's own check, otherwise 0."""
    checked = source.tasks
    if checked is None:
        raise UserError(f"config.reward.name=shapes needs a source that checks images against "
                        f"captions, and {source.name} does not: take config.data.source=shapes")
    return lambda images, captions: np.asarray(checked(images, list(captions))["right"], float)


REWARDS: Registry[Callable[[str, Source], Reward]] = Registry("config.reward.name", {
    "shapes": _shapes,
})
register = REWARDS.register


def find(name: str, source: Source) -> Reward:
    """The reward of a name for samples of a source. Raises UserError for an unknown one."""
    make, argument = REWARDS.find(name)
    return make(argument, source)
