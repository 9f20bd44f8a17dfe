"""Jobs of several processes, each with 2 simulated devices, as a user starts them: the same numbers, one stop for all, no hang."""

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pyarrow.parquet
import pytest
from jax.sharding import Mesh
from PIL import Image

from ntm_jax.errors import UserError
from ntm_jax.runtime import sharding
from ntm_jax.runtime.checkpoint import Checkpoints
from ntm_jax.runtime.processes import job, rendezvous, watchdog
from ntm_jax.training import state
from tests.common import ROOT, TINY, environment, rehearsal, setup, tiny_config

pytestmark = pytest.mark.xdist_group("processes")  # one worker: they share runs
SETTINGS = TINY | {"train.steps": 12, "train.save_every": 4, "sample.decoder": "inverse", "evaluate.split": "test[:16]"}


class Job:
    """`count` processes of one training run, or of another program; by default each has 2 devices. settings: in turn over processes."""

    def __init__(self, workdir, count, devices=2, settings=({},), program="train", flags=()):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        self.processes = []
        for i in range(count):
            together = [f"--coordinator_address=localhost:{port}", f"--num_processes={count}", f"--process_id={i}"] if count > 1 else []
            changed = SETTINGS | settings[i % len(settings)] if program == "train" else {}
            command = [sys.executable, "-m", f"launch.{program}", f"--workdir={workdir}", "--heartbeat_timeout=10", *together, *flags,
                       *(["--config=experiments/digits.py"] if changed else []), *(f"--config.{k}={v}" for k, v in changed.items())]
            self.processes.append(subprocess.Popen(
                command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(
                    XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}")))

    def read_until(self, pattern):
        """Waits for a line of process 0."""
        for line in self.processes[0].stdout:
            if re.search(pattern, line):
                return line
        raise AssertionError(f"no line like {pattern}: {self.processes[0].stderr.read()}")

    def end(self, timeout=240):
        """[(status, last line of stdout, last line of stderr)] of every process."""
        results = []
        for process in self.processes:
            out, error = process.communicate(timeout=timeout)
            results.append((process.returncode, *((text.strip().splitlines() or [""])[-1] for text in (out, error))))
        return results


def losses(workdir) -> dict:
    """{step: loss} of a run."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The workdir of one process with 4 devices that ran to the end."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    (status, *said), = Job(workdir, 1, devices=4).end()
    assert status == 0, said
    return workdir


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """(workdir, what two processes said at the end of their first start, and of their second): SIGTERM to the second at step 5."""
    workdir = tmp_path_factory.mktemp("stopped") / "run"
    first = Job(workdir, 2)
    first.read_until(r"step 5/")
    first.processes[1].send_signal(signal.SIGTERM)
    ends = first.end()
    return workdir, ends, Job(workdir, 2).end()


@pytest.fixture(scope="module")
def evaluated(alone):
    """{(processes, devices of each): (evaluation.json, every record's scores)} of that run, all 297 held-out digits."""
    found = {}
    for count, devices in ((1, 1), (1, 8), (2, 2)):
        job = Job(alone, count, devices, program="evaluate", flags=(
            "--split=test", "--trajectories=2", "--per_example", "--step=12"))
        ends = job.end()
        assert [status for status, *_ in ends] == [0] * count, ends
        found[count, devices] = (json.loads((alone / "evaluation-12.json").read_text()),
                                 pyarrow.parquet.read_table(alone / "evaluation-12.parquet").to_pydict())
    return found


@rehearsal
@pytest.mark.parametrize("where", [(1, 8), (2, 2)])
def test_evaluation_is_the_same_on_any_devices_and_processes(evaluated, where):
    (one, scores), (other, other_scores) = evaluated[1, 1], evaluated[where]
    assert one["count"] == other["count"] == 297
    assert scores["index"] == other_scores["index"] == list(range(297))
    for name, values in scores.items():
        np.testing.assert_allclose(other_scores[name], values, rtol=1e-5, atol=1e-3, err_msg=name)  # nats, sums of hundreds
    for unit in ("bits_per_dim", "nats_per_dim"):
        for bound in ("bound", "importance_weighted"):
            assert other[unit][bound]["mean"] == pytest.approx(one[unit][bound]["mean"], rel=1e-5)
    assert other["trajectory_nll"]["by_level"] == pytest.approx(one["trajectory_nll"]["by_level"], rel=1e-5)
    assert other["provenance"]["checksum"] == one["provenance"]["checksum"]


def test_sigterm_to_one_process_stops_all_at_one_step_saved(stopped):
    workdir, first, _ = stopped
    assert [status for status, *_ in first] == [0, 0], first
    assert re.fullmatch(r"stopped at step \d+, saved; the same command resumes", first[0][1]), first
    assert int(first[0][1].split()[3].rstrip(",")) < SETTINGS["train.steps"]
    assert (workdir / "checkpoints" / first[0][1].split()[3].rstrip(",")).exists()


def test_two_processes_interrupted_and_resumed_train_as_one_does(stopped, alone):
    workdir, _, second = stopped
    assert [status for status, *_ in second] == [0, 0], second
    one, two = losses(alone), losses(workdir)
    assert list(one) == list(two) == list(range(1, 13))
    np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=1e-5, atol=1e-6)  # float32 sums in another order
    one, two = (json.loads((folder / "evaluation.json").read_text())["nats_per_dim"] for folder in (alone, workdir))
    assert one["bound"]["mean"] == pytest.approx(two["bound"]["mean"], rel=1e-5)


@rehearsal
def test_sample_runs_on_two_processes_as_on_one(alone, tmp_path):
    images = []
    for count, devices in ((1, 1), (2, 2)):
        ends = Job(alone, count, devices, program="sample", flags=[f"--out={tmp_path}/{count}", "--num=6"]).end()
        assert [status for status, *_ in ends] == [0] * count, ends
        images.append(np.load(tmp_path / str(count) / "samples.npz")["arr_0"].astype(int))
    assert images[0].shape == (6, 8, 8, 3)
    assert np.abs(images[0] - images[1]).max() <= 16  # one of 17 grey levels: rounding may fall on the other side
    assert (images[0] != images[1]).mean() < 0.02


@rehearsal
def test_a_record_that_one_process_cannot_read_stops_all_saved(tmp_path):
    images, workdir, rng = tmp_path / "images", tmp_path / "run", np.random.default_rng(0)
    for i in range(80):  # 10 classes, and the steps of another test here: the program is compiled once
        (images / str(i % 10)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (8, 8), np.uint8)).save(images / str(i % 10) / f"{i}.png")
    bad = images / "7" / "7.png"
    changed = {"data.source": f"folder:{images}", "data.split": "all", "evaluate.split": "all", "data.image_size": 8,
               "train.steps": 100000, "train.save_every": 100000}
    job = Job(workdir, 2, settings=(changed,))
    job.read_until(r"step 3/")
    good = bad.read_bytes()
    bad.write_text("<html>")  # of an epoch of 5 steps: one process reads it soon
    ends = job.end()
    assert [status for status, *_ in ends] == [2, 2], ends
    reader, other = sorted((error for *_, error in ends), key=lambda error: "another process" in error)
    assert reader == f"error: image {bad} cannot be decoded (not an image): remove it"
    saved = int(re.match(r"error: another process of this job could not read a record \(see its line\); step (\d+) is saved", other)[1])
    bad.write_bytes(good)
    settings = tiny_config(**changed)
    with Checkpoints(workdir) as checkpoints:
        step, current, position = checkpoints.restore(state.abstract(settings, *setup(settings)[1:]))
    assert step == int(current.step) == saved >= 3
    assert position == {"global_next_index": 16 * step}
    assert max(losses(workdir)) == step  # the step that lacked a part was not logged


def test_a_dead_process_stops_the_others_soon_and_says_so(tmp_path):
    job = Job(tmp_path / "run", 2, settings=({"train.steps": 100000},))
    job.read_until(r"step 6/")
    job.processes[1].kill()
    begin = time.monotonic()
    (status, _, error), _ = job.end(timeout=60)
    assert time.monotonic() - begin < 45
    assert status != 0
    assert re.match("error: process 0 stopped: another process of this job is gone; the last checkpoint is intact", error)


def test_processes_started_differently_all_stop_and_name_the_key(tmp_path):
    ends = Job(tmp_path / "run", 2, settings=({}, {"optimizer.clip": 0.5})).end()
    expected = ("error: the processes of this job differ: optimizer.clip is 1.0 in process 0 and 0.5 in process 1: start all with the same "
                "command")
    assert [(status, error) for status, _, error in ends] == [(2, expected)] * 2
    assert not (tmp_path / "run").exists()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def start(program, port, count, number, *flags):
    """One process of a job, by the command line of launch.train or of the small job in tests/campaigns/processes.py."""
    return subprocess.Popen(
        [sys.executable, "-m", program, f"--coordinator_address=localhost:{port}", f"--num_processes={count}", f"--process_id={number}",
         *flags], cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def start_train(port, count, number, tmp_path, *flags):
    return start("launch.train", port, count, number, "--config=experiments/digits.py", f"--workdir={tmp_path}/run", *flags)


def start_small(count, *flags, heartbeat=4):
    """The processes of a small job that have done 5 steps together, or have ended."""
    port = free_port()
    job = [start("tests.campaigns.processes", port, count, number, f"--heartbeat_timeout={heartbeat}", *flags) for number in range(count)]
    for line in job[0].stdout:
        if line.startswith("step 5/"):
            break
    return job


def ends(job, timeout=60) -> list[tuple[int, str]]:
    """(status, standard error) of every process."""
    try:
        errors = [process.communicate(timeout=timeout)[1].strip() for process in job]
    finally:
        for process in job:
            process.kill()
    return [(process.returncode, error) for process, error in zip(job, errors, strict=True)]


STOPPED = (r"error: process \d stopped: another process of this job is gone; the last checkpoint is intact: "
           r"start all again with the same command \(.*\)")


def assert_stopped(found):
    """Each ended by the death of another, in one line: it met a broken connection itself, or jax's runtime aborted it."""
    for status, error in found:
        assert status in (1, -signal.SIGABRT), (status, error)
        assert re.fullmatch(STOPPED, error), error


def meet_all(cases, timeout=5.0, pause=0.0) -> list[tuple[str, float]]:
    """(the refusal or "", seconds) of processes that meet at one port, as threads of this one; cases: (num_processes, process_id)."""
    address, found = f"localhost:{free_port()}", [None] * len(cases)

    def meet(place, count, number):
        begin, refusal = time.monotonic(), ""
        try:
            rendezvous.meet(address, count, number, timeout)
        except UserError as error:
            refusal = str(error)
        found[place] = (refusal, time.monotonic() - begin)

    threads = [threading.Thread(target=meet, args=(place, *case)) for place, case in enumerate(cases)]
    for thread in threads:
        thread.start()
        time.sleep(pause)
    for thread in threads:
        thread.join()
    return found


@pytest.fixture
def quick_rendezvous(monkeypatch):
    """Refusals linger for less time, and nobody waits for jax's service, which these tests do not start."""
    monkeypatch.setattr(rendezvous, "LINGER", 0.3)
    monkeypatch.setattr(rendezvous, "_wait_for_port", lambda *_: None)


@pytest.mark.parametrize(("cases", "refusal"), [
    ([(2, 0), (3, 1)], "--num_processes is 2 in process 0 and 3 in process 1"),
    ([(3, 1), (2, 0)], "--num_processes is 2 in process 0 and 3 in process 1"),
    ([(3, 0), (2, 1)], "--num_processes is 3 in process 0 and 2 in process 1"),
    ([(3, 0), (3, 1), (2, 1)], "--num_processes is 3 in process 0 and 2 in process 1"),
    ([(3, 0), (3, 1), (3, 1)], "two processes with --process_id=1 connected to localhost:"),
    ([(2, 0), (2, 0)], "two processes with --process_id=0 connected to localhost:"),
])
def test_processes_that_are_no_job_are_refused_at_once(quick_rendezvous, cases, refusal):
    for said, seconds in meet_all(cases, pause=0.02):
        assert refusal in said
        assert seconds < 4


def test_who_comes_after_a_refusal_is_told_the_same(quick_rendezvous, monkeypatch):
    monkeypatch.setattr(rendezvous, "LINGER", 1.0)
    *_, (said, seconds) = meet_all([(3, 0), (2, 1), (3, 2)], pause=0.4)
    assert "--num_processes is 3 in process 0 and 2 in process 1" in said
    assert seconds < 1


def test_a_late_process_is_waited_for_and_a_missing_one_is_named(quick_rendezvous):
    assert [said for said, _ in meet_all([(3, 2), (3, 0), (3, 1)], pause=0.3)] == ["", "", ""]
    for said, seconds in meet_all([(3, 0), (3, 1)], timeout=1.0):
        assert re.fullmatch(r"process 0 waited 1 s at localhost:\d+ for 3 processes, and these did not connect: 2: start them all, .*", said)
        assert seconds < 2
    (said, _), = meet_all([(2, 1)], timeout=0.5)
    assert re.fullmatch(r"process 1 waited 0.5 s at localhost:\d+ for 2 processes: start them all, with the address .*", said)


def test_a_process_that_was_killed_and_started_again_while_the_others_waited_is_welcome(quick_rendezvous):
    port, found = free_port(), []
    first = threading.Thread(target=lambda: found.append(rendezvous.meet(f"localhost:{port}", 3, 0, 10)))
    first.start()
    time.sleep(0.3)
    with socket.create_connection(("localhost", port)) as killed:
        killed.sendall(b'{"num_processes": 3, "process_id": 1}\n')
        time.sleep(0.3)
    again = threading.Thread(target=lambda: found.append(rendezvous.meet(f"localhost:{port}", 3, 1, 10)))
    again.start()
    rendezvous.meet(f"localhost:{port}", 3, 2, 10)
    first.join()
    again.join()
    assert found == [None, None]


@pytest.mark.parametrize("greeting", [b"", b"HTTP/1.0 400 Bad Request\r\n"])
def test_a_port_of_another_program_is_refused(monkeypatch, greeting):
    monkeypatch.setattr(rendezvous, "SILENCE", 0.5)
    with socket.create_server(("", 0)) as other:
        address = f"localhost:{other.getsockname()[1]}"

        def answer():
            with contextlib.suppress(OSError):
                while True:
                    connections.append(other.accept()[0])
                    connections[-1].sendall(greeting)

        connections = []
        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(UserError, match=r"of this machine is taken by another program or another job: choose a free port"):
            rendezvous.meet(address, 2, 0, 20)
        with pytest.raises(UserError, match=r"is not answered by process 0 of this job but by another program"):
            rendezvous.meet(address, 2, 1, 20)
        for connection in connections:
            connection.close()


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    """{what is wrong: [(status, standard error)] of processes 0 and 1 of launch.train}, and the seconds it took."""
    folder, begin = tmp_path_factory.mktemp("refused"), time.monotonic()
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        taken = [start_train(port, 2, number, folder) for number in (0, 1)]
        port = free_port()
        differ = [start_train(port, count, number, folder) for number, count in enumerate((2, 3))]
        port = free_port()
        alone = [start_train(port, 3, number, folder, "--join_timeout=5") for number in (0, 1)]
        found = {"taken": ends(taken), "differ": ends(differ), "missing": ends(alone)}
    assert not any(folder.iterdir())
    return found, time.monotonic() - begin


@pytest.mark.parametrize(("case", "lines"), [
    ("taken", (r"port \d+ of this machine is taken by another program", "is not answered by process 0 of this job but by another program")),
    ("differ", (r"--num_processes is 2 in process 0 and 3 in process 1",) * 2),
    ("missing", (r"waited 5 s at localhost:\d+ for 3 proc",) * 2),
])
def test_programs_that_cannot_meet_end_with_one_line(refused, case, lines):
    for (status, error), line in zip(refused[0][case], lines, strict=True):
        assert status == 2
        assert re.fullmatch(f"error: .*{line}.*", error), error  # one line


def test_programs_that_cannot_meet_end_soon(refused):
    assert refused[1] < 10 + 20  # and the imports of six programs


@pytest.mark.parametrize(("arguments", "message"), [
    (("localhost:1", None, 0), "--num_processes is missing"), (("localhost:1", 2, 2), "--process_id=2"),
    *(((address, 2, 0), "expected HOST:PORT of process 0, with a port from 1 to 65535") for address in (
        "localhost", "localhost:", ":1234", "localhost:0", "localhost:99999", "localhost:abc", "localhost:-1", "::1:80", "", "a b:80")),
])
def test_how_to_meet_is_given_whole_or_not_at_all(arguments, message):
    with pytest.raises(UserError, match=message):
        job.join(*arguments, timeout=1)


def test_an_address_is_split():
    assert rendezvous.split("host-1.example:8080") == ("host-1.example", 8080)
    assert rendezvous.split("[::1]:8080") == ("::1", 8080)


def test_ctrl_c_to_a_whole_job_stops_it_at_one_step():
    job = start_small(2)
    begin = time.monotonic()
    for process in job:  # as a terminal does
        process.send_signal(signal.SIGINT)
    found = [(*process.communicate(timeout=60), process.returncode) for process in job]
    assert time.monotonic() - begin < 10
    assert {(error, status) for _, error, status in found} == {("", 0)}
    stopped, = {said.splitlines()[-1] for said, *_ in found}
    assert re.fullmatch(r"stopped at step \d+", stopped)


def test_the_death_of_process_0_ends_the_others():
    job = start_small(3)
    job[0].kill()
    begin = time.monotonic()
    (_, own), *others = ends(job)
    assert time.monotonic() - begin < 4 + 10
    assert own == "error: process 0 died: it was killed, or crashed; the last checkpoint is intact: start all again with the same command"
    assert_stopped(others)


def test_a_hang_of_one_process_ends_the_others_and_itself_when_it_wakes():
    job = start_small(3)
    job[2].send_signal(signal.SIGSTOP)
    begin = time.monotonic()
    assert_stopped(ends(job[:2]))
    assert time.monotonic() - begin < 4 + 10
    job[2].send_signal(signal.SIGCONT)
    assert_stopped(ends(job[2:], timeout=15))


def test_an_exception_in_one_process_is_shown_there_and_ends_the_others():
    job = start_small(3, "--fails=1", heartbeat=60)
    begin = time.monotonic()
    first, (status, error), last = ends(job)
    assert time.monotonic() - begin < 30
    assert_stopped([first, last])
    assert status == 1
    assert error.startswith("Traceback")
    assert error.splitlines()[-2:] == ["IndexError: this process fails",
                                       "error: process 1 failed (see the traceback); the last checkpoint is intact"]


def test_the_pages_of_the_coordination_service_are_left_out():
    """All else that C++ writes is passed on; the pages are those of jax 0.10.2, cut in pieces as a pipe may cut them."""
    page = (b"W1127 02:30:08.450651    9862 xla.cc:1] kept\n and its second line\n"
            b"E1127 02:30:08.450651    9862 coordination_service_agent.cc:289] Polled an error from coordination service.\ngone\n"
            b"E1127 02:30:08.450651    9862 cuda.cc:2] kept\nplain\n"
            b"F1127 02:30:08.450802    9862 client.h:80] Terminating process because the JAX distributed service detected fatal errors.\n"
            b"*** Check failure stack trace: ***\n    @ 0x7f E1127 02:30:08.450651 SetError()\n")
    expected = (b"W1127 02:30:08.450651    9862 xla.cc:1] kept\n and its second line\nE1127 02:30:08.450651    9862 cuda.cc:2] kept\n"
                b"plain\n")
    for size in (7, len(page)):
        written = []
        errors = watchdog.Filter(written.append)
        for start_of_piece in range(0, len(page), size):
            errors.feed(page[start_of_piece : start_of_piece + size])
        errors.close()
        assert b"".join(written) == expected
        assert errors.aborted


class Device:
    def __init__(self, process_index):
        self.process_index = process_index


@pytest.mark.parametrize(("process", "shape", "expected"), [
    ([0, 0, 1, 1], (4, 1, 1, 1), (0, 2)), ([0, 0, 1, 1], (2, 1, 2, 1), (0, 2)), ([1, 1, 0, 0], (2, 1, 2, 1), (1, 2)),
    ([0, 0, 1, 1], (1, 1, 4, 1), (0, 1)), ([0, 1, 2, 3], (1, 2, 2, 1), (0, 2)), ([2, 3, 0, 1], (1, 2, 1, 2), (1, 2)),
])
def test_processes_that_hold_the_same_examples_read_the_same_share(process, shape, expected):
    mesh = Mesh(np.array([Device(i) for i in process]).reshape(shape), sharding.AXES)
    assert sharding.share(mesh) == expected


def test_shares_that_overlap_are_refused():
    mesh = Mesh(np.array([Device(i) for i in (0, 0, 0, 1, 1, 1)]).reshape(3, 1, 2, 1), sharding.AXES)
    with pytest.raises(UserError, match="splits the examples of one process"):
        sharding.share(mesh)


def test_interrupts_are_passed_on_only_while_training():
    before = signal.getsignal(signal.SIGINT)
    for _ in range(2):  # one run after the other
        job._pass_on_interrupts()
        job._pass_on_interrupts()
        assert signal.getsignal(signal.SIGINT) != before
        job.restore_interrupts()
        assert signal.getsignal(signal.SIGINT) == before
    job.restore_interrupts()
    assert signal.getsignal(signal.SIGINT) == before


@rehearsal
def test_a_run_moves_over_processes_and_devices(alone, tmp_path):
    """4 processes with 8 devices, then one with 2 and with 8, train as one with 4 does from start to end."""
    for count, devices, stop in ((4, 2, 3), (1, 2, 7), (1, 8, None)):
        job = Job(tmp_path / "moved", count, devices)
        if stop:
            job.read_until(rf"step ({'|'.join(map(str, range(stop, 13)))})/")  # a stop is agreed on some steps later
            job.processes[-1].send_signal(signal.SIGTERM)
        ends = job.end()
        assert [status for status, *_ in ends] == [0] * count, ends
    whole, moved = losses(alone), losses(tmp_path / "moved")
    assert list(whole) == list(moved)
    np.testing.assert_allclose(list(moved.values()), list(whole.values()), rtol=1e-5, atol=1e-6)  # float32 sums in another order
