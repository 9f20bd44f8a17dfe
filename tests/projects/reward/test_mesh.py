"""Post-training takes the same steps on one device as on 8 of two processes.

The model has no transporter, since the sampler then compiles in less time: test_processes.py draws
samples with one.
"""

import json

import pytest

from tests.common import logged, tiny_config, write_run
from tests.runtime.jobs import SETTINGS as OF_JOBS
from tests.runtime.jobs import Job

SETTINGS = OF_JOBS | {"model.transporter_blocks": 0, "model.pixel_likelihood": "learned"}
REWARD = {"train.objective": "policy_gradient", "reward.name": "brightness", "reward.samples": 4,
          "reward.updates": 2, "reward.kl": 0.01, "reward.prefetch": True, "train.steps": 6,
          "train.save_every": 2, "evaluate.num_samples": 48,
          "evaluate.features": "none", "evaluate.trajectories": 1, "optimizer.learning_rate": 1e-3}
MESH = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2, "train.accumulate": 2}


def trained(folder, base, count: int, devices: int, changes: dict):
    """(the lines of metrics.jsonl, evaluation.json) of a job of so many processes and devices."""
    job = Job(folder, count, devices, (SETTINGS | REWARD | changes | {"init_from": base},),
              flags=("--import=tests.projects.reward.brightness",))
    job.end()
    return logged(folder), json.loads((folder / "evaluation.json").read_text())


@pytest.mark.slow
def test_the_steps_are_the_same_on_any_mesh(tmp_path):
    values = {key: value for key, value in SETTINGS.items() if key != "train.steps"}
    base = write_run(tmp_path / "base", tiny_config(**values))
    one, evaluation = trained(tmp_path / "one", base, 1, 1, {})
    assert_same((one, evaluation), trained(tmp_path / "eight", base, 2, 4, MESH))
    assert max(line["kl"] for line in one if "kl" in line) > 1e-3


def assert_same(run, another) -> None:
    """Whether two runs, as `trained` gives them, have the same figures."""
    (one, evaluation), (other, evaluated) = run, another
    assert [line["step"] for line in one] == [line["step"] for line in other]
    for mine, theirs in zip(one, other, strict=True):
        assert mine.keys() == theirs.keys()
        for key in mine:
            # Rewards are of pixels, which are whole numbers: one may round to the next.
            size = 2e-4 if key.startswith("reward") else 1e-5
            assert theirs[key] == pytest.approx(mine[key], rel=size, abs=size), key
    for key in ("reward", "reward_before", "diversity", "kl"):
        assert evaluated[key]["mean"] == pytest.approx(evaluation[key]["mean"], rel=1e-3)
