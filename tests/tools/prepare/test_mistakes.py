"""Preparing records from invalid inputs: each is refused in one line."""

import re

import pytest

from ntm_jax.data.records import Layout, write_manifest
from ntm_jax.errors import UserError
from tests.tools.prepare.common import (
    WORDS,
    encoded,
    files,
    picture,
    pictures,
    records,
    run,
    tar_of_tars,
    write_folder,
)


def assert_refused(message, tmp_path, **given):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        run(tmp_path, tmp_path / "in", **given)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_an_invalid_input_is_refused(tmp_path, squares_dir):
    pictures(tmp_path / "in", 3)
    table = tmp_path / "a.csv"
    table.write_text("file_name,caption,label\na.png,a,b\nb.png,a barn, in snow,b")
    for given, message in (
        ({"captions": str(table)}, "a.csv line 3 is not understood (it has more fields than the "
         "header): expected a .jsonl or .csv of file_name, caption, and quotes around a caption"),
        ({"input": "folder:/no/such"}, "--input=folder:/no/such is not there"),
        ({"input": f"tfds:{squares_dir}/squares/1.2.3", "caption_feature": "title"},
         "has no feature 'title' of captions: "),
    ):
        assert_refused(message, tmp_path, **given)


def test_a_test_input_that_does_not_fit_is_refused(tmp_path):
    for name in ("train/ant", "train/bee", "val/ant", "val/cat", "flat", "empty"):
        (tmp_path / "in" / name).mkdir(parents=True)
        if name != "empty":
            (tmp_path / "in" / name / "a.png").write_bytes(encoded(picture(1)))
    root = f"folder:{tmp_path}/in"
    (tmp_path / "labels").write_text("ant\nbee\n")
    nested = tar_of_tars(tmp_path / "a.tar", {"ant": {"1.png": encoded(picture(1))}})
    cut = tmp_path / "cut.tar"
    cut.write_bytes(nested.read_bytes()[:2000])
    tar_of_tars(tmp_path / "none.tar", {"ant": {"1.gz": b"a"}})
    for given, message in (
        ({"input": root}, "holds the splits"),
        ({"input": f"{root}/flat"}, "metadata.jsonl is not there, nor"),
        ({"test_input": f"{root}/val"}, f"--test_input={root}/val has the class cat, which the "
         "training images lack (1 of 2 classes): "),
        ({"test_input": f"{root}/empty"}, f"--test_input={root}/empty lists no images"),
        ({"test_input": f"{root}/flat", "test_labels": str(tmp_path / "labels")},
         f"--test_labels has 2 lines, and --test_input={root}/flat 1 images"),
        ({"test_input": f"{root}/flat", "test_labels": str(cut)}, "is neither a text of classes"),
        ({"test_input": f"tars:{cut}"}, "is not a complete, uncompressed tar of images"),
        ({"input": f"tars:{tmp_path}/none.tar"}, "lists no images: expected at least one"),
        ({"text": WORDS}, "encodes captions, and "),
    ):
        assert_refused(message, tmp_path, **{"input": f"{root}/train"} | given)


def test_files_outside_the_folder_are_read_only_with_follow_outside(tmp_path):
    elsewhere = write_folder(tmp_path / "elsewhere", {"a.png": encoded(picture(1))})
    folder = write_folder(tmp_path / "in", {"b.png": encoded(picture(2))})
    (folder / "link.png").symlink_to(elsewhere / "a.png")
    (folder / "linked").symlink_to(elsewhere)
    (folder / "inside").symlink_to(folder)

    def lists(*names):
        return write_folder(folder, {}, [{"file_name": name, "caption": "a"} for name in names])

    outside = ["../elsewhere/a.png", str(elsewhere / "a.png"), "link.png", "linked/a.png"]
    for name in (*outside, "inside/../../elsewhere/a.png"):
        lists("b.png", name)
        assert_refused("which lies outside", tmp_path)
    lists("b.png", "inside/b.png", "../in/b.png", str(folder / "b.png"))
    assert len(records(run(tmp_path, folder, "within"))) == 4
    lists(*outside)
    assert len(records(run(tmp_path, folder, follow_outside=True))) == 4


def test_a_folder_of_another_plan_is_refused(tmp_path):
    folder = pictures(tmp_path / "in", 6)
    before = files(run(tmp_path, folder))
    with pytest.raises(UserError, match="is being prepared with image_size=8, and this call has 9"):
        run(tmp_path, folder, image_size=9)
    pictures(folder, 6, label=2)
    with pytest.raises(UserError, match=r"is being prepared with rows_sha256="):
        run(tmp_path, folder)
    assert files(tmp_path / "out") == before
    (tmp_path / "others").mkdir()
    write_manifest(str(tmp_path / "others"), Layout((4, 4, 3), pixel_levels=256), {})
    with pytest.raises(UserError, match="holds records that another program wrote"):
        run(tmp_path, folder, "others")
