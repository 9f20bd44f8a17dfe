"""Preparing records from invalid and hostile inputs: each is refused in one line."""

import contextlib
import os
import re
import signal
import tarfile

import pytest

from ntm_jax.data.records import Layout, write_records
from ntm_jax.errors import UserError
from tests.common import python
from tests.data.prepare.common import (
    add,
    encoded,
    files,
    picture,
    pictures,
    records,
    run,
    write_folder,
)

# Mistakes


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        (
            '{"file_name": "a.png"}',
            "line 1 has file_name: expected file_name (or image) and caption (or text) of every "
            "image",
        ),
        (
            '{"file_name": "a.png", "caption": "a"}\n{"file',
            "line 2 is not understood (it is not JSON: Unterminated",
        ),
        ("[1, 2]", "line 1 is not understood (it is not a JSON object"),
        (
            '{"file_name": "a.png", "caption": "a", "label": 1}\n{"file_name": "b.png", "caption": '
            '"a"}',
            "has the label None for b.png",
        ),
        (
            '{"file_name": "a.png", "caption": "a", "label": 1}\n{"file_name": "b.png", "caption": '
            '"a", "label": ""}',
            "has the label None for b.png",
        ),
        ("", "lists no images: expected at least one"),
    ],
)
def test_an_invalid_list_is_refused(tmp_path, listed, message):
    folder = write_folder(tmp_path / "in", {})
    (folder / "metadata.jsonl").write_text(listed)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        run(tmp_path, folder)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_an_invalid_input_is_refused(tmp_path, tfds_folder):
    (tmp_path / "empty").mkdir()
    pictures(tmp_path / "in", 3)
    (tmp_path / "same.jsonl").write_text('{"file_name": "000.png", "caption": "a"}\n' * 3)
    (tmp_path / "cut.tar").write_bytes(b"<html>" * 100)
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as tar:
        add(tar, "a.png", encoded(picture(1)))
    for given, message in (
        ({"input": "photos"}, "--input=photos is not known: expected folder:PATH"),
        ({"input": "folder:/no/such"}, "--input=folder:/no/such is not there"),
        (
            {"input": f"folder:{tmp_path}/empty"},
            "empty has no metadata.jsonl or metadata.csv: give --captions=FILE",
        ),
        (
            {"input": f"folder:{tmp_path}/in", "captions": "/no.csv"},
            "/no.csv is no .jsonl or .csv that is there",
        ),
        ({"input": f"tars:{tmp_path}/*.zip"}, "matches no file"),
        ({"input": f"tars:{tmp_path}/cut.tar"}, "cut.tar is not a complete, uncompressed tar"),
        (
            {"input": f"tars:{tmp_path}/packed.tar"},
            "packed.tar is not a complete, uncompressed tar",
        ),
        ({"input": "tfds:/no/such"}, "tfds:/no/such is neither"),
        ({"input": f"tfds:{tfds_folder}"}, "has no feature 'caption' of captions: it has"),
        (
            {"input": f"tfds:{tfds_folder}", "caption_feature": "title", "tfds_split": "dev"},
            "has no split 'dev': it has train, test",
        ),
        ({"input": f"folder:{tmp_path}/in", "latents": "vae:x"}, "--latents=vae:x is not known"),
        (
            {"input": f"folder:{tmp_path}/in", "text": "bert"},
            "the text encoder 'bert' is not known",
        ),
        ({"input": f"folder:{tmp_path}/in", "test": 3}, "--test=3 holds out 3 of 3 images"),
        (
            {"input": f"folder:{tmp_path}/in", "captions": f"{tmp_path}/same.jsonl", "test": 1},
            "--test=1 holds out all 3 images, since they have one name: give --test=0 or images",
        ),
        ({"input": f"folder:{tmp_path}/in", "test": 1.5}, "--test=1.5 holds out 1.5 of 3 images"),
        ({"input": f"folder:{tmp_path}/in", "process_id": 1}, "--process_id=1: expected 0 to 0"),
    ):
        with pytest.raises(UserError, match=re.escape(message)) as error:
            run(tmp_path, "", **given)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@contextlib.contextmanager
