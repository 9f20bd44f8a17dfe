"""Several processes take the same steps as one, stop together, and one job owns a folder."""

import json
import re
import signal
import time

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

import ntm_jax
from ntm_jax.errors import UserError
from ntm_jax.evaluation.evaluate import EvaluationOptions
from ntm_jax.runtime import checksums
from ntm_jax.runtime.checkpoint import Checkpoints
from ntm_jax.runtime.processes import locked
from ntm_jax.sampling.write import SampleRequest
from ntm_jax.training import loop, state
from tests.common import as_run, logged, python, setup, start, tiny_config
from tests.runtime.jobs import SETTINGS, Job, free_port, losses

SUM = dict(rtol=0, atol=1e-6)  # float32 sums in another order


JOIN = """
import jax
from launch import program
program.define_processes()
program.run(lambda: print(jax.config._read("jax_cuda_visible_devices")))
"""


def test_a_process_under_slurm_has_all_gpus_of_its_node():
    slurm = {"JOB_ID": "7", "STEP_NODELIST": "localhost", "STEP_NUM_TASKS": "1", "NTASKS": "1",
             "PROCID": "0", "LOCALID": "0"}
    done = python("-c", JOIN, f"--coordinator_address=localhost:{free_port()}", "--num_processes=1",
                  "--process_id=0", **{f"SLURM_{name}": value for name, value in slurm.items()})
    assert done.stdout.strip() == "all"  # not "0"


