"""Preparations by several processes, interrupted ones, and repairs of damaged folders."""

import hashlib
import json
import os
import re
import signal
import time

import numpy as np
import pytest

from ntm_jax.data.prepare import captioned
from ntm_jax.data.prepare.loading import make_pool
from ntm_jax.errors import UserError
from tests.common import python, start
from tests.data.common import NOT_AN_OBJECT
from tests.data.prepare.common import WORDS, encoded, files, picture, pictures, records, run

# Several and killed processes


def test_any_number_of_processes_and_workers_make_the_same_records(tmp_path, capsys):
    folder = pictures(tmp_path / "in", 70)
    expected = files(run(tmp_path, folder, text=WORDS, test=0.2, shard_size=8))
    out = tmp_path / "several"
    for process in (2, 0, 1):
        assert not (out / "manifest.json").exists()
        capsys.readouterr()
        run(
            tmp_path,
            folder,
            "several",
            text=WORDS,
            test=0.2,
            shard_size=8,
            num_processes=3,
            process_id=process,
            workers=process,
            batch=5,
        )
        assert ("shards of others are not complete yet, such as " in capsys.readouterr().out) == (
            process != 1
        )
    assert files(out) == expected


def test_complete_shards_are_kept_and_others_made_again(tmp_path, monkeypatch):
    folder = pictures(tmp_path / "in", 20)
    out = run(tmp_path, folder, shard_size=5)
    expected, opened = files(out), []
    load = captioned.load
    monkeypatch.setattr(
        captioned,
        "load",
        lambda read, size, item: opened.append(item.key) or load(read, size, item),
    )
    (out / "manifest.json").unlink()
    (out / "train-00001.json").unlink()  # killed before the tally was written
    (out / "train-00003.arrayrecord").write_bytes(b"cut")
    (out / ".part-train-00001.arrayrecord-0123456789ab").write_bytes(b"killed")
    (out / ".part-of-mine").write_bytes(b"another's")
    (out / ".partial").mkdir()
    run(tmp_path, folder, shard_size=5)
    assert opened == [f"{i:03}.png" for i in (*range(5, 10), *range(15, 20))]
    (out / ".partial").rmdir()
    (out / ".part-of-mine").unlink()
    assert files(out) == expected


def exchange(out):
    """Replaces a shard of a folder by another preparation's, of as many records."""
    folder = pictures(out.parent / "other", 12)
    for i in range(12):
        (folder / f"{i:03}.png").write_bytes(encoded(picture(100 + i)))
    other = run(out.parent, folder, "exchanged", shard_size=5)
    for name in ("train-00001.arrayrecord", "train-00001.json"):
        (out / name).write_bytes((other / name).read_bytes())


@pytest.mark.parametrize(
    ("damage", "again"),
    [
        (exchange, "train-00001"),
        (lambda out: (out / "train-00001.arrayrecord").unlink(), "train-00001"),
        (
            lambda out: (out / "train-00002.arrayrecord").write_bytes(
                bytes((out / "train-00002.arrayrecord").stat().st_size)
            ),
            "train-00002",
        ),
        (lambda out: (out / "train-00000.json").write_text("[]"), "train-00000"),
        (
            lambda out: (out / "train-00000.json").write_text(
                (out / "train-00000.json").read_text().replace('"images": 5', '"images": 6')
            ),
            "train-00000",
        ),
        (lambda out: (out / "plan.json").unlink(), "none"),
    ],
    ids=["exchanged", "missing", "zeros", "tally", "edited tally", "plan"],
)
def test_the_same_command_repairs_the_records(tmp_path, capsys, damage, again):
    folder = pictures(tmp_path / "in", 12)
    out = run(tmp_path, folder, shard_size=5)
    expected = files(out)
    damage(out)
    assert files(out) != expected
    if again in ("train-00001", "train-00002"):
        with pytest.raises(
            UserError,
            match=r"or prepare the records again: the same launch/prepare\.py command makes only "
            r"what is",
        ):
            records(out)
    capsys.readouterr()
    run(tmp_path, folder, shard_size=5)
    assert files(out) == expected
    printed = capsys.readouterr().out
    assert (
        f"the 3 shards of this process agree with the earlier manifest.json; made again: {again}\n"
        in printed
    )
    assert (f"differing from manifest.json, and made again: {again}\n" in printed) == (
        again != "none"
    )
    assert len(records(out)) == 12


@pytest.mark.parametrize(
    "content",
    [
        *NOT_AN_OBJECT,
        b'{"input": 1}',
    ],
)
def test_side_files_of_any_content_are_made_again(tmp_path, content):
    folder = pictures(tmp_path / "in", 12)
    out = run(tmp_path, folder, shard_size=5)
    expected = files(out)
    for name in ("manifest.json", "train-00001.json"):
        (out / name).write_bytes(content)
        run(tmp_path, folder, shard_size=5)
        assert files(out) == expected
    (out / "plan.json").write_bytes(content)
    message = (
        r"plan\.json cannot be used .*: remove it and give the same command again|is being "
        r"prepared with"
    )
    with pytest.raises(UserError, match=message) as error:
        run(tmp_path, folder, shard_size=5)
    assert "\n" not in str(error.value)
    (out / "plan.json").unlink()
    run(tmp_path, folder, shard_size=5)
    assert files(out) == expected


