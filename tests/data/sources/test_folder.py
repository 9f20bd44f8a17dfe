"""Folders of image files: finding, decoding and caching images, and the errors."""

import json
import os

import numpy as np
import pytest

from ntm_jax.data import pipeline
from ntm_jax.data.sources import folder, open_source
from ntm_jax.errors import UserError
from tests.data.sources.common import labels, save, values


def opened(folder, split="all", *given, **named):
    return open_source(f"folder:{folder}", split, *given, **named)


def test_folder_splits_its_sorted_files_and_labels_its_sub_folders(tmp_path):
    for i in range(20):
        save(tmp_path / ("zebra" if i % 2 else "ant") / "deep" / f"{i:02}.png", i, mode="L")
    save(tmp_path / "ant" / ".hidden.png", 99, mode="L")
    (tmp_path / "ant" / "notes.txt").write_text("not an image")
    (tmp_path / "ant" / "loop").symlink_to(tmp_path)
    in_order = np.array([*range(0, 20, 2), *range(1, 20, 2)])  # ant/deep/00, .., zebra/deep/01, ..
    expected = in_order[np.random.RandomState(0).permutation(20)].tolist()
    train, test, both = (opened(tmp_path, split) for split in ("train", "test", "all"))
    assert (train.image_shape, train.pixel_levels) == ((8, 8, 1), 256)
    assert train.class_names == ("ant", "zebra")
    assert (values(train), values(test), values(both)) == (expected[:18], expected[18:], expected)
    assert labels(both) == [value % 2 for value in expected]
    assert train.version == test.version


def test_folder_with_train_and_test(tmp_path):
    for i in range(3):
        save(tmp_path / "train" / "cat" / f"{i}.jpg", (i * 40,) * 3)
    save(tmp_path / "val" / "ant" / "0.webp", "white")
    save(tmp_path / "val" / "cat" / "1.bmp", (0, 0, 0))
    with pytest.raises(UserError, match="holds train/ and no test/: rename or link a folder such"):
        opened(tmp_path)
    (tmp_path / "test").symlink_to("val")
    train, test, both = (opened(tmp_path, split) for split in ("train", "test", "all"))
    assert (values(train), labels(train)) == ([0, 40, 80], [1, 1, 1])
    assert (values(test), labels(test)) == ([255, 0], [0, 1])
    assert (labels(both), both.num_classes) == ([1, 1, 1, 0, 1], 2)


def test_folder_without_sub_folders_has_no_labels(tmp_path):
    save(tmp_path / "deep.png", 1000, mode="I;16")  # 16 bits, rounded to 8
    source = opened(tmp_path)
    assert (source.num_classes, labels(source)) == (0, [-1])
    assert source.records[0]["image"][0, 0].tolist() == [4]
    save(tmp_path / "train" / "b.PNG", (1, 2, 3))  # a class, as there is no val/
    # With one image in colour all are read in colour.
    found = sorted(record["image"][0, 0].tolist() for record in opened(tmp_path).records)
    assert found == [[1, 2, 3], [4, 4, 4]]


def test_a_scanned_folder_is_decoded_once(tmp_path, monkeypatch):
    decoded = []
    read = folder.read
    monkeypatch.setattr(folder, "read", lambda path: decoded.append(path.name) or read(path))
    root = tmp_path / "images"

    def scan():
        decoded.clear()
        return opened(root).version, sorted({*decoded} - {folder._MANIFEST})

    for i in range(3):
        save(root / f"{i}.png", i, mode="L")
    version, first = scan()
    assert first == ["0.png", "1.png", "2.png"]
    assert scan() == (version, [])
    save(root / "new.png", 5, mode="L")
    changed, new = scan()
    assert (changed != version, new) == (True, ["new.png"])


def test_a_few_undecodable_images_are_left_out_and_named(tmp_path):
    for i in range(30):
        save(tmp_path / f"{i:02}.png", (i, i, i), (64, 64))
    intact = values(opened(tmp_path))
    (tmp_path / "30.png").write_bytes((tmp_path / "29.png").read_bytes()[:80])
    for _ in range(2):  # the second time by the manifest
        source = opened(tmp_path)
        assert values(source) == intact
        assert source.notes == "1 of 31 images cannot be decoded and are left out: 30.png"
    (tmp_path / "31.png").write_text("<html>")
    with pytest.raises(UserError, match=r"2 of 32 images in .* cannot be decoded \(30\.png, 31\.p"
                       r"ng\): remove them; at most 1 are left out"):
        opened(tmp_path)