SCORED = {"train.score_every": 6, "evaluate.num_samples": 8, "evaluate.features": "pixels"}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The workdir of a finished run of one process with one device.

    On more devices the programs that read it split its parameters over them.
    """
    workdir = tmp_path_factory.mktemp("alone") / "run"
    settings = SETTINGS | SCORED | {"mesh.data": 1, "mesh.fsdp": -1}
    assert loop.train(tiny_config(**settings), str(workdir), progress=False)
    return workdir


@pytest.fixture(scope="module")
def bucket():
    """A bucket of which every tenth call fails."""
    from tests.bucket import Bucket

    with Bucket() as bucket:
        bucket.every = 10
        yield bucket


@pytest.mark.slow
def test_a_killed_job_goes_on_with_other_devices_on_a_bucket(bucket, alone, tmp_path):
    """A process with 8 devices, one with 4, and two with 2 each train as one device does.

    One process with one device reads what the last two saved.
    """
    def job(count, devices, settings):
        return Job("gs://bkt/run", count, devices, (settings,), variables=bucket.environment,
                   flags=("--import=tests.bucket_client",))

    def kill_after_save(job, step):
        while f"{step}/commit_success.txt" not in bucket.names("run/checkpoints"):
            assert job.processes[0].returncode is None
            time.sleep(0.02)
        job.processes[0].kill()
        job.end(-signal.SIGKILL)

    kill_after_save(job(1, 8, {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}), 4)
    second = job(1, 4, {})
    second.read_until("resuming gs://bkt/run at step 4")
    kill_after_save(second, 8)
    last = job(2, 2, SCORED)
    last.read_until("resuming gs://bkt/run at step 8")
    last.end()
    workdir = bucket.copy("run", tmp_path / "run")
    one, several = losses(alone), losses(workdir)
    assert list(one) == list(several) == list(range(1, 13))
    np.testing.assert_allclose(list(several.values()), list(one.values()), **SUM)
    one, several = ({line["step"]: line["score/frechet"] for line in logged(folder)
                     if "score/frechet" in line} for folder in (alone, workdir))
    assert list(several) == [12]
    assert several[12] == pytest.approx(one[12], rel=0.01)  # rounding moves some pixels by a level
    one, several = (
        json.loads((folder / "evaluation.json").read_text()) for folder in (alone, workdir))
    bound, other = (result["nats_per_dim"]["bound"]["mean"] for result in (one, several))
    assert bound == pytest.approx(other, rel=1e-5)
    read = checksums.digest(ntm_jax.load(str(workdir)).params)
    assert read == several["provenance"]["checksum"] != one["provenance"]["checksum"]


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_one_step(tmp_path):
    job = Job(tmp_path, 2, settings=({"train.steps": 100000, "train.save_every": 100000},))
    job.read_until(r"step 1/")
    job.processes[1].send_signal(signal.SIGINT)
    said = job.end()[0][0]
    step = re.fullmatch(r"stopped at step (\d+), saved; the same command resumes", said)
    assert step, said
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [step[1]]


@pytest.mark.slow
def test_evaluation_is_the_same_on_more_devices_and_processes(alone):
    run = ntm_jax.load(str(alone), 12)
    figures = run.scores(EvaluationOptions(split="test", trajectories=2))
    run.report("one.json", *figures, per_example=True)
    Job(alone, 2, program="evaluate", flags=(
        "--split=test", "--trajectories=2", "--per_example", "--step=12")).end()
    (one, scores), (other, other_scores) = (
        (json.loads((alone / f"{name}.json").read_text()),
         pyarrow.parquet.read_table(alone / f"{name}.parquet").to_pydict())
        for name in ("one", "evaluation-12-test"))
    assert one["count"] == other["count"] == 297
    assert scores["index"] == other_scores["index"] == list(range(297))
    for name, values in scores.items():
        # nats, sums of hundreds
        np.testing.assert_allclose(other_scores[name], values, rtol=1e-5, atol=1e-3, err_msg=name)
    bounds = [{name: bound["mean"] for name, bound in found["nats_per_dim"].items()}
              for found in (one, other)]
    assert bounds[1] == pytest.approx(bounds[0], rel=1e-5)
    assert other["provenance"]["checksum"] == one["provenance"]["checksum"]


@pytest.mark.slow
def test_two_processes_sample_as_one_does(alone, tmp_path):
    run, flags = ntm_jax.load(str(alone)), [f"--out={tmp_path}/2", "--num=6", "--candidates=2"]
    run.best_of(2).write_samples(f"{tmp_path}/1", SampleRequest(6))
    Job(alone, 2, program="sample", flags=flags).end()
    images = [np.load(tmp_path / name / "samples.npz")["arr_0"].astype(int) for name in "12"]
    assert images[0].shape == (6, 8, 8, 3)
    # One of 17 grey levels: rounding may fall on the other side.
    assert np.abs(images[0] - images[1]).max() <= 16
    assert (images[0] != images[1]).mean() < 0.02


@pytest.mark.slow
def test_a_record_that_one_process_cannot_read_stops_all_saved(tmp_path):
    images, workdir, rng = tmp_path / "images", tmp_path / "run", np.random.default_rng(0)
    for i in range(80):  # 10 classes, so that the model is that of the digits
        (images / str(i % 10)).mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 255, (8, 8), np.uint8)
        Image.fromarray(pixels).save(images / str(i % 10) / f"{i}.png")
    bad = images / "7" / "7.png"
    changed = {"data.source": f"folder:{images}", "data.split": "all", "evaluate.split": "all",
               "data.image_size": 8, "train.steps": 100000, "train.save_every": 100000,
               "model.transporter_blocks": 0}
    job = Job(workdir, 2, settings=(changed,))
    job.read_until(r"step 3/")
    good = bad.read_bytes()
    bad.write_text("<html>")  # an epoch has 5 steps, so a process reads it soon
    errors = [error for _, error in job.end(status=2)]
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


WAIT = """
import time
from launch import program
program.define_processes()
program.run(lambda: (print("joined", flush=True), time.sleep(120)))
"""


@pytest.mark.slow
def test_a_dead_process_ends_the_others():
    port = free_port()
    processes = [start(["-c", WAIT, f"--coordinator_address=localhost:{port}", "--num_processes=2",
                        f"--process_id={i}", "--heartbeat_timeout=10"]) for i in range(2)]
    for process in processes:
        assert process.stdout.readline() == "joined\n"
    processes[1].kill()
    assert processes[0].wait(60) == -signal.SIGABRT
    for process in processes:
        process.communicate()


def test_processes_started_differently_all_stop_and_name_the_key(tmp_path):
    job = Job(tmp_path / "run", 2, settings=({}, {"optimizer.clip": 0.5}))
    expected = ("error: the processes of this job differ: optimizer.clip is 1.0 in process 0 and "
                "0.5 in process 1: start all with the same command")
    assert [error for _, error in job.end(status=2)] == [expected] * 2
    assert not (tmp_path / "run").exists()


HOLD = """
import sys, time
from ntm_jax.runtime.processes import locked
with locked(sys.argv[1]):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_second_job_is_refused_until_the_first_is_killed(tmp_path):
    folder = str(tmp_path / "run")
    owner = start(["-c", HOLD, folder])
    assert owner.stdout.readline() == "locked\n"
    said = rf"another run trains in {folder} \(process {owner.pid} on .*\): wait for it or stop it"
    with pytest.raises(UserError, match=said), locked(folder):
        pass
    owner.kill()
    owner.communicate()
    with locked(folder):
        pass
