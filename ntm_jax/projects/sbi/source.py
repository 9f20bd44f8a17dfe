"""The source `sbi:TASK`: parameters theta given what a simulator makes of them, x.

TASK is two_moons, slcp, slcp_moments, gaussian_mixture or bernoulli_glm; see tasks.py.
`sbi:TASK,count=30000` has another number of simulations than 10,000. The held-out records are among
them: a budget of simulations covers training and the choice of settings.

Splits: train, test and all, cut from a permutation of the simulations. No jax is imported: grain's
worker processes run this.
"""

import functools
import re

import numpy as np

from ntm_jax.data.sources.arrays import Arrays, from_arrays
from ntm_jax.data.sources.source import Source
from ntm_jax.errors import UserError
from ntm_jax.projects.sbi import tasks

KIND, COUNT = "sbi", 10_000
FRESH = 1  # the seed of simulations that no run was trained on; the source's own is 0


def task_of(name: str) -> str:
    """The name of the task of a data.source; UserError if it is no `sbi:TASK`."""
    kind, _, argument = name.partition(":")
    if kind != KIND:
        raise UserError(f"data.source is {name}: expected a run of {KIND}:TASK, whose simulator "
                        "and posteriors are known")
    return _parse(argument)[0]


def simulate(task: str, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(theta [count, D], x [count, E]), float64, of a task's prior and simulator."""
    random, found = np.random.default_rng(seed), tasks.find(task)
    theta = found.draw_prior(random, count)
    return theta, found.simulate(random, theta)


def open_sbi(argument: str, split: str) -> Source:
    """Opens a split of the simulations of a task; argument: TASK[,count=N]."""
    return _arrays(*_parse(argument)).open(split)


@functools.lru_cache(maxsize=2)
def _arrays(task: str, count: int) -> Arrays:
    theta, x = simulate(task, count, 0)
    return from_arrays(theta, condition=x)


def _parse(argument: str) -> tuple[str, int]:
    """'slcp,count=30000' -> ('slcp', 30000)."""
    task, comma, option = argument.partition(",")
    tasks.find(task)
    match = re.fullmatch(r"count=([1-9][0-9]{0,8})", option)
    if comma and not match:
        raise UserError(f"data.source {KIND}:{argument} is not understood at {option!r}: expected "
                        f"{KIND}:TASK or {KIND}:TASK,count=N")
    return task, int(match[1]) if match else COUNT
