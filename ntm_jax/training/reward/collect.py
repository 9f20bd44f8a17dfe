"""The earlier name of projects.reward.collect."""

from ntm_jax.registry import load


def __getattr__(name: str):
    """The part of projects.reward.collect with this name."""
    return load(f"ntm_jax.projects.reward.collect:{name}")
