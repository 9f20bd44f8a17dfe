"""Hostile and damaged input ends in one line with status 2, and changes nothing."""

import errno
import functools
import io
import os
import resource
import sys
import tarfile

import jax
import numpy as np
import pytest
from absl import flags
from PIL import Image

from launch import mistakes, program
from ntm_jax import files
from ntm_jax.data import records
from ntm_jax.data.sources import from_arrays, open_source
from ntm_jax.errors import MachineFault, UserError
from ntm_jax.export import read
from ntm_jax.runtime import checkpoint
from ntm_jax.tools.prepare import captioned, from_folder, from_tars
from ntm_jax.tools.prepare.captioned import Request
from ntm_jax.training.writers.lines import Lines
from tests.common import python

FORGED = "\x1b]0;owned\x07\x1b[2J\ra\u202eb \x9b2J"  # sets a terminal's title, clears its screen


def header(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, more: bool = False) -> bytes:
    """A member's header in a tar, which states a size; more: a sparse header goes on after it."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[482] = more
    block[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(block))[0]
    return bytes(block)


TARS = {  # content: what the line says
    header("a.png", 10**15): "a.tar is not a complete, uncompressed tar",
    header("a.txt", 10**15): "a.txt has 1000000000000000 bytes: expected at most 256 MiB; the last",
    header("a.png", 9, tarfile.GNUTYPE_SPARSE, more=True): "a.tar is not a complete, uncompressed",
    (header("././@LongLink", 4, tarfile.GNUTYPE_LONGNAME) + bytes(512)) * 1000: "recursion",
    header("a.txt", 4) + bytes(512) + header(FORGED, 4): r"\x1b",
}
SPLITS = [5, {"all": 5}, {"a": {"shards": [5], "counts": [1]}},
          {"a": {"shards": [], "counts": [1]}}, {"a": {"shards": ["b"], "counts": [-1]}}]
FORGERIES = [{"choices": {"classes": 5}}, {"num_classes": "2"}, {"image_shape": 4},
             *({"splits": splits} for splits in SPLITS)]
FILES = {  # whatever opens a file: its function of a path
    "config.json": lambda path: read.read_export_info(path.parent),
    "metrics.jsonl": lambda path: Lines().open(path.parent, 0, {}),
    "metadata.jsonl": lambda path: from_folder.open_folder(Request("", str(path.parent))),
    "a.npz": lambda path: open_source(f"npz:{path}", "all"),
    "a.parquet": lambda path: open_source(f"parquet:{path}", "all"),
    "a.png": lambda path: open_source(f"folder:{path.parent}", "all"),
    "a.tar": lambda path: from_tars.open_tars(Request("", str(path))),
    "a.arrayrecord": records.sha256,
    "manifest.json": lambda path: open_source(f"records:{path.parent}", "all"),
}


def mistakes_of_files(folder):
    """(what the line says, a call) of each hostile file, which it puts into the folder first."""
    for content, says in TARS.items():
        (folder / "a.tar").write_bytes(content)
        yield says, lambda: from_tars.open_tars(Request("", f"{folder}/*.tar"))
    manifest = {"format": 1, "image_shape": [4, 4, 3], "pixel_levels": 256, "splits": {}}
    for forged in FORGERIES:
        content = manifest | forged
        files.write_json(folder / "manifest.json", content | {"hash": files.digest(content)[:16]})
        yield "manifest.json", lambda: open_source(f"records:{folder}", "all")
    rows = "file_name,caption\n" + "a.png,a\n" * 4 + "a.png," + "a" * 2**18
    (folder / "metadata.csv").write_text(rows)
    yield "metadata.csv line 6 ", lambda: from_folder.open_folder(Request("", str(folder)))
    for name, call in FILES.items():
        for make in os.mkfifo, lambda path: path.symlink_to("/dev/zero"):
            (folder / name).unlink(missing_ok=True)
            make(folder / name)
            yield name, functools.partial(call, folder / name)
    for number in 2**31 - 1, 100_000:
        labels = np.array([0, number])
        yield f"{number}: expected a name", lambda labels=labels: from_arrays(
            np.zeros((2, 4, 4, 3), np.uint8), labels)


def content(folder) -> dict:
    return {path.name: path.read_bytes() if path.is_file() else path.lstat().st_mode
            for path in folder.iterdir()}


def line_of(call) -> str:
    """The one line, which comes with status 2, of the mistake that a call ends in."""
    with pytest.raises(Exception) as error:  # noqa: PT011 of every kind
        call()
    mistake = mistakes.of_a_program(error.value)
    assert isinstance(mistake, UserError), repr(error.value)
    line = str(mistake)
    assert len(program._error(line).splitlines()) == 1
    return line


def test_a_hostile_file_ends_in_one_line_and_nothing_changes(tmp_path):
    for says, call in mistakes_of_files(tmp_path):
        before = content(tmp_path)
        assert says in line_of(call)
        assert content(tmp_path) == before


def test_too_many_open_files_are_no_damage(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    read = functools.partial(from_folder._read_file, str(tmp_path), False)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    for call in (lambda: files.read_json(tmp_path / "a.json", ""),
                 lambda: captioned.load(read, 8, captioned.Item("a", "a.json"))):
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, limit[1]))
        try:
            line = line_of(call)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limit)
        assert line.endswith("raise ulimit -n")


@pytest.mark.parametrize(
    ("encoding", "shown"), [("utf-8", "猫 é ±"), ("ascii", r"\u732b \xe9 \xb1")])
def test_text_of_others_commands_no_terminal(encoding, shown):
    stream = io.TextIOWrapper(io.BytesIO(), encoding)
    program._escape_controls(stream)
    print(f"{FORGED}猫 é ±\udce9\tb", file=stream)
    for written in "\r50%", "\n\x1b[A":  # as progress bars do
        stream.write(written)
    stream.flush()
    assert stream.buffer.getvalue().decode(encoding) == (
        r"\x1b]0;owned\x07\x1b[2J\ra\u202eb \x9b2J" + shown + "\\udce9\tb\n"
        "\r50%\n\x1b[A")


def test_a_folder_that_is_not_utf8_is_refused(monkeypatch, capsys):
    values = flags.FlagValues()
    flags.DEFINE_string("out", None, "", flag_values=values)
    monkeypatch.setattr(program, "FLAGS", values)
    monkeypatch.setattr(sys, "argv", ["sample"])
    with pytest.raises(SystemExit, match="2"):
        program._parse(["sample", "--out=/tmp/\udce9"])
    assert capsys.readouterr().err == (
        r"error: --out='/tmp/\udce9' is not UTF-8: give a folder whose name is" "\n")


NO_HOME = """
import os, pwd
def unknown(*_): raise KeyError
pwd.getpwuid = pwd.getpwnam = unknown
for name in "HOME", "JAX_COMPILATION_CACHE_DIR":
    os.environ.pop(name, None)
