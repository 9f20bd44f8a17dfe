"""A job of several processes: how they meet, agree and part. One process needs none of this, and every function here does nothing then."""

import atexit
import contextlib
import faulthandler
import glob
import importlib.util
import json
import os
import subprocess
import sys
import threading

import jax
import numpy as np
from jax.experimental import multihost_utils

from ntm_jax.errors import UserError, first_line


def join(coordinator_address: str | None, num_processes: int | None, process_id: int | None, timeout: int = 300, heartbeat: int = 60):
    """Joins the job's processes: by the three arguments, else as a TPU host's environment says, else not at all.

    timeout: seconds that all wait for the last to come. heartbeat: seconds after which a silent process counts as dead.
    UserError where an argument is missing. Where the others do not come: one line and exit status 2.
    """
    given = {"coordinator_address": coordinator_address, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < 3:
        raise UserError(f"--{missing[0]} is missing: give --coordinator_address, --num_processes and --process_id together, or none")
    if missing and not _on_tpu():
        return
    if not missing and not (0 <= process_id < num_processes and ":" in coordinator_address):
        raise UserError(f"--process_id={process_id} --num_processes={num_processes} --coordinator_address={coordinator_address}: expected "
                        "a number from 0 to num_processes - 1, and HOST:PORT of process 0")
    # The client aborts the process when its own time is up, so a clock of ours speaks first.
    clock = threading.Timer(timeout, leave, (
        2, f"error: process {process_id} waited {timeout} s at {coordinator_address} for {num_processes} processes: start them all, with "
           "the address of process 0, or give more --join_timeout"))
    clock.daemon = True
    clock.start()
    try:
        jax.distributed.initialize(**given, initialization_timeout=timeout + 60, heartbeat_timeout_seconds=heartbeat)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the processes of this job could not meet ({first_line(error)})") from None
    finally:
        clock.cancel()
    _leave_a_last_word()


def _on_tpu() -> bool:
    # Without libtpu these devices are another's: any machine that passes hardware on has a /dev/vfio.
    return (os.environ.get("JAX_PLATFORMS", "tpu") == "tpu" and importlib.util.find_spec("libtpu") is not None
            and bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")))


_GONE = "another process of this job is gone; the last checkpoint is whole: start all again with the same command"
_witness = None


def _leave_a_last_word():
    """A process that says what happened where this one cannot: the runtime aborts it when another of the job dies."""
    global _witness
    faulthandler.disable()  # a page of threads would bury the line
    line = f"error: process {jax.process_index()} was cut off: it died, or {_GONE}"
    _witness = subprocess.Popen([sys.executable, "-S", "-c", "import sys; sys.stdin.read() or print(sys.argv[1], file=sys.stderr)", line],
                                stdin=subprocess.PIPE, text=True, start_new_session=True)
    atexit.register(_dismiss)


def _dismiss():
    with contextlib.suppress(OSError, ValueError):
        _witness.communicate("left in order")


def leave(status: int, message: str) -> None:
    """Ends this process with a line and a status, at once: an orderly end would wait for the others of the job."""
    print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    if _witness:
        _dismiss()
    os._exit(status)


def end_if_another_died(error: Exception) -> None:
    """Ends this process with a line if the error is what the runtime raises when another process of the job is gone."""
    if several() and isinstance(error, jax.errors.JaxRuntimeError):
        cause = (str(error).splitlines() or [""])[0][:200]
        leave(1, f"error: process {jax.process_index()} stopped: {_GONE} ({cause})")


def joined() -> bool:
    """Whether this process is one of a job of several."""
    return _witness is not None and several()


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
    """Whether all processes stop at this step because one of them was sent SIGTERM; every process asks at every step."""
    return several() and multihost_utils.reached_preemption_sync_point(step)
