"""Starts, coordinates and ends the processes of a job. A single process needs none of this.

How a job ends, with one line on standard error from each process:

- The processes differ, two have one number, or the port is taken: status 2, within 10 s of the last
  process's start (rendezvous.py).
- A process is missing: status 2, after --join_timeout and at most CONNECT seconds more.
- A process dies or hangs: the others exit with status 1, or -6 (SIGABRT) if jax's runtime aborts
  them, within --heartbeat_timeout and 10 s more. A hung process that resumes exits likewise within
  seconds. It cannot save, since every step and every save needs all processes. Its lock on the
  workdir (workdir.py) keeps a restarted job out until it has ended.
- A process raises an exception: it prints the traceback and exits at once with status 1. The others
  exit as above.
- One or all receive SIGTERM or SIGINT while they train: they agree on a step within about 2 s, save
  it and exit with --stop_status. A second SIGINT ends the process at once with status 130.
"""

import atexit
import contextlib
import faulthandler
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
from ntm_jax.runtime.processes import rendezvous, watchdog

CONNECT = 30  # seconds for jax to connect the processes once all are present
GRACE = 1  # seconds that process 0 waits for the others to find the same mistake
_AGAIN = "the last checkpoint is intact: start all again with the same command"
_GONE = f"another process of this job is gone; {_AGAIN}"
_watchdog: subprocess.Popen | None = None  # the process of watchdog.py
_previous_handler = None  # of SIGINT, replaced while this process trains
_name = "this process"  # "process 3" once it has joined


def join(coordinator_address: str | None, num_processes: int | None, process_id: int | None,
         timeout: int = 300, heartbeat: int = 60) -> None:
    """Joins the job's processes by the three arguments, or by a TPU host's environment.

    Does nothing for a single process outside a TPU host. timeout: seconds to wait for all
    processes. heartbeat: seconds after which a silent process counts as dead.

    Raises UserError if an argument is missing or wrong, if the processes' arguments differ, or if a
    process is missing.
    """
    given = {"coordinator_address": coordinator_address, "num_processes": num_processes,
             "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < 3:
        raise UserError(f"--{missing[0]} is missing: give --coordinator_address, --num_processes "
                        "and --process_id together, or none")
    if coordinator_address is None or num_processes is None or process_id is None:  # all are
        if not _on_tpu():
            return
        _connect(given, timeout, heartbeat)
        process_id = jax.process_index()
    else:
        rendezvous.split(coordinator_address)
        if not 0 <= process_id < num_processes:
            raise UserError(f"--process_id={process_id} --num_processes={num_processes}: expected "
                            "a number from 0 to num_processes - 1")
        rendezvous.meet(coordinator_address, num_processes, process_id, timeout)
        # Under Slurm jax would otherwise give each process one of its node's GPUs.
        _connect(given | {"cluster_detection_method": "deactivate"}, CONNECT, heartbeat)
    _start_watchdog(process_id, heartbeat)


def _on_tpu() -> bool:
    # Without libtpu, /dev/vfio may hold other hardware that a host passes to this machine.
    return ("tpu" in (os.environ.get("JAX_PLATFORMS") or "tpu").split(",")
            and importlib.util.find_spec("libtpu") is not None
            and bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")))


def _connect(given: dict, seconds: int, heartbeat: int) -> None:
    """Calls jax.distributed.initialize; exits with a line after `seconds`."""
    # jax aborts the process at its own timeout, so this timer ends it first.
    timer = threading.Timer(seconds, leave, (
        2, f"error: the processes of this job did not connect in {seconds} s: start them all, or "
           "give more --join_timeout"))
    timer.daemon = True
    timer.start()
    # CPUs may run two programs at once, each in another order in another process. Where their
    # collectives wait for each other, the job hangs.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        jax.distributed.initialize(**given, initialization_timeout=seconds + 60,
                                   heartbeat_timeout_seconds=heartbeat)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the processes of this job could not connect ({first_line(error)})") from None
    finally:
        timer.cancel()


def _start_watchdog(number: int, heartbeat: int) -> None:
    """Starts watchdog.py, because jax's runtime aborts this process when another is gone."""
    global _watchdog, _name
    faulthandler.disable()  # its page of threads would bury the line
    _name = f"process {number}"
    gone = f"error: {_name} stopped: {_GONE} (it died, or was silent for {heartbeat} s)"
    died = f"error: {_name} died: it was killed, or crashed; {_AGAIN}"
    reader, writer = os.pipe()
    _watchdog = subprocess.Popen(
        [sys.executable, "-S", watchdog.__file__, str(reader), gone, died],
        stdin=subprocess.PIPE, pass_fds=[reader], start_new_session=True)
    os.close(reader)
    # C++ writes to descriptor 2, which becomes the pipe; Python keeps the terminal or file.
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, encoding=sys.stderr.encoding,
                           errors=sys.stderr.errors)
    os.dup2(writer, 2)
    os.close(writer)
    atexit.register(_disconnect)


