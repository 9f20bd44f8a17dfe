"""Runs of equal settings in a module take one step program, traced and lowered once: 3 s each."""

import pytest

from ntm_jax.training import loop


@pytest.fixture(scope="module", autouse=True)
def shared_steps():
    """Keeps what loop.make_step returns; a test that patches an objective has its own step."""
    made, make_step = {}, loop.make_step

    def make(run, objective, teacher=None):
        key = run.config, teacher and teacher.config, run.spec, run.mesh, objective
        if key not in made:
            made[key] = make_step(run, objective, teacher)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_step", make)
        yield
