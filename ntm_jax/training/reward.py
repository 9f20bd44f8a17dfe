"""The earlier name of projects.reward, which modules of users import."""

import importlib


def __getattr__(name: str):
    """A module of projects.reward, such as rewards."""
    return importlib.import_module(f"ntm_jax.projects.reward.{name}")
