"""Training, evaluation and sampling by several processes: the same numbers as by one."""

import json
import re
import shutil
import signal
import time

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

import ntm_jax
from ntm_jax.evaluation.evaluate import EvaluationOptions
from ntm_jax.runtime import checksums
from ntm_jax.runtime.checkpoint import Checkpoints
from ntm_jax.sampling.write import SampleRequest
from ntm_jax.training import loop, state
from tests.common import as_run, setup, tiny_config
from tests.runtime.processes.common import GONE, SETTINGS, Job, ends, free_port, losses, start

SUM = dict(rtol=1e-5, atol=1e-6)  # float32 sums in another order


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The workdir of a finished run of one process with one device."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    assert loop.train(tiny_config(**SETTINGS), str(workdir), progress=False)
    return workdir


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """(workdir, ends) of two processes, of which the second receives SIGTERM after a step.

    It is sent early, since a busy machine may send it many of the short steps later.
    """
    workdir = tmp_path_factory.mktemp("stopped") / "run"
    job = Job(workdir, 2)
    job.read_until(r"step 1/")
    job.processes[1].send_signal(signal.SIGTERM)
    return workdir, job.end()


@pytest.mark.slow
def test_sigterm_to_one_process_stops_all_at_one_step_saved(stopped):
    workdir, ends = stopped
    assert [status for status, *_ in ends] == [0, 0], ends
    said = re.fullmatch(r"stopped at step (\d+), saved; the same command resumes", ends[0][1])
    assert said, ends
    assert int(said[1]) < SETTINGS["train.steps"]
    assert (workdir / "checkpoints" / said[1]).exists()


@pytest.mark.slow
def test_an_interrupted_run_goes_on_with_other_devices(stopped, alone, tmp_path):
    """Two processes with 4 devices, then two with 8, train as one with one device does.

    One process with one device reads what they saved.
    """
    workdir = shutil.copytree(stopped[0], tmp_path / "run")
    ends = Job(workdir, 2, devices=4).end()
    assert [status for status, *_ in ends] == [0, 0], ends
    one, several = losses(alone), losses(workdir)
    assert list(one) == list(several) == list(range(1, 13))
    np.testing.assert_allclose(list(several.values()), list(one.values()), **SUM)
    one, several = (
        json.loads((folder / "evaluation.json").read_text()) for folder in (alone, workdir))
    bound, other = (result["nats_per_dim"]["bound"]["mean"] for result in (one, several))
    assert bound == pytest.approx(other, rel=1e-5)
    read = checksums.digest(ntm_jax.load(str(workdir)).params)
    assert read == several["provenance"]["checksum"] != one["provenance"]["checksum"]


@pytest.fixture(scope="module")
def evaluated(alone):
    """[(evaluation.json, the scores of all 297 held-out digits)] of one and of two processes."""
    run = ntm_jax.load(str(alone), 12)
    figures = run.scores(EvaluationOptions(split="test", trajectories=2))
    run.report("one.json", *figures, per_example=True)
    ends = Job(alone, 2, program="evaluate", flags=(
        "--split=test", "--trajectories=2", "--per_example", "--step=12")).end()
    assert [status for status, *_ in ends] == [0, 0], ends
    return [(json.loads((alone / f"{name}.json").read_text()),
             pyarrow.parquet.read_table(alone / f"{name}.parquet").to_pydict())
            for name in ("one", "evaluation-12-test")]


@pytest.mark.slow
def test_evaluation_is_the_same_on_more_devices_and_processes(evaluated):
    (one, scores), (other, other_scores) = evaluated
    assert one["count"] == other["count"] == 297
    assert scores["index"] == other_scores["index"] == list(range(297))
    for name, values in scores.items():
        # nats, sums of hundreds
        np.testing.assert_allclose(other_scores[name], values, rtol=1e-5, atol=1e-3, err_msg=name)
    for unit in ("bits_per_dim", "nats_per_dim"):
        for bound in ("bound", "importance_weighted"):
            expected = pytest.approx(one[unit][bound]["mean"], rel=1e-5)
            assert other[unit][bound]["mean"] == expected
    by_level = pytest.approx(one["trajectory_nll"]["by_level"], rel=1e-5)
    assert other["trajectory_nll"]["by_level"] == by_level
    assert other["provenance"]["checksum"] == one["provenance"]["checksum"]