def within(seconds):
    """Fails the test after `seconds`, if it hangs."""

    def late(*_):
        raise TimeoutError(f"not done within {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def assert_refused(message, tmp_path, **given):
    """Asserts that preparing soon raises one line with `message` and writes nothing."""
    with within(20), pytest.raises(UserError, match=re.escape(message)) as error:
        run(tmp_path, tmp_path / "in", **given)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_files_outside_the_folder_are_read_only_with_follow_outside(tmp_path):
    picture_file = write_folder(tmp_path / "elsewhere", {"a.png": encoded(picture(1))}) / "a.png"
    folder = write_folder(tmp_path / "in", {"b.png": encoded(picture(2))})
    (folder / "link.png").symlink_to(picture_file)
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "inside").symlink_to(folder)
    for name in (
        "../elsewhere/a.png",
        str(picture_file),
        "link.png",
        "linked/a.png",
        "inside/../../elsewhere/a.png",
        "linked/absent.png",
    ):
        write_folder(
            folder,
            {},
            [{"file_name": "b.png", "caption": "a"}, {"file_name": name, "caption": "a"}],
        )
        assert_refused(
            f"metadata.jsonl line 2 has the file_name {name[:40]}", tmp_path
        )  # a long name is cut
        assert_refused(
            f", which lies outside {folder}: put the file into the folder, or give "
            "--follow_outside",
            tmp_path,
        )
    names = ["b.png", "inside/b.png", "../in/b.png", str(folder / "b.png")]
    write_folder(folder, {}, [{"file_name": name, "caption": "a"} for name in names])
    assert len(records(run(tmp_path, folder, "within"))) == 4
    write_folder(
        folder,
        {},
        [
            {"file_name": name, "caption": "a"}
            for name in ("../elsewhere/a.png", "link.png", "linked/a.png")
        ],
    )
    python(
        "-m",
        "launch.prepare",
        f"--input=folder:{folder}",
        f"--out={tmp_path}/out",
        "--image_size=8",
        "--test=0",
        "--follow_outside",
    )
    assert len(records(tmp_path / "out")) == 3


def test_only_regular_files_are_read(tmp_path, capsys):
    folder = pictures(tmp_path / "in", 1)
    os.mkfifo(folder / "pipe.png")
    (folder / "folder.png").mkdir()
    (folder / "zero.png").symlink_to("/dev/zero")
    with open(folder / "sparse.png", "wb") as file:
        file.truncate(10**12)
    names = ["000.png", "pipe.png", "folder.png", "zero.png", "sparse.png"]
    write_folder(folder, {}, [{"file_name": name, "caption": "a"} for name in names])
    with within(20):
        assert (
            len(records(run(tmp_path, folder, "left_out", max_bad=0.9, follow_outside=True))) == 1
        )
    printed = capsys.readouterr().out
    for name in names[1:4]:
        assert f"{name} (not a regular file)" in printed
    assert "sparse.png (larger than 256 MiB, 1000000000000 bytes)" in printed
    (folder / "metadata.jsonl").unlink()
    os.mkfifo(folder / "metadata.jsonl")
    assert_refused("metadata.jsonl is not a regular file", tmp_path)
    os.mkfifo(tmp_path / "a.tar")
    (tmp_path / "b.tar").mkdir()
    for name in ("a.tar", "b.tar"):
        assert_refused(
            f"matches {tmp_path}/{name}, which is not a regular file: remove it",
            tmp_path,
            input=f"tars:{tmp_path}/{name}",
        )


def labelled(label):
    """A row of a list, with a label given as JSON."""
    return f'{{"file_name": "a.png", "caption": "a", "label": {label}}}'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "[" * 100_000, "line 1 is not understood (it is nested too deeply)"),
        ("a.jsonl", "null", "line 1 is not understood (it is not a JSON object but null)"),
        ("a.jsonl", labelled("9" * 5000), "line 1 is not understood (it holds a number of "),
        ("a.jsonl", labelled("9" * 4000), "expected 0 to 99999"),
        (
            "a.jsonl",
            labelled(10**12),
            "has the label 1000000000000 for a.png: expected 0 to 99999",
        ),
        ("a.jsonl", labelled("[" * 900 + "1" + "]" * 900), "has the label of type list for a.png"),
        ("a.jsonl", labelled("1e999"), "has the label of type float for a.png"),
        (
            "a.csv",
            "file_name,caption,label\na.png,a," + "9" * 5000,
            "expected 0 to 99999, below the number of images or 100000; write other",
        ),
        (
            "a.jsonl",
            r'{"file_name": "\ud800.png", "caption": "a"}',
            r"has the file_name '\ud800.png', which no file can have: mend the name",
        ),
        (
            "a.jsonl",
            r'{"file_name": "a\u0000.png", "caption": "a"}',
            "which no file can have: mend the name",
        ),
        (
            "a.jsonl",
            '{"file_name": ["a.png"], "caption": "a"}',
            "line 1 has file_name, caption: expected file_name",
        ),
        ("a.jsonl", "a" * (2**24 + 1), "line 0 is not understood (larger than 16 MiB"),
        ("a.jsonl", labelled(-1), "has the label -1 for a.png: expected 0 to 99999, below the "),
        (
            "a.csv",
            "file_name,caption,label\na.png,a,b\nb.png,a barn, in snow,b",
            "a.csv line 3 is not understood (it has 4 fields under a header of 3): expected .csv "
            "of file_name, caption, and quotes around a caption with a comma or a quote",
        ),
        ("a.csv", 'file_name,caption\na.png,"a\nb.png,b', "line 2 is not understood (unexpected "),
        ("a.csv", 'file_name,caption\na.png,"a" b', "line 2 is not understood (',' expected after"),
        (
            "a.csv",
            "file_name,caption,,caption,\na.png,a,,b,",
            "line 1 is not understood (it has two columns caption)",
        ),
    ],
    ids=range(17),
)
def test_a_list_of_any_content_is_refused_in_one_line(tmp_path, name, content, message):
    write_folder(tmp_path / "in", {"a.png": encoded(picture(1))})
    (tmp_path / name).write_text(content)
    assert_refused(message, tmp_path, captions=str(tmp_path / name))


