"""The campaigns with few trials; from the command line they take more.

See docs/reference/safety.md.
"""

import re

import pytest

from tests.campaigns import damage, fuzz, kills, workdirs
from tests.common import python


# Orbax abandons reads, which then warn.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.slow
def test_a_damaged_workdir_gives_the_same_run_or_one_line():
    tally = workdirs.run(12, 0, every=83)
    assert tally.wrong() == []
    assert tally.counts["config.json, one bit", "refused"] > 75
    assert all(sum(tally.counts[kind, found] for kind in damage.KINDS)
               for found in ("ok", "refused"))


@pytest.mark.slow
def test_random_settings_are_a_configuration_or_one_line():
    tally = damage.Tally()
    fuzz.in_process(60, 1, tally)
    assert tally.wrong() == []
    assert min(tally.counts["in process", found] for found in ("ok", "refused")) > 5


@pytest.mark.slow
def test_a_failed_write_loses_nothing():
    names = ["train", "sample", "prepare"]
    done = python("-m", "tests.campaigns.writes", "1", *names)  # in its own process: it forks
    refused = re.findall(r"^(\w+), limit +0 +1 +0 +0$", done.stdout, re.MULTILINE)
    assert refused == names


@pytest.mark.slow
def test_killed_runs_lose_nothing(tmp_path):
    # Many more steps than the run takes; its program is that of tests/test_programs.py.
    settings = {"train.steps": 100, "optimizer.warmup_steps": 2}
    assert kills.run(1, 0, folder=tmp_path, settings=settings)[1] == 0
