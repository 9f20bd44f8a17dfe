"""How processes join a job, and how they all end when one is interrupted, dies, hangs or fails."""

import re
import signal
import socket
import time

import pytest

from ntm_jax.errors import UserError
from ntm_jax.runtime.processes import job
from tests.common import python
from tests.runtime.processes.common import assert_ended_by_another, ends, free_port, start


@pytest.mark.parametrize(("arguments", "message"), [
    (("localhost:1", None, 0), "--num_processes is missing"),
    (("localhost:1", 2, 2), "--process_id=2"),
    *(((address, 2, 0), "expected HOST:PORT of process 0, with a port from 1 to 65535")
      for address in ("localhost", "localhost:", ":1234", "localhost:0", "localhost:99999",
                      "localhost:abc", "localhost:-1", "::1:80", "", "a b:80")),
])
def test_arguments_that_are_missing_or_wrong_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        job.join(*arguments, timeout=1)


def start_train(port, count, number, folder, *flags):
    """One process of launch.train."""
    return start("launch.train", port, count, number, "--config=experiments/digits.py",
                 f"--workdir={folder}/run", *flags)


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    """What processes 0 and 1 of launch.train end with, and the seconds that it took.

    {what is wrong: [(status, standard error)]}
    """
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
    ("taken", (r"port \d+ of this machine is taken by another program",
               "is not answered by process 0 of this job but by another program")),
    ("differ", (r"--num_processes is 2 in process 0 and 3 in process 1",) * 2),
    ("missing", (r"waited 5 s at localhost:\d+ for 3 proc",) * 2),
])
def test_programs_that_cannot_meet_end_with_one_line(refused, case, lines):
    for (status, error), line in zip(refused[0][case], lines, strict=True):
        assert status == 2
        assert re.fullmatch(f"error: .*{line}.*", error), error  # one line


def test_programs_that_cannot_meet_end_soon(refused):
    assert refused[1] < 60  # by default they wait 300 s for each other


def start_small(count, *flags, heartbeat=4):
    """The processes of a job that only steps, after 5 steps together or after they have ended."""
    port = free_port()
    processes = [start("tests.campaigns.processes", port, count, number,
                       f"--heartbeat_timeout={heartbeat}", *flags) for number in range(count)]
    for line in processes[0].stdout:
        if line.startswith("step 5/"):
            break
    return processes


def test_ctrl_c_stops_all_processes_at_one_step():
    processes = start_small(2)
    begin = time.monotonic()
    for process in processes:  # as a terminal does
        process.send_signal(signal.SIGINT)
    found = [(*process.communicate(timeout=60), process.returncode) for process in processes]
    assert time.monotonic() - begin < 10
    assert {(error, status) for _, error, status in found} == {("", 0)}
    stopped, = {said.splitlines()[-1] for said, *_ in found}
    assert re.fullmatch(r"stopped at step \d+", stopped)


def test_the_death_of_process_0_ends_the_others():
    processes = start_small(3)
    processes[0].kill()
    begin = time.monotonic()
    (_, own), *others = ends(processes)
    assert time.monotonic() - begin < 4 + 10
    assert own == ("error: process 0 died: it was killed, or crashed; the last checkpoint is "
                   "intact: start all again with the same command")
    assert_ended_by_another(others)


@pytest.mark.slow
def test_a_hang_of_one_process_ends_the_other_and_itself_when_it_wakes():
    processes = start_small(2)
    processes[1].send_signal(signal.SIGSTOP)
    begin = time.monotonic()
    assert_ended_by_another(ends(processes[:1]))
    assert time.monotonic() - begin < 4 + 10
    processes[1].send_signal(signal.SIGCONT)
    assert_ended_by_another(ends(processes[1:], timeout=15))


def test_an_exception_in_one_process_is_shown_there_and_ends_the_others():
    processes = start_small(3, "--fails=1", heartbeat=60)
    begin = time.monotonic()
    first, (status, error), last = ends(processes)
    assert time.monotonic() - begin < 30
    assert_ended_by_another([first, last])
    assert status == 1
    assert error.startswith("Traceback")
    assert error.splitlines()[-2:] == [
        "IndexError: this process fails",
        "error: process 1 failed (see the traceback); the last checkpoint is intact"]


def test_a_process_under_slurm_has_all_gpus_of_its_node():
    code = ("import jax; from ntm_jax.runtime.processes import job; "
            f"job.join('localhost:{free_port()}', 1, 0); "
            "print(jax.config._read('jax_cuda_visible_devices'))")
    slurm = {"JOB_ID": "7", "STEP_NODELIST": "localhost", "STEP_NUM_TASKS": "1", "NTASKS": "1",
             "PROCID": "0", "LOCALID": "0"}
    done = python("-c", code, **{f"SLURM_{name}": value for name, value in slurm.items()})
    assert done.stdout.strip() == "all"  # not "0"


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