def _disconnect() -> None:
    """Waits for the other processes at the program's end, before jax's own exit handler.

    One of them may die meanwhile.
    """
    try:
        backend.clear_backends()
        jax.distributed.shutdown()
    except Exception as error:
        leave(1, _stopped(error))
    _end_watchdog(watchdog.QUIET)


def _end_watchdog(line: str) -> None:
    """Makes watchdog.py print `line`, or nothing for QUIET, and waits for it to exit."""
    assert _watchdog is not None
    with contextlib.suppress(OSError, ValueError):
        _watchdog.communicate(line.encode(errors="backslashreplace"))


def leave(status: int, message: str) -> None:
    """Exits at once, with a line on standard error. An orderly exit would wait for the others."""
    sys.stdout.flush()
    sys.stderr.flush()
    if status == 2 and _name == "process 0":
        time.sleep(GRACE)  # jax aborts the others as soon as process 0 ends
    if _watchdog:
        _end_watchdog(message)
    else:
        print(message, file=sys.stderr, flush=True)
    os._exit(status)


def fail(error: Exception) -> None:
    """Exits at once with status 1 and a line that reports an exception.

    Prints the traceback too, unless the runtime raised it because another process is gone.
    """
    if isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error):
        leave(1, _stopped(error))
    traceback.print_exception(error)
    leave(1, f"error: {_name} failed (see the traceback); the last checkpoint is intact")


def _stopped(error: Exception) -> str:
    return f"error: {_name} stopped: {_GONE} ({first_line(error)})"


def joined() -> bool:
    """Whether this process has joined a job."""
    return _watchdog is not None


def several() -> bool:
    """Whether the job has more than one process."""
    return jax.process_count() > 1


def agree(settings: dict) -> None:
    """Checks that all processes have the same settings, {key: JSON value}.

    Raises UserError in every process otherwise, naming the first key that differs.
    """
    if not several():
        return
    mine = json.dumps(settings, sort_keys=True).encode()
    sizes = multihost_utils.process_allgather(np.int32(len(mine)))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(mine)] = np.frombuffer(mine, np.uint8)
    rows = multihost_utils.process_allgather(padded)
    first, *others = (json.loads(bytes(row[:size])) for row, size in zip(rows, sizes, strict=True))
    for number, other in enumerate(others, 1):
        for key in sorted(first | other):
            if first.get(key) != other.get(key):
                raise UserError(
                    f"the processes of this job differ: {key} is {first.get(key)!r} in process 0 "
                    f"and {other.get(key)!r} in process {number}: start all with the same command")


def stop_agreed(step: int) -> bool:
    """Whether all processes stop at this step because one received SIGTERM or SIGINT.

    Every process must call this at every step.
    """
    if not several():
        return False
    _pass_on_interrupts()
    return multihost_utils.reached_preemption_sync_point(step)


def _pass_on_interrupts() -> None:
    """Turns the first SIGINT from now on into SIGTERM, which jax reports to the other processes.

    A second SIGINT raises KeyboardInterrupt as before.
    """
    global _previous_handler
    if _previous_handler is not None:
        return

    def interrupted(*_):
        signal.signal(signal.SIGINT, _previous_handler)
        os.kill(os.getpid(), signal.SIGTERM)

    with contextlib.suppress(ValueError):  # outside the main thread, signals stay the caller's
        _previous_handler = signal.signal(signal.SIGINT, interrupted)


def restore_interrupts() -> None:
    """Restores SIGINT's handler, once no training step is left at which all could stop."""
    global _previous_handler
    if _previous_handler is not None:
        signal.signal(signal.SIGINT, _previous_handler)
        _previous_handler = None
