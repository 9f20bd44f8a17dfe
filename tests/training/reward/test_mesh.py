"""Post-training takes the same steps on one device, on 8, and in two processes."""

import json

import pytest

from tests.common import tiny_config, write_run
from tests.runtime.processes.common import SETTINGS, Job

REWARD = {"train.objective": "policy_gradient", "reward.name": "brightness", "reward.samples": 3,
          "reward.updates": 2, "reward.kl": 0.01, "train.steps": 6, "evaluate.images": 48,
          "optimizer.learning_rate": 1e-3}
WHERE = {  # processes, devices of each, further settings
    "one": (1, 1, {}),
    "eight": (1, 8, {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}),
    "two processes": (2, 2, {"mesh.fsdp": 2, "train.accumulate": 2}),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{where: (the lines of metrics.jsonl, evaluation.json)}."""
    folder = tmp_path_factory.mktemp("runs")
    values, found = {key: value for key, value in SETTINGS.items() if key != "train.steps"}, {}
    write_run(folder / "base", tiny_config(**values))
    for name, (count, devices, changes) in WHERE.items():
        settings = REWARD | changes | {"init_from": folder / "base"}
        job = Job(folder / name, count, devices, (settings,),
                  flags=("--import=tests.training.reward.brightness",))
        ended = job.end()
        assert [status for status, *_ in ended] == [0] * count, ended
        lines = (folder / name / "metrics.jsonl").read_text().splitlines()
        evaluation = json.loads((folder / name / "evaluation.json").read_text())
        found[name] = list(map(json.loads, lines)), evaluation
    return found


@pytest.mark.slow
@pytest.mark.parametrize("where", list(WHERE)[1:])
def test_the_steps_are_the_same_on_any_mesh(runs, where):
    (one, evaluation), (other, evaluated) = runs["one"], runs[where]
    speeds = {"wall_time", "examples_per_second", "flops_per_second", "flop_share"}
    assert [line["step"] for line in one] == [line["step"] for line in other]
    for mine, theirs in zip(one, other, strict=True):
        assert mine.keys() - speeds == theirs.keys() - speeds
        for key in mine.keys() - speeds:
            # Rewards are of pixels, which are whole numbers: one may round to the next.
            size = 2e-4 if key.startswith("reward") else 1e-5
            assert theirs[key] == pytest.approx(mine[key], rel=size, abs=size), key
    for key in ("reward", "reward_before", "diversity", "kl"):
        assert evaluated[key]["mean"] == pytest.approx(evaluation[key]["mean"], rel=1e-3)
    assert max(line["kl"] for line in one if "kl" in line) > 1e-3
