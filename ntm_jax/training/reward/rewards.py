"""The earlier name of projects.reward.rewards."""

from ntm_jax.registry import load


def __getattr__(name: str):
    """The part of projects.reward.rewards with this name."""
    return load(f"ntm_jax.projects.reward.rewards:{name}")
