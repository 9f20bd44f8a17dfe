"""Three training steps of a pinned configuration, against recorded numbers.

A change of code that should change no number leaves these as they are. If this test fails and the
change of numbers is intended (another initialisation, loss, optimiser or order of random draws),
print the new ones with

    JAX_DISABLE_MOST_OPTIMIZATIONS=1 python -m tests.test_golden

paste them into GOLDEN, and describe in CHANGELOG.md what changed: runs of earlier versions then do
not continue with the same numbers.
"""

import math
import pprint

import jax
import numpy as np
import pytest

from ntm_jax.runtime import sharding
from ntm_jax.training import state
from ntm_jax.training.step import make_step
from tests.common import as_run, batch_of, objective_of, setup, tiny_config

CONFIGURATIONS = {
    "end_to_end": {},
    "weighted": {"train.level_weight_power": 1.0},
    "pairwise": {"train.objective": "pairwise"},
    "flow_matching": {
        "train.objective": "flow_matching", "model.head": "flow_matching",
        "model.transporter_blocks": 0,
        "sample.decoder": "euler", "sample.steps": 5},
}
# Losses and gradient norms of three steps, and the norm of the parameters after them.
GOLDEN = {
    "end_to_end": (
        [0.0668351948261261, 0.08962811529636383, 0.08391781151294708],
        [0.6140027046203613, 0.6561046838760376, 0.5950287580490112],
        22.054211461175022),
    "weighted": (
        [0.0668351948261261, 0.08962811529636383, 0.08747119456529617],
        [0.5098742842674255, 0.5168566703796387, 0.5938726663589478],
        22.053159549664972),
    "pairwise": (
        [0.07027038931846619, 0.0907018780708313, 0.054640334099531174],
        [0.7538611888885498, 0.713908851146698, 0.5563026070594788],
        22.05605320288599),
    "flow_matching": (
        [1.4236327409744263, 1.2529053688049316, 1.4133962392807007],
        [1.268703818321228, 1.067244291305542, 1.1518440246582031],
        16.929982929431336),
}
ROUNDING = 1e-5  # sums of thousands of float32 numbers, in another order on another processor
HINT = "a training step gives other numbers; the docstring of tests/test_golden.py says what to do"


def three_steps(name: str) -> tuple[list[float], list[float], float]:
    settings = tiny_config(**CONFIGURATIONS[name])
    source, model, mesh = setup(settings)
    run = as_run(settings, model, mesh)
    current, step, losses, norms = state.initialize(run), make_step(run, objective_of(run)), [], []
    batch = sharding.to_global(batch_of(source, settings, 16), mesh)
    for _ in range(3):
        with sharding.use(mesh):
            current, metrics = step(current, batch, 2)
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
    squares = (np.sum(np.square(np.asarray(a, np.float64)))
               for a in jax.tree.leaves(current.params))
    return losses, norms, math.sqrt(sum(squares))


QUICK = ("end_to_end",)


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in GOLDEN])
def test_training_steps_give_the_recorded_numbers(name):
    for found, recorded in zip(three_steps(name), GOLDEN[name], strict=True):
        np.testing.assert_allclose(found, recorded, rtol=ROUNDING, err_msg=HINT)


if __name__ == "__main__":
    pprint.pprint({name: three_steps(name) for name in CONFIGURATIONS}, width=100)