@pytest.mark.slow
def test_two_processes_sample_as_one_does(alone, tmp_path):
    ntm_jax.load(str(alone)).write_samples(f"{tmp_path}/1", SampleRequest(6))
    ends = Job(alone, 2, program="sample", flags=[f"--out={tmp_path}/2", "--num=6"]).end()
    assert [status for status, *_ in ends] == [0, 0], ends
    images = [np.load(tmp_path / name / "samples.npz")["arr_0"].astype(int) for name in "12"]
    assert images[0].shape == (6, 8, 8, 3)
    # One of 17 grey levels: rounding may fall on the other side.
    assert np.abs(images[0] - images[1]).max() <= 16
    assert (images[0] != images[1]).mean() < 0.02


@pytest.mark.slow
def test_log_prob_in_two_processes_is_that_of_one(alone):
    run, port = ntm_jax.load(str(alone)), free_port()
    images = np.stack([record["image"] for record in run.config.data.open("test[:10]").records])
    one = run.log_prob(images, label=np.arange(10), trajectories=2)
    jobs = [start("tests.campaigns.log_prob", port, 2, number, f"--workdir={alone}", devices=2)
            for number in range(2)]
    for process in jobs:
        said, error = process.communicate(timeout=240)
        assert process.returncode == 0, error
        np.testing.assert_allclose(json.loads(said.splitlines()[-1]), one, rtol=1e-5, atol=1e-3)


@pytest.mark.slow
def test_processes_that_ask_for_other_parameters_say_so(alone):
    port = free_port()
    found = ends([start("launch.evaluate", port, 2, number, f"--workdir={alone}",
                        *["--raw"] * number) for number in range(2)])
    expected = ("error: the processes of this job differ: --raw is False in process 0 and True in "
                "process 1: start all with the same command")
    assert found == [(2, expected)] * 2


@pytest.mark.slow
def test_a_record_that_one_process_cannot_read_stops_all_saved(tmp_path):
    images, workdir, rng = tmp_path / "images", tmp_path / "run", np.random.default_rng(0)
    for i in range(80):  # 10 classes, so that the model is that of the digits
        (images / str(i % 10)).mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 255, (8, 8), np.uint8)
        Image.fromarray(pixels).save(images / str(i % 10) / f"{i}.png")
    bad = images / "7" / "7.png"
    changed = {"data.source": f"folder:{images}", "data.split": "all", "evaluate.split": "all",
               "data.image_size": 8, "train.steps": 100000, "train.save_every": 100000}
    job = Job(workdir, 2, settings=(changed,))
    job.read_until(r"step 3/")
    good = bad.read_bytes()
    bad.write_text("<html>")  # an epoch has 5 steps, so a process reads it soon
    ends = job.end()
    assert [status for status, *_ in ends] == [2, 2], ends
    errors = [error for *_, error in ends]
    reader, other = sorted(errors, key=lambda error: "another process" in error)
    assert reader == f"error: image {bad} cannot be decoded (not an image): remove it"
    said = re.match(r"error: another process of this job could not read a record \(see its line\); "
                    r"step (\d+) is saved", other)
    assert said, other
    bad.write_bytes(good)
    settings = tiny_config(**changed)
    _, model, mesh = setup(settings)
    with Checkpoints(workdir) as checkpoints:
        step, current, position = checkpoints.restore(state.abstract(as_run(settings, model, mesh)))
    assert step == int(current.step) == int(said[1]) >= 3
    assert position == {"global_next_index": 16 * step}
    assert max(losses(workdir)) == step  # the step that lacked a part was not logged


@pytest.mark.slow
def test_a_dead_process_stops_the_others_soon_with_one_line(tmp_path):
    job = Job(tmp_path / "run", 2, settings=({"train.steps": 100000},))
    job.read_until(r"step 6/")
    job.processes[1].kill()
    begin = time.monotonic()
    (status, _, error), _ = job.end(timeout=60)
    assert time.monotonic() - begin < 45
    assert status != 0
    assert re.match(GONE, error), error


def test_processes_started_differently_all_stop_and_name_the_key(tmp_path):
    ends = Job(tmp_path / "run", 2, settings=({}, {"optimizer.clip": 0.5})).end()
    expected = ("error: the processes of this job differ: optimizer.clip is 1.0 in process 0 and "
                "0.5 in process 1: start all with the same command")
    assert [(status, error) for status, _, error in ends] == [(2, expected)] * 2
    assert not (tmp_path / "run").exists()
