"""How the processes of a job meet, agree and part. With one process, nothing happens here.

How a job ends in every bad case, each process with one line on standard error:

- Started differently, a number given twice, a port that is taken: status 2, within 10 s of the last
  process's start (meeting.py).
- A process does not come: status 2, after --join_timeout and at most CONNECT seconds more.
- A process dies or hangs: the others end with status 1, or -6 (SIGABRT) where jax's runtime ends
  them, within --heartbeat_timeout and 10 s more. A hung process that wakes ends likewise within
  seconds. It cannot save: every step and every save needs all processes. Its lock on the workdir
  (workdir.py) keeps a restarted job out until it has ended.
- A process raises an exception: it shows the traceback and ends at once with status 1, the others
  as above.
- SIGTERM or SIGINT to one or all while they train: all agree on a step within about 2 s, save it
  and end with --stop_status. A second SIGINT ends the process at once with status 130.
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
from ntm_jax.runtime.processes import last_word, meeting

CONNECT = 30  # seconds in which jax connects processes that have met
GRACE = 1  # seconds for which process 0 outlives a mistake that the others are about to find too
_AGAIN = "the last checkpoint is whole: start all again with the same command"
_GONE = f"another process of this job is gone; {_AGAIN}"
_watcher = None  # the program last_word.py beside this process
_interrupts_before = None  # the handler of SIGINT while training passes it on
_name = "this process"  # "process 3" once it is known


def join(coordinator_address: str | None, num_processes: int | None, process_id: int | None,
         timeout: int = 300, heartbeat: int = 60) -> None:
    """Joins the job's processes by the three arguments, or as a TPU host's environment says.

    Does nothing where neither is given. timeout: seconds that all wait for the last to come.
    heartbeat: seconds after which a silent process counts as dead. UserError where an argument is
    missing or wrong, where the processes were started differently or where one does not come.
    """
    given = {"coordinator_address": coordinator_address, "num_processes": num_processes,
             "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < 3:
        raise UserError(f"--{missing[0]} is missing: give --coordinator_address, --num_processes "
                        "and --process_id together, or none")
    if missing and not _on_tpu():
        return
    if not missing:
        meeting.split(coordinator_address)
        if not 0 <= process_id < num_processes:
            raise UserError(f"--process_id={process_id} --num_processes={num_processes}: expected "
                            "a number from 0 to num_processes - 1")
        meeting.meet(coordinator_address, num_processes, process_id, timeout)
    _connect(given, timeout if missing else CONNECT, heartbeat)
    _start_last_word(jax.process_index() if missing else process_id, heartbeat)


def _on_tpu() -> bool:
    # Without libtpu these devices are another's: any machine that passes hardware on has /dev/vfio.
    return (os.environ.get("JAX_PLATFORMS", "tpu") == "tpu"
            and importlib.util.find_spec("libtpu") is not None
            and bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")))


def _connect(given: dict, seconds: int, heartbeat: int) -> None:
    """jax.distributed.initialize; exits with a line after `seconds`."""
    # jax aborts the process when its own time is up, so a clock of ours ends it first.
    clock = threading.Timer(seconds, leave, (
        2, f"error: the processes of this job did not connect in {seconds} s: start them all, or "
           "give more --join_timeout"))
    clock.daemon = True
    clock.start()
    try:
        jax.distributed.initialize(**given, initialization_timeout=seconds + 60,
                                   heartbeat_timeout_seconds=heartbeat)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the processes of this job could not connect ({first_line(error)})") from None
    finally:
        clock.cancel()


def _start_last_word(number: int, heartbeat: int) -> None:
    """Starts last_word.py: jax's runtime aborts this process, with a page, when another is gone."""
    global _watcher, _name
    faulthandler.disable()  # a page of threads would bury the line
    _name = f"process {number}"
    gone = f"error: {_name} stopped: {_GONE} (it died, or was silent for {heartbeat} s)"
    died = f"error: {_name} died: it was killed, or crashed; {_AGAIN}"
    reader, writer = os.pipe()
    _watcher = subprocess.Popen(
        [sys.executable, "-S", last_word.__file__, str(reader), gone, died],
        stdin=subprocess.PIPE, pass_fds=[reader], start_new_session=True)
    os.close(reader)
    # Descriptor 2, to which C++ writes, becomes the pipe; Python keeps the terminal or file.
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, encoding=sys.stderr.encoding,
                           errors=sys.stderr.errors)
    os.dup2(writer, 2)
    os.close(writer)
    atexit.register(_part)


def _part() -> None:
    """At the program's end, before jax's own exit: waits for the others, of which one may die."""
    try:
        backend.clear_backends()
        jax.distributed.shutdown()
    except Exception as error:
        leave(1, _stopped(error))
    _dismiss(last_word.QUIET)


def _dismiss(line: str) -> None:
    """Has last_word.py print `line`, or nothing for QUIET, and waits for its end."""
    with contextlib.suppress(OSError, ValueError):
        _watcher.communicate(line.encode(errors="backslashreplace"))


def leave(status: int, message: str) -> None:
    """Ends this process at once with a line and a status: an orderly end waits for the others."""
    sys.stdout.flush()
    sys.stderr.flush()
    if status == 2 and _name == "process 0":
        time.sleep(GRACE)  # the others are aborted as soon as process 0 ends
    if _watcher:
        _dismiss(message)
    else:
        print(message, file=sys.stderr, flush=True)
    os._exit(status)


def fail(error: Exception) -> None:
    """Ends this process at once with status 1 and a line, because of an exception.

    The traceback is shown as well, except for the runtime's errors where another process is gone.
    """
    if isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error):
        leave(1, _stopped(error))
    traceback.print_exception(error)
    leave(1, f"error: {_name} failed (see the traceback); the last checkpoint is whole")


def _stopped(error: Exception) -> str:
    return f"error: {_name} stopped: {_GONE} ({first_line(error)})"


def joined() -> bool:
    """Whether this process has joined a job."""
    return _watcher is not None


def several() -> bool:
    """Whether the job has more than one process."""
    return jax.process_count() > 1


def agree(settings: dict) -> None:
    """UserError in every process if one was started with other settings, naming the first key.

    settings: {key: JSON value}.
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
    """Whether all processes stop at this step because one was sent SIGTERM or SIGINT.

    Every process asks at every step.
    """
    if not several():
        return False
    _pass_on_interrupts()
    return multihost_utils.reached_preemption_sync_point(step)


def _pass_on_interrupts() -> None:
    """From now on a first SIGINT counts as SIGTERM, of which jax tells the other processes.

    A second one has its effect of before, a KeyboardInterrupt.
    """
    global _interrupts_before
    if _interrupts_before is not None:
        return

    def interrupted(*_):
        signal.signal(signal.SIGINT, _interrupts_before)
        os.kill(os.getpid(), signal.SIGTERM)

    with contextlib.suppress(ValueError):  # not the main thread: the caller keeps its signals
        _interrupts_before = signal.signal(signal.SIGINT, interrupted)


def restore_interrupts() -> None:
    """SIGINT ends this process again, once no step is left at which all would stop."""
    global _interrupts_before
    if _interrupts_before is not None:
        signal.signal(signal.SIGINT, _interrupts_before)
        _interrupts_before = None
