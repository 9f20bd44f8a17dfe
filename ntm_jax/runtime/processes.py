"""A job of several processes: how they meet, agree and part. One process needs none of this, and every function here does nothing then."""

import contextlib
import glob
import json
import os
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils

from ntm_jax.errors import UserError


def join(coordinator_address: str | None, num_processes: int | None, process_id: int | None, timeout: int = 300, heartbeat: int = 60):
    """Joins the job's processes: by the three arguments, else as a TPU host's environment says, else not at all.

    timeout: seconds that all wait for the last to come. heartbeat: seconds after which a silent process counts as dead.
    UserError where an argument is missing or the others do not come.
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
    try:
        with _standard_error_withheld():  # the client logs pages before it raises
            jax.distributed.initialize(**given, initialization_timeout=timeout, heartbeat_timeout_seconds=heartbeat)
    except Exception as error:
        raise UserError(f"process {process_id} could not join {num_processes} processes at {coordinator_address} within {timeout} s "
                        f"({str(error).splitlines()[0][:120]}): start them all, with the address of process 0") from None


def _on_tpu() -> bool:
    return os.environ.get("JAX_PLATFORMS", "tpu") == "tpu" and bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))


@contextlib.contextmanager
def _standard_error_withheld():
    """Keeps native libraries off the terminal; what they said is shown if nothing else explains a death."""
    sys.stderr.flush()
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


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
