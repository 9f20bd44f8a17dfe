"""The writers of metrics: Weights & Biases offline, and one of a user's own, from its page."""

import re
import shutil
import sys
import time
import types

import pytest
from PIL import Image

from ntm_jax.errors import UserError
from ntm_jax.training import loop, writers
from ntm_jax.training.metrics import MetricsReporter
from ntm_jax.training.writers.wandb import IDENTITY, WandB
from tests.common import ROOT, TINY, python, tiny_config

PAGE = (ROOT / "docs/howto/track.md").read_text()
[EXAMPLE] = re.findall(r"```python\n# my_writer\.py\n(.*?)```", PAGE, re.S)


class Recorder:
    """Keeps the calls that a writer gets."""

    def __init__(self, argument=""):
        self.calls = [argument]

    def __getattr__(self, name):
        return lambda *arguments: self.calls.append((name, *arguments))


class Broken(Recorder):
    def open(self, *_):
        raise UserError("nobody is logged in")


def test_every_writer_gets_every_call(tmp_path):
    one, other = Recorder(), Recorder()
    with MetricsReporter(tmp_path, 10, 4, quiet=True, extra_writers=[one, other],
                         settings={"seed": 1}) as writer:
        Image.new("RGB", (2, 2)).save(tmp_path / "samples.png")
        writer.write(5, {"loss": 1})
        writer.picture(5, tmp_path / "samples.png")
        assert one.calls == other.calls == [
            "", ("open", str(tmp_path), 4, {"seed": 1}), ("scalars", 5, {"loss": 1.0}),
            ("picture", 5, tmp_path / "samples.png")]
    writer.close()
    assert one.calls[4:] == other.calls[4:] == [("close",)]


def test_what_is_open_is_closed_where_a_writer_cannot_begin(tmp_path):
    first = Recorder()
    with pytest.raises(UserError, match="nobody is logged in"):
        MetricsReporter(tmp_path, 10, quiet=True, extra_writers=[first, Broken()])
    assert first.calls[-1] == ("close",)


def test_writers_are_found_before_a_run_begins(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    for name, message in (
            ("wandb:digits", r"pip install wandb \(the extra \[wandb\]\)"),
            ("board", r"--writer 'board' is not known: expected one of wandb\[:PROJECT\]")):
        with pytest.raises(UserError, match=message):
            loop.train(tiny_config(), str(tmp_path / "run"), progress=False, writers=[name])
    assert not list(tmp_path.iterdir())


def test_the_pages_writer_takes_its_argument(tmp_path, monkeypatch):
    monkeypatch.setattr(writers, "register", lambda name, make, usage: made.append(make))
    made = []
    exec(EXAMPLE, {})
    with MetricsReporter(tmp_path, 10, quiet=True, extra_writers=[made[0]("losses")]) as writer:
        writer.write(1, {"loss": 0.5})
    assert (tmp_path / "losses.csv").read_text().splitlines() == ["1,loss,0.5"]


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


def records(file):
    """The records of a .wandb file: LevelDB's log, with a header of W&B's."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, part = file.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:  # the rest of a block
            position += 32768 - position % 32768
        size, kind = int.from_bytes(data[position + 4:position + 6], "little"), data[position + 6]
        if position + 7 + size > len(data):  # it is being written
            return
        part += data[position + 7:position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # a full record, or its last part
            yield Record.FromString(part)
            part = b""


def logged(folder):
    """(id, {step: {name: JSON}}, exit status) of the W&B run in a workdir, which is removed."""
    [file] = folder.glob("wandb/offline-run-*/run-*.wandb")
    history, status, end = {}, None, time.monotonic() + 30
    # W&B's service writes the last record on its own time.
    while not any(record.HasField("exit") for record in records(file)) and time.monotonic() < end:
        time.sleep(0.2)
    for record in records(file):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            history[record.history.step.num] = {
                item.key or "/".join(item.nested_key): item.value_json
                for item in record.history.item}
        elif kind == "exit":
            status = record.exit.exit_code
    shutil.rmtree(folder / "wandb")  # two runs of one second would share a folder
    return file.stem.removeprefix("run-"), history, status


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """A run's folder, while W&B is offline; it reads the environment when it first starts."""
    wandb = pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true",
                        "WANDB_CONFIG_DIR": str(tmp_path / "settings"),
                        "WANDB_CACHE_DIR": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    yield tmp_path / "run"
    wandb.teardown()


def train(folder, start: int, *steps: int):
    with MetricsReporter(folder, 10, start, quiet=True, extra_writers=[WandB("mine")],
                         settings={"train.steps": 10}) as writer:
        for step in steps:
            writer.write(step, {"loss": step / 8, "bad": float("nan")})
        Image.new("RGB", (2, 2)).save(folder / "samples.png")
        writer.picture(step, folder / "samples.png")
        if step == 6:
            raise RuntimeError("diverged")


def test_weights_and_biases_offline(offline):
    train(offline, 0, 2, 4)
    first, history, status = logged(offline)
    assert status == 0
    assert {step: float(values["loss"]) for step, values in history.items()} == {2: 0.25, 4: 0.5}
    assert history[4]["samples/_type"] == '"image-file"'
    with pytest.raises(RuntimeError, match="diverged"):
        train(offline, 2, 4, 6)  # resumes, and ends with an error
    second, history, status = logged(offline)
    assert (second, list(history), status) == (first, [4, 6], 1)
    train(offline, 0, 2)  # a run that starts over
    third, _, _ = logged(offline)
    (offline / IDENTITY).write_text("{")
    train(offline, 2, 4)
    assert len({first, third, logged(offline)[0]}) == 3


def test_steps_that_weights_and_biases_has_are_not_sent_again():
    pytest.importorskip("wandb")
    sent, writer = [], WandB()
    writer._run = types.SimpleNamespace(
        starting_step=5, log=lambda values, step: sent.append((step, values)))
    for step in (3, 4, 5, 6):
        writer.scalars(step, {"loss": 1.0})
    assert [step for step, _ in sent] == [5, 6]


def test_without_a_login_training_ends_in_one_line(offline, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # where nobody answers
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(UserError) as error:
        train(offline, 0, 2)
    assert str(error.value).startswith("--writer=wandb:mine cannot begin (")
    assert str(error.value).endswith("log in with `wandb login`, or set WANDB_MODE=offline")
    assert "\n" not in str(error.value)
    assert not (offline / IDENTITY).exists()
