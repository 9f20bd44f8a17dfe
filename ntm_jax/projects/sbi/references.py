"""Observations and reference posteriors of the benchmark's tasks, from the package sbibm's files.

The package is not imported: it needs old versions of many others, and its files need none.
"""

import bz2
import importlib.util
import pathlib
from typing import NamedTuple

import numpy as np

from ntm_jax.errors import UserError
from ntm_jax.projects.sbi import tasks

OBSERVATIONS = 10  # of every task


class Reference(NamedTuple):
    """An observation and draws of its posterior.

    x: [E] float64, what is observed.
    samples: [10000, D] float64, draws of p(theta | x).
    """

    x: np.ndarray
    samples: np.ndarray


def read(task: str, number: int) -> Reference:
    """Observation `number` of a task, from 1 to 10; UserError if sbibm is not installed."""
    of_task = tasks.find(task)
    name = of_task.of_benchmark or task
    folder = _folder() / "tasks" / name / "files" / f"num_observation_{number}"
    with bz2.open(folder / "reference_posterior_samples.csv.bz2", "rt") as file:
        samples = np.loadtxt(file, delimiter=",", skiprows=1)
    x = np.loadtxt(folder / "observation.csv", delimiter=",", skiprows=1)
    return Reference(of_task.summary(x[None])[0] if of_task.summary else x, samples)


def _folder() -> pathlib.Path:
    found = importlib.util.find_spec("sbibm")
    if found is None or not found.submodule_search_locations:
        raise UserError("the reference posteriors come with sbibm, which is not installed: pip "
                        "install --no-deps sbibm")
    return pathlib.Path(found.submodule_search_locations[0])