from launch import program
from ntm_jax.data import sources
def main():
    program._keep_programs(None)
    print("±", len(sources.open_source("folder:images", "all").records))
program.run(main)
"""


def test_programs_run_without_a_home_and_print_to_ascii(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "images" / "a.png")
    done = python("-c", NO_HOME, cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert (done.stdout, os.listdir(tmp_path)) == ("\\xb1 1\n", ["images"])


@pytest.mark.parametrize(("error", "kind"), [
    (OSError(errno.EIO, os.strerror(errno.EIO), "run/metrics.jsonl"), MachineFault),
    (TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT), "gs://b/run"), MachineFault),
    (type("HttpError", (Exception,), {"__module__": "gcsfs.retry"})("503"), MachineFault),
    (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "run/metrics.jsonl"), UserError),
    (PermissionError(errno.EACCES, os.strerror(errno.EACCES), "run"), UserError),
    (type("HttpError", (PermissionError,), {"__module__": "gcsfs.retry"})("403"), UserError),
    (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"), UserError),
    (ZeroDivisionError(), type(None))])
def test_only_faults_that_a_restart_may_mend_are_of_the_machines(error, kind):
    assert type(mistakes.of_a_program(error)) is kind


@pytest.mark.parametrize(("cause", "kind"), [
    (ValueError("UNAVAILABLE: Error writing gs://b/run: HTTP response code: 503"), MachineFault),
    (ValueError("Error writing /run: [OS error 28: No space left on device]"), UserError)])
def test_a_failed_save_tells_a_fault_of_the_machines_from_full_storage(cause, kind, tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path)
    with (pytest.raises(kind, match="the checkpoints before it are intact"),
          checkpoints._file_errors()):
        raise RuntimeError("a save failed") from cause
