"""The programs as a user runs them: one small run, from a SIGTERM to samples, and each mistake."""

import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest

from launch import console
from ntm_jax.runtime.processes import LOCK
from tests.common import ROOT, TINY, environment, figures, python, start

pytestmark = pytest.mark.xdist_group("programs")  # one worker: they share a run
STEPS = 100
SETTINGS = TINY | {"train.save_every": 30, "model.transporter_blocks": 0}
CONFIG = ["--config=experiments/digits.py",
          *(f"--config.{key}={value}" for key, value in SETTINGS.items())]


def program(name, *arguments, **options):
    return python("-m", f"launch.{name}", *arguments, **options)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(workdir, lines of a start that SIGTERM stops, output of another, which finishes)."""
    workdir = tmp_path_factory.mktemp("programs") / "run"
    arguments = [*CONFIG, f"--workdir={workdir}", f"--config.train.steps={STEPS}",
                 "--config.evaluate.num_samples=20", "--config.sample.num=20",
                 "--config.evaluate.features=pixels"]
    process = start(["-m", "launch.train", *arguments, "--stop_status=75"])
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("step 3/"):
            process.send_signal(signal.SIGTERM)
    error = process.stderr.read()
    assert process.wait(60) == 75, error
    process.stdout.close()
    process.stderr.close()
    second = program("train", *arguments, "--config.train.log_every=50")
    return workdir, lines, second.stdout


@pytest.mark.slow
def test_sigterm_saves_and_reports_it(run):
    _, first, second = run
    stopped = re.fullmatch(r"stopped at step (\d+), saved; the same command resumes\n", first[-1])
    assert stopped, first[-3:]
    assert 3 <= int(stopped[1]) < STEPS
    assert f"resuming {run[0]} at step {stopped[1]}" in second
    assert "changed since the run began: train.log_every: 1 -> 50" in second


@pytest.mark.slow
def test_a_run_leaves_all_its_files(run):
    workdir, _, printed = run
    names = {path.name for path in workdir.iterdir()}
    assert {"config.json", "checkpoints", "metrics.jsonl", "samples.png", "trajectories.png",
            "loss.png", "evaluation.json"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == sorted(set(steps))
    assert steps[:3] == [1, 2, 3]
    assert steps[-1] == STEPS
    assert (workdir / "checkpoints" / str(STEPS)).exists()
    assert f"step {STEPS}, 20 held-out records (test[:20]):\n" in printed
    assert f"all figures: {workdir}/evaluation.json\n" in printed


@pytest.mark.slow
def test_evaluate_gives_the_same_figures_as_the_run(run):
    workdir, _, _ = run
    ended = (workdir / "evaluation.json").read_bytes()
    done = program("evaluate", f"--workdir={workdir}", f"--step={STEPS}")
    assert "bits_per_dim.bound" in done.stdout
    assert figures(workdir / f"evaluation-{STEPS}.json") == figures(workdir / "evaluation.json")
    program("evaluate", f"--workdir={workdir}", "--split=train[:20]", "--images=0", "--raw")
    other = figures(workdir / "evaluation-raw-train-to20.json")
    assert other["split"] == "train[:20]"
    assert "class_accuracy" not in other
    judge = f"{workdir}/checkpoints/{STEPS}"
    program("evaluate", f"--workdir={workdir}", "--images=8", "--features=none",
            "--candidates=2", f"--judge={judge}", "--stop_nats=2.5")
    scored = figures(workdir / "evaluation-2candidates.json")["class_accuracy"]
    assert (scored["images"], scored["candidates"]) == (8, 2)
    assert scored["judge"] == {"workdir": str(workdir), "step": STEPS}
    assert (workdir / "evaluation.json").read_bytes() == ended


@pytest.mark.slow
def test_sample_writes_images(run, tmp_path):
    done = program("sample", f"--workdir={run[0]}", "--num=6", "--batch=3", "--labels=1,2",
                   "--decoder=inverse", "--guidance=0.5", "--candidates=2",
                   f"--judge={run[0]}", f"--out={tmp_path / 'out'}")
    assert f"6 images in {tmp_path / 'out'}" in done.stdout
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [*(f"{i}.png" for i in range(6)), "grid.png", "samples.json", "samples.npz"]
    with np.load(tmp_path / "out" / "samples.npz") as archive:
        assert archive["arr_0"].shape == (6, 8, 8, 3)
        assert archive["arr_1"].tolist() == [1, 2] * 3
    asked = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert (asked["--candidates"], asked["--judge"]) == (2, str(run[0]))
    assert asked["judge_step"] == STEPS


def assert_refused(done, message):
    """Asserts that a program ended with status 2 and one line, which holds `message`."""
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(r"error: [^\n]+\n", done.stderr), done.stderr
    assert message in done.stderr
    assert not done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "message"), [
    (["--config.model.scan", "0"], "stray argument '0'"),
    (["--config.data.source=folder:/nowhere"], "data.source folder:/nowhere is not there")])
def test_a_mistake_is_one_line_with_status_2_and_writes_nothing(tmp_path, arguments, message):
    done = program("train", *CONFIG, f"--workdir={tmp_path}/new", *arguments, check=False)
    assert_refused(done, message)
    assert not os.listdir(tmp_path)


@pytest.mark.slow
def test_another_experiment_leaves_a_run_as_it_is(run):

    def written():
        return {path: path.stat().st_mtime_ns for path in run[0].rglob("*") if path.name != LOCK}

    before = written()
    done = program("train", f"--workdir={run[0]}", *CONFIG, "--config.model.width=32", check=False)
    assert_refused(done, "holds a run with model.width = 16, and this one has 32")
    assert written() == before


@pytest.mark.parametrize(("start", "train"), [
    (("-m", "launch.evaluate"), "python -m launch.train"),
    (("-m", "ntm_jax.launch.evaluate"), "python -m ntm_jax.launch.train"),
    (("-c", "from launch.console import main; main()", "evaluate"), "ntm-jax train")])
def test_a_message_names_programs_in_the_form_that_started_this_one(start, train):
    done = python(*start, "--workdir=/nowhere", check=False)
    assert_refused(done, f"give the --workdir that {train} was given")


def test_the_console_script_lists_all_programs(monkeypatch, capsys):
    monkeypatch.setattr(console.program, "START", "")
    monkeypatch.setattr(sys, "argv", ["ntm-jax"])
    console.main()
    listed = re.findall(r"^(\w+) +[A-Z].+\.$", capsys.readouterr().out, re.M)
    programs = [path.stem for path in (ROOT / "launch").glob("*.py")
                if 'if __name__ == "__main__":' in path.read_text()]
    assert sorted(listed) == sorted(programs)


@pytest.mark.slow
@pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="there is a GPU")
def test_a_device_that_is_not_there_is_one_line_also_with_the_compiler_for_it():
    done = python("-c", "import jax; from launch import program; program.run(jax.devices)",
                  check=False, JAX_PLATFORMS="cuda")
    assert_refused(done, "JAX_PLATFORMS=cuda names devices that jax does not find here: unset it")


def test_a_missing_flag_is_named():
    assert_refused(program("evaluate", check=False), "--workdir must be given: --help lists all")


EXHAUSTED = """
import jax.numpy as jnp
from launch import program
program.run(lambda: jnp.zeros(2**50, jnp.uint8).block_until_ready())
"""


def test_too_little_memory_is_one_line_that_names_the_settings():
    done = python("-c", EXHAUSTED, check=False)
    assert_refused(done, "a device's memory is full (RESOURCE_EXHAUSTED: ")
    assert "): lower config.data.batch_size, config.evaluate.batch_size or --batch, " in done.stderr


def test_a_reader_that_goes_away_ends_a_program_quietly():
    printing = "from launch import program; program.run(lambda: [print(n) for n in range(10**6)])"
    process = subprocess.Popen([sys.executable, "-c", printing], cwd=ROOT, env=environment(),
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "0\n"
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(60) == 141
