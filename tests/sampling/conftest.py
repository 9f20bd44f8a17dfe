"""A run of digits that was never trained, for the tests of sampling."""

import dataclasses

import pytest

from ntm_jax.training import state
from tests.common import as_run, randomised, setup, tiny_config


@pytest.fixture(scope="module")
def run(quick_compilation):
    """A run with random parameters, in no folder; t_min is high enough for denoising to show."""
    settings = tiny_config(**{"sample.decoder": "inverse", "trajectory.t_min": 0.2})
    _, model, mesh = setup(settings)
    new = as_run(settings, model, mesh)
    params = randomised(state.initialize(new).params)
    return dataclasses.replace(new, params=params, step=4, workdir="runs/tiny")
