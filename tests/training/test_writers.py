"""The writers of metrics: Weights & Biases offline. One of a user's own is in test_doors.py."""

import sys
import types
from unittest import mock

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


def test_weights_and_biases(tmp_path, monkeypatch):
    """A resumed run continues under the id that its folder keeps, and repeats no step."""
    def init(id, **_):
        began.append((id, mock.Mock(starting_step=5 if began else 0)))
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
    sent = [[(call.kwargs["step"], *call.args[0]) for call in run.log.mock_calls]
            for run in (one, two)]
    assert sent == [[(2, "loss"), (4, "loss"), (4, "samples")], [(6, "loss"), (6, "samples")]]
    one.finish.assert_called_once_with(exit_code=0)
    two.finish.assert_called_once_with(exit_code=1)
