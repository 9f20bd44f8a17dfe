"""A run's folder and its one owner: two jobs that train in one folder would write over each other's checkpoints.

On a local or network disk the owner holds a POSIX lock on WORKDIR/.lock, which the kernel drops when the process ends, however it ends.
Object storage has no locks: there the owner renews a record in WORKDIR/.lock, and a record that is no longer renewed is taken over.
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
LEASE_SECONDS = 90.0  # a record that is not renewed for so long belongs to a dead run
FLOCK = "hhqqi"  # Linux's struct flock on 64 bits
_held = set()  # folders that this process owns: a POSIX lock does not keep a process from itself


def check(workdir: str) -> None:
    """UserError where a workdir's name is empty or a file's."""
    if not workdir:
        raise UserError("--workdir is empty: give the run's folder, such as --workdir=runs/digits")
    if epath.Path(workdir).is_file():
        raise UserError(f"--workdir={workdir} is a file: give a run's folder, or a new one")


@contextlib.contextmanager
def owned(workdir: str) -> Iterator[None]:
    """The workdir, made if it is not there, belongs to this job while the block runs. Process 0 holds the lock for all processes.

    Raises UserError, in every process, where another job trains there; OSError where the folder cannot be made or written to.
    """
    refusal, lock = "", contextlib.ExitStack()
    if jax.process_index() == 0:
        folder = epath.Path(workdir)
        try:
            if "://" in str(workdir):
                lock.enter_context(_leased(folder / LOCK))
            else:
                lock.enter_context(_made(folder))
                lock.enter_context(_locked(folder / LOCK))
        except UserError as error:
            refusal = str(error)
        except OSError as error:
            refusal = f"--workdir={workdir} cannot be written to ({error.strerror or error}): make it writable, or give another"
    with lock:
        if job.several() and multihost_utils.broadcast_one_to_all(bool(refusal)):
            refusal = refusal or "process 0 of this job could not take the workdir (see its line)"
        if refusal:
            raise UserError(refusal)
        yield


@contextlib.contextmanager
def _made(folder) -> Iterator[None]:
    """A folder that is made, and removed again where it was new and nothing but the lock came into it."""
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
    import fcntl  # not everywhere

    name = os.path.realpath(path)
    if name in _held:
        raise _in_use(path.parent, "of this process")
    descriptor = os.open(name, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise _in_use(path.parent, _holder(descriptor)) from None
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL):  # a network disk without locks: the run goes on
                raise
        _held.add(name)
        yield
    finally:
        _held.discard(name)
        os.close(descriptor)


def _holder(descriptor: int) -> str:
    """Who holds the lock, in words, as far as the kernel tells; empty where it does not."""
    import fcntl

    with contextlib.suppress(OSError, struct.error):
        asked = struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        pid = struct.unpack(FLOCK, fcntl.fcntl(descriptor, fcntl.F_GETLK, asked))[-1]
        return f"process {pid}" if pid > 0 else ""
    return ""


def _in_use(folder, owner: str) -> UserError:
    return UserError(f"another run trains in {folder}{owner and f' ({owner})'}: wait for it or stop it, or give another --workdir")


@contextlib.contextmanager
def _leased(path, renew: float = RENEW_SECONDS, lease: float = LEASE_SECONDS) -> Iterator[None]:
    """The record in `path` is ours while the block runs. One that is there is watched for `lease` seconds: if it changes, its owner lives.

    A process that finds its record replaced, because it was stopped for longer than a lease, ends at once and writes nothing more.
    """
    mine, before, begin = {"host": socket.gethostname(), "pid": os.getpid(), "token": uuid.uuid4().hex}, _read(path), time.monotonic()
    while before is not None:
        time.sleep(renew / 4)
        now = _read(path)
        if now is not None and now != before:
            raise _in_use(path.parent, _owner(now))
        if now is None or time.monotonic() - begin > lease:
            break
    count = 0

    def put():
        nonlocal count
        count += 1
        path.write_text(json.dumps(mine | {"renewed": count}))

    put()
    ended = threading.Event()

    def keep():
        while not ended.wait(renew):
            with contextlib.suppress(OSError):  # the storage may be away for a moment
                if _token(_read(path)) not in (None, mine["token"]):
                    job.leave(1, f"error: another run has taken {path.parent} over, since this one stood still for more than "
                                       f"{lease:g} s; it ends here and writes nothing more")
                    return
                put()

    thread = threading.Thread(target=keep, daemon=True)
    thread.start()
    time.sleep(renew / 20)
    if _token(_read(path)) != mine["token"]:  # two started in the same moment, and the last to write has it
        ended.set()
        raise _in_use(path.parent, _owner(_read(path)))
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(OSError):
            if _token(_read(path)) == mine["token"]:
                path.unlink()


def _read(path) -> bytes | None:
    with contextlib.suppress(FileNotFoundError):
        return path.read_bytes()
    return None


def _owner(record: bytes | None) -> str:
    with contextlib.suppress(ValueError, TypeError):
        owner = files.parse_json(record)
        return f"process {owner.get('pid')} on {owner.get('host')}"
    return ""


def _token(record: bytes | None) -> str | None:
    with contextlib.suppress(ValueError, TypeError):
        return files.parse_json(record).get("token")
    return None
