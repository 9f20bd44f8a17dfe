"""The reward of the documentation's example, and a tiny run with random parameters."""

import re

import pytest

from ntm_jax.projects.reward import rewards
from tests.common import ROOT, new_run, random_run, tiny_config
from tests.training.conftest import shared_steps  # noqa: F401

PAGE = (ROOT / "docs/howto/reward.md").read_text()
EXAMPLE = re.search(r"```python\n# my_reward\.py\n(.*?)```", PAGE, re.S)[1]


@pytest.fixture(autouse=True)
def brightness(monkeypatch):
    """The reward of the page's example: the mean pixel, over 255."""
    monkeypatch.setattr(rewards.REWARDS, "_entries", dict(rewards.REWARDS._entries))
    rewards._of_data.cache_clear()
    exec(EXAMPLE, {})


@pytest.fixture(scope="session")
def run():
    settings = tiny_config(**{"reward.name": "brightness", "reward.samples": 4,
                              "reward.updates": 2, "train.objective": "policy_gradient",
                              "init_from": "x", "data.batch_size": 4})
    return random_run(new_run(settings), 0)
