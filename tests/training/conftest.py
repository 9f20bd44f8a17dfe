"""Runs of equal settings in a module take one step program, traced and lowered once: 3 s each."""

import json

import pytest

from ntm_jax.training import loop


@pytest.fixture(scope="module", autouse=True)
def shared_steps():
    """Keeps what loop.make_step returns; a test that patches an objective has its own step."""
    made, make_step = {}, loop.make_step

    def make(run, objective, teacher=None):
        settings = (json.dumps(r.config.raw, sort_keys=True) for r in (run, teacher) if r)
        key = (*settings, run.spec, run.mesh, id(objective))
        if key not in made:
            # the objective is kept, or its id would be another's
            made[key] = make_step(run, objective, teacher), objective
        return made[key][0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_step", make)
        yield