def test_captions_of_a_list(tmp_path):
    for i in range(20):
        save(tmp_path / f"{i:02}.png", (i, i, i))
    with pytest.raises(UserError, match=r"has no captions, which a folder has in its metadata"):
        opened(tmp_path, "train", text="words:2:animal")
    rows = [f"{i:02}.png,animal {i}" for i in range(20)]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,caption", *rows]))
    words = f"words:2:animal {' '.join(map(str, range(20)))}"
    source = opened(tmp_path, "train", text=words)
    assert source.text_width == 44
    for record, caption in zip(source.records, source.captions, strict=True):
        assert record["caption"] == caption == f"animal {record['image'][0, 0, 0]}"
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,caption", *rows[:-1]]))
    assert opened(tmp_path).captions is None
    with pytest.raises(UserError, match=r"has no captions, .* no row for 1 images: 19\.png"):
        opened(tmp_path, text=words)


def test_captions_in_a_txt_beside_each_image(tmp_path, monkeypatch):
    for i in range(10):
        save(tmp_path / "some" / f"{i}.png", (i, i, i))
        (tmp_path / "some" / f"{i}.txt").write_bytes(b"\xef\xbb\xbfanimal %d\r\n" % i)
    (tmp_path / "some" / "3.txt").write_bytes(b"\xff")  # not UTF-8
    for name in ("readme.txt", "README.TXT"):
        (tmp_path / name).write_text("of no image")
    before = opened(tmp_path)
    monkeypatch.setattr(folder, "_SAMPLE", 5)
    for limit in (folder._SCAN_LIMIT, 9):  # beyond the limit they are read with their images
        monkeypatch.setattr(folder, "_SCAN_LIMIT", limit)
        for record, caption in zip((source := opened(tmp_path)).records, source.captions,
                                   strict=True):
            number = record["image"][0, 0, 0]
            assert record["caption"] == caption == ("" if number == 3 else f"animal {number}")
    monkeypatch.undo()
    (tmp_path / "some" / "4.txt").write_text("a changed animal")
    assert opened(tmp_path).version != before.version
    (tmp_path / "some" / "4.txt").unlink()
    assert opened(tmp_path).captions is None
    assert opened(tmp_path).notes.endswith("there is no .txt for 1 images: some/4.png")
    os.mkfifo(tmp_path / "some" / "4.txt")
    with pytest.raises(UserError, match=r"4\.txt is not a regular file"):
        opened(tmp_path)
    listed = [f'{{"file_name": "some/{i}.png", "caption": "listed"}}' for i in range(10)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(listed))  # comes before any .txt
    assert set(opened(tmp_path).captions) == {"listed"}


def test_pairs_of_a_list_are_records_with_a_rejected_image(tmp_path):
    rows = []
    for i in range(4):
        save(tmp_path / f"good{i}.png", 100 + i, mode="L")
        save(tmp_path / f"bad{i}.png", i, mode="L")
        rows.append({"file_name": f"good{i}.png", "caption": f"number {i}"}
                    | ({"rejected": f"bad{i}.png"} if i else {}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = opened(tmp_path, "all", 4)
    assert len(source.records) == 3  # one image has no rejected one
    for record, caption in zip(source.records, source.captions, strict=True):
        assert record["image"].shape == record["rejected"].shape == (4, 4, 1)
        number = int(record["rejected"].max())
        assert record["image"].max() == 100 + number
        assert caption == record["caption"] == f"number {number}"
    batch = next(pipeline.evaluation_batches(source, 2, 3, 0, 1))
    assert batch["rejected"].shape == batch["x"].shape == (3, 4, 4)


def test_a_large_folder_is_checked_as_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "_SCAN_LIMIT", 8)
    monkeypatch.setattr(folder, "_SAMPLE", 2)
    for i in range(10):
        save(tmp_path / f"{i}.png", i, mode="L")
    (tmp_path / "1.png").write_text("<html>")
    save(tmp_path / "2.png", 2, (8, 9), mode="L")
    save(tmp_path / "3.png", (1, 2, 3))
    source = opened(tmp_path)  # samples 0 and 5
    assert source.image_shape == (8, 8, 1)
    place = np.random.RandomState(0).permutation(10).tolist().index
    assert source.records[place(4)]["image"].max() == 4
    for file, message in ((1, "1.png cannot be decoded"), (2, "2.png is 8x9x1, others 8x8x1"),
                          (3, r"3.png has an image of uint8 \[8, 8, 3\]")):
        with pytest.raises(UserError, match=message):
            source.records[place(file)]


def test_only_regular_files_of_a_bounded_size_are_read(tmp_path):
    save(tmp_path / "folder.png" / "1.png", 1, mode="L")
    assert values(opened(tmp_path)) == [1]
    with open(tmp_path / "sparse.png", "wb") as file:
        file.truncate(10**12)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"^3 of 4 images .* \(pipe\.png, sparse\.png, zero\.png"):
        opened(tmp_path)


def test_too_few_images_are_refused(tmp_path):
    save(tmp_path / "a.png", (1, 2, 3))
    with pytest.raises(UserError, match=r"split 'train' of folder:.* is empty: it needs"):
        opened(tmp_path, "train")