@pytest.mark.parametrize(
    "change",
    [
        {"bad": [1]},
        {"bad": [["a"]]},
        {"bad": None},
        {"null_captions": {}},
        {"null_captions": {"empty": "1", "not UTF-8": 0}},
        {"images": "5"},
        {"sums": ["a"]},
        {"sha256": 1},
        {"new": 1},
        {"bytes": True},
    ],
)
def test_a_tally_of_wrong_types_is_made_again(tmp_path, change):
    folder = pictures(tmp_path / "in", 3)
    out = run(tmp_path, folder)
    expected = files(out)
    tally = json.loads((out / "train-00000.json").read_text()) | change
    del tally["content_sha256"]
    (out / "train-00000.json").write_text(json.dumps(tally))
    run(tmp_path, folder)
    assert files(out) == expected


def test_a_folder_of_an_earlier_version_continues_and_gets_sha256(tmp_path, capsys):
    folder = pictures(tmp_path / "in", 12)
    out = run(tmp_path, folder, shard_size=5)
    expected = files(out)
    for name in ("plan.json", "train-00000.json", "train-00001.json", "train-00002.json"):
        content = json.loads((out / name).read_text())
        del content["content_sha256"]
        (out / name).write_text(json.dumps(content))
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["hash"], manifest["splits"]["train"]["sha256"]
    (out / "manifest.json").write_text(
        json.dumps(
            manifest
            | {
                "hash": hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[
                    :16
                ]
            }
        )
    )
    assert len(records(out)) == 12
    capsys.readouterr()
    run(tmp_path, folder, shard_size=5)
    assert "made again: none" in capsys.readouterr().out
    assert files(out)["manifest.json"] == expected["manifest.json"]


def test_images_that_changed_are_named(tmp_path):
    folder = pictures(tmp_path / "in", 12)
    out = run(tmp_path, folder, shard_size=5)
    manifest = (out / "manifest.json").read_bytes()
    (folder / "007.png").write_bytes(encoded(picture(99)))
    (out / "train-00001.arrayrecord").unlink()
    with pytest.raises(
        UserError,
        match=r"differs from its manifest\.json after making shards again \(train-00001\), so its "
        r"images or the programs",
    ):
        run(tmp_path, folder, shard_size=5)
    assert (out / "manifest.json").read_bytes() == manifest
    with pytest.raises(UserError, match="SHA-256 is not that of the manifest"):
        records(out)
    (out / "manifest.json").unlink()
    assert len(records(run(tmp_path, folder, shard_size=5))) == 12


@pytest.mark.parametrize("name", ["plan.json", "train-00001.json"])
def test_a_file_whose_writer_was_killed_before_naming_it_leaves_nothing(
    tmp_path, monkeypatch, name
):
    folder = pictures(tmp_path / "in", 12)
    expected = files(run(tmp_path, folder, "expected", shard_size=5))
    replace = os.replace

    def killed(part, file):
        if os.path.basename(file) == name:
            raise KeyboardInterrupt
        return replace(part, file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        patch.setattr(os, "unlink", lambda path: None)  # a killed process removes nothing
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, folder, shard_size=5)
    assert any(file.name.startswith(".part-" + name) for file in (tmp_path / "out").iterdir())
    assert files(run(tmp_path, folder, shard_size=5)) == expected


@pytest.mark.slow
def test_killed_at_random_and_restarted_the_shards_are_bit_identical(tmp_path):
    folder = pictures(tmp_path / "in", 200)
    (folder / "017.png").write_bytes(b"<html>")
    call = [
        "-m",
        "launch.prepare",
        f"--input=folder:{folder}",
        "--image_size=96",
        "--shard_size=10",
        f"--text={WORDS}",
    ]
    out, random, kills = tmp_path / "killed", np.random.default_rng(0), 0
    done = python(*call, f"--out={tmp_path}/expected").stdout
    while kills < 3:
        before = len(list(out.glob("*.json")))
        process = start([*call, "--workers=1", f"--out={out}"])
        deadline = time.time() + 60
        while (
            len(list(out.glob("*.json"))) < before + 3
            and process.poll() is None
            and time.time() < deadline
        ):
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.03))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, (
            "it finished before it was killed: use more images"
        )
        kills += 1
    assert not (out / "manifest.json").exists()
    resumed = python(*call, f"--out={out}").stdout
    assert files(out) == files(tmp_path / "expected")
    assert "bad images left out: 1 of 200: 017.png (not an image)" in resumed
    assert resumed.splitlines()[-4:-1] == done.splitlines()[-4:-1]


def test_a_killed_worker_is_one_line(tmp_path):
    folder = pictures(tmp_path / "in", 3)
    with (
        pytest.raises(
            UserError, match=r"^one of the 1 worker processes was killed, .*complete shards stay$"
        ),
        make_pool(1) as pool,
    ):
        pool.submit(os._exit, 1).result()
    assert len(records(run(tmp_path, folder, workers=1))) == 3


# The program


def test_a_mistake_is_one_line_with_status_2(tmp_path):
    for arguments, message in (
        (
            ["--input=folder:/no/such", f"--out={tmp_path}/out"],
            "--input=folder:/no/such is not there",
        ),
        (["--input=x", f"--out={tmp_path}/out", "--test=many"], "--test=many: expected a number"),
    ):
        done = python("-m", "launch.prepare", *arguments, check=False)
        assert done.returncode == 2
        assert re.fullmatch(r"error: [^\n]+\n", done.stderr), done.stderr
        assert message in done.stderr
        assert not done.stdout
