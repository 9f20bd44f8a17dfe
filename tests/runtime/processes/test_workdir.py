"""A workdir has one owner.

It holds a lock that dies with its process, or on object storage a record that it must renew.
"""

import os
import signal
import threading
import time

import pytest

from ntm_jax.errors import UserError
from ntm_jax.runtime.processes import job, workdir
from tests.common import start

HOLD = """
import sys, time
from ntm_jax.runtime.processes import workdir
with workdir.owned(sys.argv[1]):
    print("owned", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def owner(tmp_path):
    """A process that owns tmp_path/run."""
    process = start(["-c", HOLD, tmp_path / "run"])
    assert process.stdout.readline() == "owned\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_owner_is_refused_until_the_first_is_killed(tmp_path, owner):
    folder = str(tmp_path / "run")
    with pytest.raises(UserError) as error, workdir.owned(folder):
        pass
    assert str(error.value) == (f"another run trains in {folder} (process {owner.pid}): wait for "
                                "it or stop it, or give another --workdir")
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    refused = pytest.raises(UserError, match="in this process")
    with workdir.owned(folder), refused, workdir.owned(f"{folder}/."):
        pass
    with workdir.owned(folder):
        pass


def test_a_new_folder_that_nothing_came_into_is_removed_again(tmp_path):
    with workdir.owned(str(tmp_path / "new")):
        assert (tmp_path / "new").is_dir()
    assert not (tmp_path / "new").exists()
    with workdir.owned(str(tmp_path / "new")):
        (tmp_path / "new" / "config.json").touch()
    assert {path.name for path in (tmp_path / "new").iterdir()} == {".lock", "config.json"}


def test_names_that_are_no_folder_are_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--workdir is empty"):
        workdir.check("")
    with pytest.raises(UserError, match="file is a file"):
        workdir.check(str(tmp_path / "file"))
    refused = pytest.raises(UserError, match=r"cannot be written to \(Not a directory\)")
    with refused, workdir.owned(str(tmp_path / "file" / "run")):
        pass


def lease(path, seconds=0.2):
    return workdir._leased(path, renew=0.05, lease=seconds)


def test_a_record_that_is_renewed_keeps_others_away_and_is_removed_at_the_end(tmp_path):
    path = tmp_path / ".lock"
    message = rf"another run trains in {tmp_path} \(process {os.getpid()} on .*\)"
    refused = pytest.raises(UserError, match=message)
    with lease(path), refused, lease(path, seconds=30):  # which a busy machine does not reach
        pass
    assert not path.exists()
    with lease(path):
        assert path.exists()


@pytest.mark.parametrize("record", [b'{"pid": 1, "token": "a"}', b"\xff", b"[]", b""])
def test_a_record_that_nobody_renews_is_taken_over(tmp_path, record):
    path = tmp_path / ".lock"
    path.write_bytes(record)
    begin = time.monotonic()
    with lease(path):
        assert time.monotonic() - begin > 0.2
        assert b'"token"' in path.read_bytes()


def test_a_run_that_stood_still_ends_when_another_has_taken_over(tmp_path, monkeypatch):
    path, ended = tmp_path / ".lock", threading.Event()

    def leave(status, line):
        assert (status, "another run has taken" in line) == (1, True)
        ended.set()

    monkeypatch.setattr(job, "leave", leave)
    with lease(path):
        path.write_text('{"token": "another"}')
        assert ended.wait(30)
    assert path.read_text() == '{"token": "another"}'  # left to its owner
