"""A job of several processes: how they meet, agree and part. One process needs none of this, and every function here does nothing then.

How long a job lasts in every bad case, and how each process ends, with one line on standard error:
- started differently, a number given twice, the port taken: status 2 within 10 s of the last process's start;
- a process that does not come: status 2 after `timeout` seconds (--join_timeout) and at most CONNECT more;
- a process that dies or hangs: status 1 or -6 (SIGABRT, from jax's runtime) within `heartbeat` seconds (--heartbeat_timeout) and 10 more;
  a hung one that wakes up ends likewise, at once. It cannot save: a save, as every step, takes part of all processes, and these are gone;
- SIGTERM or SIGINT to one or all: all agree on a step within 2 s, save there and end with --stop_status.
"""

import atexit
import contextlib
import faulthandler
import functools
import glob
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.extend import backend

from ntm_jax.errors import UserError, first_line
from ntm_jax.runtime import last_word, meeting

CONNECT = 30  # seconds in which jax connects processes that have met
GRACE = 1  # seconds for which process 0 outlives a mistake: the others, which end with it, may be about to find the same one


def join(coordinator_address: str | None, num_processes: int | None, process_id: int | None, timeout: int = 300, heartbeat: int = 60):
    """Joins the job's processes: by the three arguments, else as a TPU host's environment says, else not at all.

    timeout: seconds that all wait for the last to come. heartbeat: seconds after which a silent process counts as dead.
    UserError where an argument is missing or wrong, or where the processes were started differently (meeting.meet). Where the others do
    not come: one line and exit status 2.
    """
    given = {"coordinator_address": coordinator_address, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < 3:
        raise UserError(f"--{missing[0]} is missing: give --coordinator_address, --num_processes and --process_id together, or none")
    if missing and not _on_tpu():
        return
    if not missing:
        meeting.split(coordinator_address)
        if not 0 <= process_id < num_processes:
            raise UserError(f"--process_id={process_id} --num_processes={num_processes}: expected a number from 0 to num_processes - 1")
        meeting.meet(coordinator_address, num_processes, process_id, timeout)
    _connect(given, timeout if missing else CONNECT, heartbeat)
    _start_last_word(heartbeat)


def _connect(given: dict, seconds: int, heartbeat: int):
    """jax.distributed.initialize; exits with a line after `seconds`."""
    # jax aborts the process when its own time is up, so a clock of ours speaks first.
    clock = threading.Timer(seconds, leave, (
        2, f"error: the processes of this job did not connect in {seconds} s: start them all, or give more --join_timeout"))
    clock.daemon = True
    clock.start()
    try:
        jax.distributed.initialize(**given, initialization_timeout=seconds + 60, heartbeat_timeout_seconds=heartbeat)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the processes of this job could not connect ({first_line(error)})") from None
    finally:
        clock.cancel()


def _on_tpu() -> bool:
    # Without libtpu these devices are another's: any machine that passes hardware on has a /dev/vfio.
    return (os.environ.get("JAX_PLATFORMS", "tpu") == "tpu" and importlib.util.find_spec("libtpu") is not None
            and bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")))


_GONE = "another process of this job is gone; the last checkpoint is whole: start all again with the same command"
_watcher = None  # the program last_word beside this process


def _start_last_word(heartbeat: int):
    """Starts last_word.py beside this process: when another process of the job is gone, jax's runtime aborts this one with a page."""
    global _watcher
    faulthandler.disable()  # a page of threads would bury the line
    me = f"error: process {jax.process_index()}"
    lines = (f"{me} stopped: {_GONE} (it died, or was silent for {heartbeat} s)",
             f"{me} died: it was killed, or crashed; the last checkpoint is whole: start all again with the same command")
    reader, writer = os.pipe()
    _watcher = subprocess.Popen([sys.executable, "-S", last_word.__file__, str(reader), *lines], stdin=subprocess.PIPE, text=True,
                                pass_fds=[reader], start_new_session=True)
    os.close(reader)
    # C++ writes to descriptor 2, into the pipe; Python keeps the terminal or file that it was.
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, encoding=sys.stderr.encoding, errors=sys.stderr.errors)
    os.dup2(writer, 2)
    os.close(writer)
    atexit.register(_part)


def _part():
    """At the end of the program, before jax's own: the last wait for the other processes, one of which may die in it."""
    try:
        backend.clear_backends()
        jax.distributed.shutdown()
    except Exception as error:
        leave(1, _stopped(error))
    _dismiss(last_word.QUIET)


def _dismiss(line: str):
    """Has last_word.py print `line`, or nothing for QUIET, and waits for its end."""
    with contextlib.suppress(OSError, ValueError):
        _watcher.communicate(line)


def leave(status: int, message: str) -> None:
    """Ends this process with a line and a status, at once: an orderly end would wait for the others of the job."""
    sys.stdout.flush()
    sys.stderr.flush()
    if status == 2 and joined() and jax.process_index() == 0:
        time.sleep(GRACE)
    if _watcher:
        _dismiss(message)
    else:
        print(message, file=sys.stderr, flush=True)
    os._exit(status)


def fail(error: Exception) -> None:
    """Ends this process at once with status 1: with one line if the error is what the runtime raises when another process of the job is
    gone, else with the traceback and a line."""
    if isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error):
        leave(1, _stopped(error))
    traceback.print_exception(error)
    leave(1, f"error: process {jax.process_index()} failed (see the traceback); the last checkpoint is whole")


def _stopped(error: Exception) -> str:
    return f"error: process {jax.process_index()} stopped: {_GONE} ({first_line(error)})"


def joined() -> bool:
    """Whether this process is one of a job of several."""
    return _watcher is not None and several()


def several() -> bool:
    return jax.process_count() > 1


def agree(settings: dict) -> None:
    """UserError in every process if one was started with other settings, {key: JSON value}, naming the first key that differs."""
    if not several():
        return
    mine = json.dumps(settings, sort_keys=True).encode()
    sizes = multihost_utils.process_allgather(np.int32(len(mine)))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(mine)] = np.frombuffer(mine, np.uint8)
    first, *others = (json.loads(bytes(row[:size])) for row, size in zip(multihost_utils.process_allgather(padded), sizes, strict=True))
    for number, other in enumerate(others, 1):
        for key in sorted(first | other):
            if first.get(key) != other.get(key):
                raise UserError(f"the processes of this job differ: {key} is {first.get(key)!r} in process 0 and {other.get(key)!r} in "
                                f"process {number}: start all with the same command")


def stop_agreed(step: int) -> bool:
    """Whether all processes stop at this step because one was sent SIGTERM or SIGINT; every process asks at every step."""
    if not several():
        return False
    _pass_on_interrupts()
    return multihost_utils.reached_preemption_sync_point(step)


@functools.cache
def _pass_on_interrupts():
    """From now on the first SIGINT counts as SIGTERM, which jax tells all processes; a second one raises KeyboardInterrupt."""

    def interrupted(*_):
        signal.signal(signal.SIGINT, before)
        os.kill(os.getpid(), signal.SIGTERM)

    with contextlib.suppress(ValueError):  # not the main thread: the caller keeps its signals
        before = signal.signal(signal.SIGINT, interrupted)
