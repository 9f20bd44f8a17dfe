"""A run of digits that was never trained, and its scores, which the tests only read."""

import pytest

from ntm_jax.data import sources
from ntm_jax.evaluation import scoring
from tests.common import as_run, random_run, setup, tiny_config

SETTINGS = {"evaluate.batch_size": 12, "evaluate.trajectories": 3}


@pytest.fixture(scope="session")
def source():
    """The 20 records that are scored."""
    return sources.open_source("digits", "test[:20]")


@pytest.fixture(scope="session")
def run():
    """A run with random parameters, so that no term is trivial, in no folder.

    It scores 12 records at a time, so that the last batch is padded.
    """
    settings = tiny_config(**SETTINGS)
    _, model, mesh = setup(settings)
    return random_run(as_run(settings, model, mesh), step=3, workdir="runs/tiny")


@pytest.fixture(scope="session")
def scores(run, source):
    """The scores of the records, with three trajectories each."""
    return scoring.score_records(run, source, 3)
