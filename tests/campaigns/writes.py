"""Runs each program on a full disk or under a limit on the size of files.

It must end with one line and status 2, keep every earlier file as it was, and succeed when the same
command is given again without the limit.

    python -m tests.campaigns.writes           # limits of 1 to 50 KiB, and full disks if root
    python -m tests.campaigns.writes 2 20      # only these limits
    python -m tests.campaigns.writes 2 sample  # and only this program
"""

import contextlib
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import jax

from ntm_jax.training import loop
from tests.campaigns import damage
from tests.common import ROOT, TINY, file_size_limit, tiny_config, write_photos

CONFIG = [f"--config={ROOT}/experiments/digits.py",
          *(f"--config.{key}={value}" for key, value in TINY.items())]
LIMITS = (1, 2, 3, 4, 5, 7, 10, 14, 20, 30, 40, 50)  # KiB


def programs(folder: Path) -> dict[str, list[str]]:
    """{name of launch's program: its arguments}; all write below `folder`.

    The folder holds a run and photos.
    """
    run = folder / "run"
    return {
        "train": [*CONFIG, f"--workdir={run}"],
        "evaluate": [f"--workdir={run}", "--per_example"],
        "sample": [f"--workdir={run}", f"--out={folder}/samples", "--num=4", "--batch=2",
                   "--decoder=inverse"],
        "export": [f"--workdir={run}", f"--out={folder}/export"],
        "prepare": [f"--input=folder:{folder}/photos", f"--out={folder}/records",
                    "--image_size=16", "--shard_size=4"],
    }


def call(name: str, arguments: list[str], limit: int | None = None) -> tuple[int, str]:
    """(exit status, stderr) of a program under a limit; see in_a_fork."""
    def program():
        sys.argv = [f"launch.{name}", *arguments]
        runpy.run_module(sys.argv[0], run_name="__main__")

    return in_a_fork(program, limit)


def in_a_fork(work: Callable[[], object], limit: int | None = None) -> tuple[int, str]:
    """(exit status, stderr) of work() in a fork of this process.

    This process has imported the packages but not started jax. limit: bytes of the largest file
    that the fork may write.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reading)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(writing, 2)
        if limit:
            # The cache is read only: it would warn, rightly, that it cannot be written.
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
        status = 1
        try:
            with file_size_limit(limit) if limit else contextlib.nullcontext():
                work()
            status = 0
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            traceback.print_exc()
        finally:  # without the parent's clean-up
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as file:
        error = file.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), error


def contents(folder: Path) -> dict[Path, bytes]:
    """All files that must not change: all but a run's reports, which grow, and its lock."""
    reports = ("metrics.jsonl", ".lock", "events.")
    return {path: path.read_bytes() for path in damage.files(folder, reports)}


def trial(folder: Path, name: str, limit: int | None,
          mend: Callable[[], None] = lambda: None) -> tuple[str, str]:
    """(one of damage.OUTCOMES, the message) of a program that cannot write and is started again.

    mend() removes what hindered it before the second start.
    """
    arguments, before = programs(folder)[name], contents(folder)
    status, error = call(name, arguments, limit)
    if status == 0:
        return "ok", "all was written"
    if status != 2 or error.count("\n") != 1 or not error.startswith("error: "):
        return "traceback", f"status {status}: {error[-300:]}"
    changed = [path for path, content in before.items() if not path.exists() or path.read_bytes()
               != content]
    if changed:
        return "silent", f"changed {changed[0].relative_to(folder)}"
    mend()
    status, again = call(name, arguments)
    return ("refused", error.strip()) if status == 0 else (
        "traceback", f"given again: status {status}: {again[-300:]}")


def prepare(folder: Path) -> None:
    """A run stopped after two of six steps, and a folder of photos."""
    write_photos(folder / "photos", 8, 24)
    status, error = in_a_fork(
        lambda: loop.train(tiny_config(), str(folder / "run"), progress=False, until=2))
    assert status == 0, error


def limited(base: Path, root: Path, name: str, kib: int) -> tuple[str, str]:
    """The outcome of a program under a limit of so many KiB, in a copy of `base` below `root`."""
    work = root / "work"
    shutil.copytree(base, work)
    try:
        return trial(work, name, 1024 * kib)
    finally:
        shutil.rmtree(work)


def full_disk(name: str, kib: int, base: Path, mount: Path) -> tuple[str, str]:
    """The outcome of a program on a disk with so many KiB left, until its second start."""
    size = sum(path.stat().st_size for path in damage.files(base)) // 1024
    options = f"size={size + 8000}k"  # room for what the program writes when it is given again
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", mount], check=True)
    try:
        shutil.copytree(base, mount / "work", symlinks=True)
        free = shutil.disk_usage(mount).free // 1024
        (mount / "fill").write_bytes(bytes(max(0, free - kib) * 1024))
        return trial(mount / "work", name, None, lambda: os.unlink(mount / "fill"))
    finally:
        subprocess.run(["umount", "-l", mount], check=True)


def run(limits=LIMITS, names=None, disks=()) -> damage.Tally:
    """Every program under every limit, and on a disk with so many KiB left."""
    import ntm_jax.api  # noqa: F401, imported once for all forks

    tally = damage.Tally()
    with tempfile.TemporaryDirectory() as root, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        base = Path(root) / "base"
        base.mkdir()
        # pytest's cache has what other tests compiled
        cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", f"{root}/cache")
        for setting, value in (  # forks inherit them
                ("platforms", "cpu"), ("disable_most_optimizations", True),
                ("compilation_cache_dir", cache),
                ("persistent_cache_min_compile_time_secs", 0.1)):
            jax.config.update(f"jax_{setting}", value)
        prepare(base)
        for name in names or programs(base):
            for limit in limits:
                found = limited(base, Path(root), name, limit)
                tally.add(f"{name}, limit", found[0], f"{limit} KiB: {found[1]}")
            for kib in disks:
                mount = Path(root) / "mount"
                mount.mkdir(exist_ok=True)
                found = full_disk(name, kib, base, mount)
                tally.add(f"{name}, full disk", found[0], f"{kib} KiB left: {found[1]}")
    return tally


if __name__ == "__main__":
    given = tuple(int(argument) for argument in sys.argv[1:] if argument.isdecimal())
    names = [argument for argument in sys.argv[1:] if not argument.isdecimal()]
    result = run(given or LIMITS, names,
                 disks=(4, 16, 64, 128, 256) if os.geteuid() == 0 and not given else ())
    print(result)
    print("\n".join(result.wrong()))
    sys.exit(bool(result.wrong()))
