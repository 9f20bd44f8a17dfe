"""The lock on a run's folder: only one job at a time trains there.

Two jobs in one folder would overwrite each other's checkpoints. On a local or network disk the
owner holds a POSIX lock on WORKDIR/.lock, which the kernel releases when the process ends for any
reason. Object storage has no locks: there the owner keeps renewing a record in WORKDIR/.lock, and
another job takes over a record that is no longer renewed.
"""

import contextlib
import errno
import json
import os
import socket
import struct
import threading
import time
import uuid
from collections.abc import Iterator

import jax
from etils import epath
from jax.experimental import multihost_utils

from ntm_jax import files
from ntm_jax.errors import UserError
from ntm_jax.runtime.processes import job

LOCK = ".lock"
RENEW_SECONDS = 20.0  # between renewals of a record on object storage
LEASE_SECONDS = 90.0  # a record unchanged for longer belongs to a dead run
FLOCK = "hhqqi"  # Linux's struct flock on 64 bits
_held = set()  # files locked by this process: POSIX locks do not exclude their own process


def check(workdir: str) -> None:
    """Raises UserError if a workdir's name is empty or names a file."""
    if not workdir:
        raise UserError("--workdir is empty: give the run's folder, such as --workdir=runs/digits")
    if epath.Path(workdir).is_file():
        raise UserError(f"--workdir={workdir} is a file: give a run's folder, or a new one")


@contextlib.contextmanager
def owned(workdir: str) -> Iterator[None]:
    """Locks the workdir for this job while the block runs, creating the folder if needed.

    Process 0 holds the lock for all processes of the job. Raises UserError in every process if
    another job trains there, or if the folder cannot be created or written to.
    """
    refusal, lock = "", contextlib.ExitStack()
    if jax.process_index() == 0:
        folder = epath.Path(workdir)
        try:
            if files.is_remote(workdir):
                lock.enter_context(_leased(folder / LOCK))
            else:
                lock.enter_context(_created(folder))
                lock.enter_context(_locked(folder / LOCK))
        except UserError as error:
            refusal = str(error)
        except OSError as error:
            refusal = (f"--workdir={workdir} cannot be written to ({error.strerror or error}): "
                       "make it writable, or give another")
    with lock:
        if job.several() and multihost_utils.broadcast_one_to_all(bool(refusal)):
            refusal = refusal or "process 0 of this job could not lock the workdir (see its error)"
        if refusal:
            raise UserError(refusal)
        yield


@contextlib.contextmanager
def _created(folder) -> Iterator[None]:
    """Creates a folder. Removes it after the block if it is new and holds nothing but the lock."""
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if new and os.listdir(folder) == [LOCK]:
                os.unlink(folder / LOCK)
                os.rmdir(folder)


@contextlib.contextmanager
def _locked(path) -> Iterator[None]:
    """Holds a POSIX lock on a file. Raises UserError if another process or this one holds it."""
    import fcntl  # missing on Windows

    name = os.path.realpath(path)
    if name in _held:
        raise _in_use(path.parent, "in this process")
    descriptor = os.open(name, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise _in_use(path.parent, _holder(descriptor)) from None
            # A network disk without locks: train without one.
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL):
                raise
        _held.add(name)
        yield
    finally:
        _held.discard(name)
        os.close(descriptor)


def _holder(descriptor: int) -> str:
    """The process that holds the lock, as "process PID"; "" if the kernel does not report it."""
    import fcntl

    with contextlib.suppress(OSError, struct.error):
        query = struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        pid = struct.unpack(FLOCK, fcntl.fcntl(descriptor, fcntl.F_GETLK, query))[-1]
        return f"process {pid}" if pid > 0 else ""
    return ""


def _in_use(folder, owner: str) -> UserError:
    return UserError(f"another run trains in {folder}{owner and f' ({owner})'}: wait for it or "
                     "stop it, or give another --workdir")


@contextlib.contextmanager
def _leased(path, renew: float = RENEW_SECONDS, lease: float = LEASE_SECONDS) -> Iterator[None]:
    """Holds a record in `path` while the block runs, renewing it every `renew` seconds.

    Raises UserError if another run renews the record there within `lease` seconds. A process that
    finds its record replaced, because it was suspended for longer than a lease, exits at once
    without writing anything more.
    """
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "token": uuid.uuid4().hex}
    _wait_until_abandoned(path, renew, lease)
    renewals = 0

    def write_record():
        nonlocal renewals
        renewals += 1
        path.write_text(json.dumps(owner | {"renewed": renewals}))

    write_record()
    ended = threading.Event()

    def keep_renewing():
        while not ended.wait(renew):
            with contextlib.suppress(OSError):  # the storage may be unavailable for a moment
                if _token(_read(path)) not in (None, owner["token"]):
                    job.leave(1, f"error: another run has taken over {path.parent}, because this "
                                 f"one was suspended for more than {lease:g} s; it exits without "
                                 "writing anything more")
                    return
                write_record()

    thread = threading.Thread(target=keep_renewing, daemon=True)
    thread.start()
    time.sleep(renew / 20)
    if _token(_read(path)) != owner["token"]:  # two runs started together: the last to write wins
        ended.set()
        raise _in_use(path.parent, _owner(_read(path)))
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(OSError):
            if _token(_read(path)) == owner["token"]:
                path.unlink()


def _wait_until_abandoned(path, renew: float, lease: float) -> None:
    """Returns once there is no record in `path`, or none that changed within `lease` seconds.

    Raises UserError if the record changes: its owner is alive.
    """
    before, begin = _read(path), time.monotonic()
    while before is not None:
        time.sleep(renew / 4)
        now = _read(path)
        if now is not None and now != before:
            raise _in_use(path.parent, _owner(now))
        if now is None or time.monotonic() - begin > lease:
            return


def _read(path) -> bytes | None:
    with contextlib.suppress(FileNotFoundError):
        return path.read_bytes()
    return None


def _owner(record: bytes | None) -> str:
    """The process that wrote a record, as "process PID on HOST"; "" if the record is damaged."""
    with contextlib.suppress(ValueError, TypeError):
        owner = files.parse_json(record or b"")
        return f"process {owner.get('pid')} on {owner.get('host')}"
    return ""


def _token(record: bytes | None) -> str | None:
    """The token in a record; None without a record or if it is damaged."""
    with contextlib.suppress(ValueError, TypeError):
        return files.parse_json(record or b"").get("token")
    return None
