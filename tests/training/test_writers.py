"""The writers of metrics: Weights & Biases offline, and one of a user's own, from its page."""

import re
import sys
import types

import pytest
from PIL import Image

from ntm_jax.errors import UserError
from ntm_jax.training import loop
from ntm_jax.training.metrics import MetricsReporter
from ntm_jax.training.writers.wandb import WandB
from tests.common import ROOT, TINY, python, tiny_config

PAGE = (ROOT / "docs/howto/track.md").read_text()
[EXAMPLE] = re.findall(r"```python\n# my_writer\.py\n(.*?)```", PAGE, re.S)


def test_writers_are_found_before_a_run_begins(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    for name, message in (
            ("wandb:digits", r"pip install wandb \(the extra \[wandb\]\)"),
            ("board", r"--writer 'board' is not known: expected one of wandb\[:PROJECT\]")):
        with pytest.raises(UserError, match=message):
            loop.train(tiny_config(), str(tmp_path / "run"), progress=False, writers=[name])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_writer_from_outside_the_package_gets_a_runs_metrics(tmp_path):
    (tmp_path / "my_writer.py").write_text(EXAMPLE)
    smaller = TINY | {"train.steps": 2, "model.transporter_blocks": 0, "evaluate.trajectories": 1}
    settings = [f"--config.{key}={value}" for key, value in smaller.items()]
    python("-m", "launch.train", "--config=digits", *settings, "--import=my_writer",
           "--writer=table:losses", f"--workdir={tmp_path}/run", cwd=tmp_path)
    rows = [row.split(",") for row in (tmp_path / "run/losses.csv").read_text().splitlines()]
    assert [row[0] for row in rows if row[1] == "loss"] == ["1", "2"]
    assert any(row[1] == "picture" for row in rows)


class FakeRun:
    """A run of W&B that has the steps before `starting_step`, and keeps what it gets."""

    def __init__(self, starting_step):
        self.starting_step, self.sent, self.status = starting_step, [], None

    def log(self, values, step):
        self.sent.append((step, *values))

    def finish(self, exit_code):
        self.status = exit_code


def test_weights_and_biases(tmp_path, monkeypatch):
    """A resumed run continues under the id that its folder keeps, and repeats no step."""
    def init(id, **_):
        began.append((id, FakeRun(starting_step=5 if began else 0)))
        return began[-1][1]

    began = []
    wandb = types.SimpleNamespace(init=init, Settings=dict, Image=str)
    monkeypatch.setitem(sys.modules, "wandb", wandb)

    def train(start, *steps):
        with MetricsReporter(tmp_path, 10, start, True, [WandB("mine")]) as reporter:
            for step in steps:
                reporter.write(step, {"loss": step / 8})
            Image.new("RGB", (2, 2)).save(tmp_path / "samples.png")
            reporter.picture(step, tmp_path / "samples.png")
            if step == 6:
                raise RuntimeError("diverged")

    train(0, 2, 4)
    with pytest.raises(RuntimeError, match="diverged"):
        train(2, 4, 6)
    train(0, 2)  # a run that starts over
    (first, one), (second, two), (third, _) = began
    assert first == second != third
    assert (one.sent, one.status) == ([(2, "loss"), (4, "loss"), (4, "samples")], 0)
    assert (two.sent, two.status) == ([(6, "loss"), (6, "samples")], 1)
