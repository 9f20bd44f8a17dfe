"""A run of digits that was never trained, for the tests of sampling."""


import pytest

from tests.common import as_run, random_run, setup, tiny_config


@pytest.fixture(scope="session")
def run():
    """A run with random parameters, in no folder; t_min is high enough for denoising to show."""
    settings = tiny_config(**{"sample.decoder": "inverse", "trajectory.t_min": 0.2})
    _, model, mesh = setup(settings)
    return random_run(as_run(settings, model, mesh), step=4, workdir="runs/tiny")
