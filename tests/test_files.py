"""Files are written completely or not at all, and unusable JSON is refused with one line."""

import errno
import os

import pytest

from ntm_jax import files
from ntm_jax.errors import UserError, from_object_storage
from tests.common import file_size_limit


@pytest.mark.parametrize("content", [b'{"a": 1', b"\xff", b"[]", b"[" * 100_000])
def test_json_without_an_object_is_refused_in_one_line_that_names_the_file(tmp_path, content):
    path = tmp_path / "side.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"^{path} cannot be used \(it .*\): write it again$"):
        files.read_json(path, "write it again")


def test_a_changed_value_does_not_match_the_checksum(tmp_path):
    path, content = tmp_path / "side.json", {"b": [1, 2.5e-7, None], "a": {"c": "é"}}
    files.write_json(path, content | {files.SEAL: files.digest(content)})
    assert files.read_json(path, "") == content
    path.write_text(path.read_text().replace("2.5e-07", "2.6e-07"))
    with pytest.raises(UserError, match="does not match its checksum"):
        files.read_json(path, "")
    files.write_json(path, content)
    assert files.read_json(path, "") == content


def test_a_file_written_aside_gets_its_name_at_the_end_or_never(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyError), files.atomic_writer(path) as file:
        {}[file.write(b"half")]
    assert (path.read_bytes(), os.listdir(tmp_path)) == (b"old", ["file"])
    with files.atomic_writer(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert (path.read_bytes(), os.listdir(tmp_path)) == (b"new", ["file"])


def test_a_failed_write_names_its_file_and_keeps_the_old_one(tmp_path):
    path = tmp_path / "file"
    files.write(path, "old")
    with file_size_limit(1000), pytest.raises(OSError, match="File too large") as error:
        files.write(path, bytes(2000))
    assert (error.value.errno, error.value.filename) == (errno.EFBIG, str(path))
    assert (path.read_text(), os.listdir(tmp_path)) == ("old", ["file"])


def test_damaged_lines_are_left_out(tmp_path):
    path = tmp_path / "lines.jsonl"
    assert files.read_lines(path) == []
    path.write_bytes(b'{"step": 1}\n\xff\n[]\n\n{"step": 2}\n{"step": 3')
    assert files.read_lines(path) == [{"step": 1}, {"step": 2}]


class HttpError(Exception):
    """As gcsfs raises it."""

    __module__ = "gcsfs.retry"

    def __init__(self, code):
        super().__init__(f"the bucket answers {code}")
        self.code = code


@pytest.mark.parametrize(("error", "number"), [
    (OSError("Forbidden: http://there\nno permission"), errno.EACCES),  # gcsfs's, without a number
    (HttpError(401), errno.EACCES), (HttpError(503), errno.EIO),
    (FileNotFoundError("http://there"), errno.ENOENT)])
def test_what_object_storage_raises_becomes_an_error_that_names_the_file(error, number):
    with pytest.raises(OSError, match="gs://bucket/run") as raised, files.naming("gs://bucket/run"):
        raise error
    assert (raised.value.errno, raised.value.filename) == (number, "gs://bucket/run")
    assert from_object_storage(raised.value) == (number != errno.ENOENT)


def test_other_errors_keep_their_kind():
    with pytest.raises(ValueError, match="damaged") as raised, files.naming("gs://bucket/run"):
        raise ValueError("a damaged file")
    assert not from_object_storage(raised.value)
