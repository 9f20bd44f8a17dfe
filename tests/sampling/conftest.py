"""A run of digits that was never trained, for the tests of sampling."""


import pytest

from tests.common import new_run, random_run, tiny_config


@pytest.fixture(scope="session")
def run():
    """A run with random parameters, in no folder; t_min is high enough for denoising to show."""
    settings = tiny_config(**{"sample.decoder": "inverse", "trajectory.t_min": 0.2})
    return random_run(new_run(settings), step=4, workdir="runs/tiny")