def member(name, data=b"", **attributes):
    """A member of a tar: a header with the given attributes, and its data."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in attributes.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (member("a.json", b"[" * 100_000), "captions (it is nested too deeply)"),
        (member("a.json", b"[]"), "captions (it is not a JSON object but a list)"),
        (member("a.json", b"9" * 5000), "captions (it holds a number of thousands"),
        (member("a.json", b"\xff"), "captions (it is not JSON: Expecting value"),
        (member("a.txt", size=-512), "captions (a member has a negative size)"),
        (member("a.txt", size=2**40), "captions (a.txt: larger than 16 MiB, 1099511627776 bytes)"),
        (
            member("a.json", bytes(2**24 + 1)),
            "captions (a.json: larger than 16 MiB, 16777217 bytes)",
        ),
        (member("a.gif", size=2**40), "captions (unexpected end of data)"),
        (
            member("x", type=tarfile.XHDTYPE, size=2**40),
            "captions (larger than 16 MiB, 1099511627776 bytes)",
        ),
        (
            member("a.txt", b"a") + b"x" * 512 + member("b.txt", b"b"),
            "captions (damaged header at byte 1024)",
        ),
    ],
    ids=range(10),
)
def test_a_tar_of_any_content_is_refused_in_one_line(tmp_path, content, message):
    (tmp_path / "a.tar").write_bytes(content + bytes(1024))
    assert_refused(message, tmp_path, input=f"tars:{tmp_path}/a.tar")


def test_members_that_are_too_large_or_sparse_are_bad_images(tmp_path, capsys):
    large = 300 * 2**20
    with open(tmp_path / "a.tar", "wb") as file:
        file.write(
            member("good.png", encoded(picture(1)))
            + member("sparse.png", bytes(512), type=tarfile.GNUTYPE_SPARSE)
        )
        file.write(member("large.png", size=large))
        file.truncate(file.tell() + large + 1024)
    assert len(records(run(tmp_path, "", input=f"tars:{tmp_path}/a.tar", max_bad=0.9))) == 1
    printed = capsys.readouterr().out
    assert f"a.tar/large (larger than 256 MiB, {large} bytes)" in printed
    assert "a.tar/sparse (a sparse member of its tar)" in printed


def test_a_folder_without_a_shard_is_free_for_another_plan(tmp_path, monkeypatch):
    folder = pictures(tmp_path / "in", 6)
    with monkeypatch.context() as patched:
        patched.setattr("ntm_jax.data.prepare.run._make", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(tmp_path, folder, image_size=9)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["plan.json"]
    run(tmp_path, folder)


def test_a_folder_of_another_plan_is_refused(tmp_path):
    folder = pictures(tmp_path / "in", 6)
    before = files(run(tmp_path, folder))
    with pytest.raises(
        UserError,
        match=r"is being prepared with image_size=8, and this call has 9: choose another --out, or "
        r"remove it",
    ):
        run(tmp_path, folder, image_size=9)
    pictures(folder, 6, label=2)
    with pytest.raises(UserError, match=r"is being prepared with rows_sha256="):
        run(tmp_path, folder)
    assert files(tmp_path / "out") == before
    write_records(str(tmp_path / "others"), {"train": []}, Layout((4, 4, 3), pixel_levels=256))
    with pytest.raises(UserError, match="holds records that another program wrote"):
        run(tmp_path, folder, "others")
