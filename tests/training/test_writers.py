"""The writers of metrics: Weights & Biases offline. One of a user's own is in test_doors.py."""

import sys
import types

import pytest
from PIL import Image

from ntm_jax.errors import UserError
from ntm_jax.training import loop
from ntm_jax.training.metrics import MetricsReporter
from ntm_jax.training.writers.wandb import WandB
from tests.common import tiny_config


def test_writers_are_found_before_a_run_begins(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    for name, message in (
            ("wandb:digits", r"pip install wandb \(the extra \[wandb\]\)"),
            ("board", r"--writer 'board' is not known: expected one of wandb\[:PROJECT\]")):
        with pytest.raises(UserError, match=message):
            loop.train(tiny_config(), str(tmp_path / "run"), progress=False, writers=[name])
    assert not list(tmp_path.iterdir())


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
