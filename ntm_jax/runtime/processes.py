"""Several processes: one command for all of them, and one job for a run's folder.

`jax.distributed` starts the processes and ends them when one is lost; runtime/stops.py agrees
on the point at which they stop.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from ntm_jax import files
from ntm_jax.errors import UserError

LOCK = ".lock"


def require_same_everywhere(settings: dict) -> None:
    """Checks that all processes of a job have the same settings, {key: JSON value}.

    Raises UserError in every process otherwise, naming the first key that differs.
    """
    if jax.process_count() == 1:
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


@contextlib.contextmanager
def locked(workdir: str) -> Iterator[None]:
    """Creates a run's folder and keeps other jobs from training there while the block runs.

    Process 0 holds a POSIX lock on WORKDIR/.lock, which the kernel releases when the process ends
    for any reason. Object storage has no locks: see Checkpoints.save. A folder that is new and
    still empty at the end is removed.

    Raises UserError if another job trains there, and OSError if the folder cannot be written to.
    """
    if files.is_remote(workdir) or jax.process_index() > 0:
        yield
        return
    folder = epath.Path(workdir)
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                raise UserError(f"another run trains in {workdir} ({file.read()}): wait for it or "
                                "stop it, or give another --workdir") from None
            # Some network disks have none.
            print(f"{workdir} is on a file system without locks: start no second run there while "
                  "this one trains", flush=True)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            if new and os.listdir(folder) == [LOCK]:
                os.unlink(folder / LOCK)
                os.rmdir(folder)
