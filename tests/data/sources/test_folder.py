"""Folders of image files: finding, decoding and caching images, and the errors."""

import json
import os
import re
import struct
import zlib

import numpy as np
import pytest
from etils import epath
from PIL import Image

from ntm_jax.data import pipeline, regular
from ntm_jax.data.sources import folder, open_source
from ntm_jax.errors import UserError
from tests.data.sources.common import labels, save, values


def test_folder_splits_its_sorted_files_and_labels_its_sub_folders(tmp_path):
    for i in range(20):
        save(tmp_path / ("zebra" if i % 2 else "ant") / "deep" / f"{i:02}.png", i, mode="L")
    save(tmp_path / "ant" / ".hidden.png", 99, mode="L")
    (tmp_path / "ant" / "notes.txt").write_text("not an image")
    in_order = np.array(
        [*range(0, 20, 2), *range(1, 20, 2)]
    )  # ant/deep/00, 02, .., zebra/deep/01, 03, ..
    expected = in_order[np.random.RandomState(0).permutation(20)].tolist()
    train, test, both = (
        open_source(f"folder:{tmp_path}", split) for split in ("train", "test", "all")
    )
    assert train.image_shape == (8, 8, 1)
    assert (train.pixel_levels, train.num_classes) == (256, 2)
    assert (values(train), values(test), values(both)) == (expected[:18], expected[18:], expected)
    assert labels(both) == [value % 2 for value in expected]
    assert train.version == test.version


def test_folder_with_train_and_test(tmp_path):
    for i in range(3):
        save(tmp_path / "train" / "cat" / f"{i}.jpg", (i * 40,) * 3)
    save(tmp_path / "test" / "ant" / "0.webp", "white")
    save(tmp_path / "test" / "cat" / "1.bmp", (0, 0, 0))
    train, test, both = (
        open_source(f"folder:{tmp_path}", split) for split in ("train", "test", "all")
    )
    assert (values(train), labels(train)) == ([0, 40, 80], [1, 1, 1])
    assert (values(test), labels(test)) == ([255, 0], [0, 1])
    assert labels(both) == [1, 1, 1, 0, 1]
    assert both.num_classes == 2


@pytest.mark.parametrize(
    ("files", "refused"),
    [
        (["train/a/0.png", "val/a/0.png"],
         "holds train/ and no test/: rename or link a folder such as val/ to test/, or give fol"),
        (["train/0.png", "validation/0.png"], "holds train/ and no test/"),
        (["train/a/0.png", "rest/a/0.png"], "holds train/ and no test/"),
        (["train/0.png", "bus/0.png"], ""),  # classes
    ],
)
def test_folder_with_train_and_without_test(tmp_path, files, refused):
    for file in files:
        save(tmp_path / file, (1, 1, 1))
    if refused:
        with pytest.raises(UserError, match=refused):
            open_source(f"folder:{tmp_path}", "all")
    else:
        assert open_source(f"folder:{tmp_path}", "all").class_names == ("bus", "train")


def test_folder_without_sub_folders_has_no_labels(tmp_path):
    save(tmp_path / "a.png", 7, mode="L")
    save(tmp_path / "more" / "b.PNG", (1, 2, 3))
    source = open_source(f"folder:{tmp_path}", "all")
    assert (source.num_classes, labels(source)) == (0, [-1, -1])
    # With one image in colour all are read in colour.
    assert sorted(source.records[i]["image"][0, 0].tolist() for i in range(2)) == [
        [1, 2, 3],
        [7, 7, 7],
    ]


def test_transparency_becomes_white_and_exif_rotation_is_applied(tmp_path):
    save(tmp_path / "a" / "clear.png", (255, 0, 0, 0), mode="RGBA")
    source = open_source(f"folder:{tmp_path}", "all")
    assert source.records[0]["image"][0, 0].tolist() == [255, 255, 255]
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    Image.new("RGB", (8, 4)).save(tmp_path / "a" / "clear.png", exif=exif)
    assert open_source(f"folder:{tmp_path}", "all").image_shape == (8, 4, 3)


def test_a_scanned_folder_is_decoded_once(tmp_path, monkeypatch):
    decoded = []
    decode = folder._decode
    monkeypatch.setattr(folder, "_decode", lambda path: decoded.append(path.name) or decode(path))
    monkeypatch.setattr(folder, "_CACHE", tmp_path / "cache")
    root = tmp_path / "images"
    for i in range(5):
        save(root / f"{i}.png", i, mode="L")
    first = open_source(f"folder:{root}", "train")
    assert sorted(decoded) == [f"{i}.png" for i in range(5)]
    decoded.clear()
    assert open_source(f"folder:{root}", "train").version == first.version
    assert not decoded
    save(root / "new.png", 5, mode="L")
    assert open_source(f"folder:{root}", "train").version != first.version
    assert decoded == ["new.png"]
    assert not (tmp_path / "cache").exists()
    # If the manifest cannot be written, here because a folder is in its place, the cache holds it.
    decoded.clear()
    (root / ".ntm_manifest.json").unlink()
    (root / ".ntm_manifest.json").mkdir()
    for _ in range(2):
        open_source(f"folder:{root}", "train")
    assert len(decoded) == 6
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".json"]
    assert not list(root.glob("*.part"))


def test_undecodable_images_are_found_when_the_folder_is_opened(tmp_path):
    for i in range(9):
        save(tmp_path / f"{i}.png", (i, i, i), (64, 64))
    content = (tmp_path / "3.png").read_bytes()
    (tmp_path / "3.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "5.png").write_text("<html>")
    with pytest.raises(
        UserError,
        match=re.escape(
            f"2 of 9 images in {tmp_path} cannot be decoded (3.png, 5.png): remove them"
        ),
    ):
        open_source(f"folder:{tmp_path}", "train")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{i}.png" for i in range(9)]


def test_a_few_undecodable_images_are_left_out_and_named(tmp_path):
    for i in range(30):
        save(tmp_path / f"{i:02}.png", (i, i, i), (8, 8))
    intact = open_source(f"folder:{tmp_path}", "all")
    (tmp_path / "30.png").write_text("<html>")
    for _ in range(2):  # the second time by the manifest
        source = open_source(f"folder:{tmp_path}", "all")
        assert len(source.records) == 30
        assert source.skipped == "1 of 31 images cannot be decoded and are left out: 30.png"
    assert not intact.skipped
    images = [source.records[i]["image"][0, 0, 0] for i in range(30)]
    assert images == [intact.records[i]["image"][0, 0, 0] for i in range(30)]
    (tmp_path / "31.png").write_text("<html>")
    with pytest.raises(UserError, match=r"2 of 32 images .*: remove them; at most 1 are left out"):
        open_source(f"folder:{tmp_path}", "all")


def test_captions_of_a_list_and_class_names(tmp_path):
    for i in range(20):
        name = "cats" if i % 2 else "dogs"
        save(tmp_path / name / f"{i:02}.png", (i, i, i), (8, 8))
    source = open_source(f"folder:{tmp_path}", "train")
    assert (source.class_names, source.captions) == (("cats", "dogs"), None)
    assert source.no_captions == "there is no metadata.jsonl or metadata.csv in it"
    rows = [f"{'cats' if i % 2 else 'dogs'}/{i:02}.png,animal {i}" for i in range(20)]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,caption", *rows]))
    source = open_source(f"folder:{tmp_path}", "train")
    for i, caption in enumerate(source.captions):
        record = source.records[i]
        assert record["caption"] == caption == f"animal {record['image'][0, 0, 0]}"
    words = f"words:2:animal {' '.join(map(str, range(20)))}"
    assert open_source(f"folder:{tmp_path}", "train", text=words).text_width == 44
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,caption", *rows[:-1]]))
    with pytest.raises(UserError, match=r"has no captions \(.*no row for 1 images: cats/19\.png"):
        open_source(f"folder:{tmp_path}", "train", text="words:2:animal")


def test_captions_and_names_that_are_not_utf_8(tmp_path):
    for i in range(4):
        save(tmp_path / os.fsdecode((b"caf\xe9", b"caf\xe8")[i % 2]) / f"{i}.png", (i, i, i))
    rows = [b'{"file_name": "caf\xe9/0.png", "caption": "caf\xe9"}',
            b'{"file_name": "caf\xe8/1.png", "caption": "\\ud83d"}',
            b'{"file_name": "caf\xe9/2.png", "caption": "\xc3\xa9"}',
            b'{"file_name": "caf\xe8/3.png", "caption": ""}']
    (tmp_path / "metadata.jsonl").write_bytes(b"\n".join(rows))
    source = open_source(f"folder:{tmp_path}", "all")
    assert source.class_names == (r"caf\udce8", r"caf\udce9")
    found = {int(record["image"].max()): (record["caption"], record["label"])
             for record in source.records}
    assert found == {0: ("", 1), 1: ("", 0), 2: ("é", 1), 3: ("", 0)}
    assert sorted(source.captions) == ["", "", "", "é"]
    assert source.skipped == (
        r"2 of 4 captions are not UTF-8 and count as empty: caf\udce8/1.png, caf\udce9/0.png")


def test_pairs_of_a_list_are_records_with_a_rejected_image(tmp_path):
    rows = []
    for i in range(4):
        save(tmp_path / f"good{i}.png", 100 + i, mode="L")
        save(tmp_path / f"bad{i}.png", i, mode="L")
        rows.append({"file_name": f"good{i}.png", "caption": f"number {i}"}
                    | ({"rejected": f"bad{i}.png"} if i else {}))
    listed = tmp_path / "metadata.jsonl"
    listed.write_text("\n".join(map(json.dumps, rows)))
    source = open_source(f"folder:{tmp_path}", "all", 4)
    assert len(source.records) == 3  # one image has no rejected one
    for record, caption in zip(source.records, source.captions, strict=True):
        assert record["image"].shape == record["rejected"].shape == (4, 4, 1)
        number = int(record["rejected"].max())
        assert record["image"].max() == 100 + number
        assert caption == record["caption"] == f"number {number}"
    batch = next(pipeline.evaluation_batches(source, 2, 3, 0, 1))
    assert batch["rejected"].shape == batch["x"].shape == (3, 4, 4)
    listed.write_text("\n".join(map(json.dumps, [*rows, {"file_name": "x.png", "caption": "x"}])))
    assert open_source(f"folder:{tmp_path}", "all").skipped == (
        "1 of 5 rows of its list name no image there: x.png")
    for wrong, message in ((rows[0], "line 5 has the file_name good0.png again: leave one row"),
                           (rows[0] | {"caption": 7}, "line 5 has .*: expected texts as")):
        listed.write_text("\n".join(map(json.dumps, [*rows, wrong])))
        with pytest.raises(UserError, match=message):
            open_source(f"folder:{tmp_path}", "all")
    listed.write_text("\n".join(map(json.dumps, [*rows[:3], rows[3] | {"rejected": "none.png"}])))
    with pytest.raises(UserError, match=r"none\.png of it cannot be decoded or is not there"):
        open_source(f"folder:{tmp_path}", "all")


def test_one_image_cannot_be_split(tmp_path):
    save(tmp_path / "a.png", (1, 2, 3), (8, 8))
    with pytest.raises(UserError, match=r"split 'train' of folder:.* holds no records: it needs"):
        open_source(f"folder:{tmp_path}", "train")


def grey_alpha_png(value):
    """A PNG of 8 x 8 opaque grey pixels of 16 bits with alpha."""
    def chunk(kind, data):
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    rows = (b"\0" + struct.pack(">HH", value, 65535) * 8) * 8
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 4, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def test_16_bits_are_rounded_to_8_and_more_are_refused(tmp_path):
    save(tmp_path / "deep.png", 1000, mode="I;16")
    save(tmp_path / "white.png", 65535, mode="I;16")
    source = open_source(f"folder:{tmp_path}", "all")
    assert (source.image_shape, sorted(values(source))) == ((8, 8, 1), [4, 255])
    (tmp_path / "pair.png").write_bytes(grey_alpha_png(51400))
    assert open_source(f"folder:{tmp_path}", "all").image_shape == (8, 8, 1)
    (tmp_path / "pair.png").unlink()
    Image.new("F", (8, 8), 0.5).save(tmp_path / "float.png", "TIFF")
    assert open_source(f"folder:{tmp_path}", "all").skipped == (
        "1 of 3 images cannot be decoded and are left out: float.png")


def test_a_large_folder_is_checked_as_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "_SCAN_LIMIT", 8)
    monkeypatch.setattr(folder, "_SAMPLE", 2)
    for i in range(10):
        save(tmp_path / f"{i}.png", i, mode="L")
    (tmp_path / "1.png").write_text("<html>")
    save(tmp_path / "2.png", 2, (8, 9), mode="L")
    save(tmp_path / "3.png", (1, 2, 3))
    source = open_source(f"folder:{tmp_path}", "all")  # samples 0 and 5
    assert source.image_shape == (8, 8, 1)
    messages = {}
    for i in range(10):
        try:
            source.records[i]
        except UserError as error:
            messages[source.records.records.files[i]] = str(error)
    assert sorted(messages) == ["1.png", "2.png", "3.png"]
    assert f"image {tmp_path / '1.png'} cannot be decoded" in messages["1.png"]
    assert "2.png is 8x9x1, others 8x8x1): set data.image_size" in messages["2.png"]
    assert "3.png has colours" in messages["3.png"]


def test_links_are_followed_and_their_loops_walked_once(tmp_path):
    root = tmp_path / "images"
    save(root / "z" / "1.png", 1, mode="L")
    save(root / "z" / "deep" / "2.png", 2, mode="L")
    save(tmp_path / "elsewhere" / "3.png", 3, mode="L")
    for link, target in (
        ("z/deep/loop", root),
        ("again", root / "z"),
        ("linked", tmp_path / "elsewhere"),
        ("self", root / "self"),
        ("4.png", tmp_path / "elsewhere" / "3.png"),
    ):
        (root / link).symlink_to(target)
    found = folder._walk(epath.Path(root), "")
    assert sorted(found) == ["4.png", "linked/3.png", "z/1.png", "z/deep/2.png"]
    assert sorted(values(open_source(f"folder:{root}", "all"))) == [1, 2, 3, 3]


def test_only_regular_files_are_read(tmp_path):
    save(tmp_path / "folder.png" / "1.png", 1, mode="L")
    assert values(open_source(f"folder:{tmp_path}", "all")) == [1]
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "absent.png").symlink_to("nowhere")
    with pytest.raises(
        UserError,
        match=r"3 of 4 images in .* cannot be decoded \(absent\.png, pipe\.png, zero\.png\)",
    ):
        open_source(f"folder:{tmp_path}", "all")


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    with open(tmp_path / "sparse.png", "wb") as file:
        file.truncate(10**12)
    with pytest.raises(ValueError, match="larger than 256 MiB, 1000000000000 bytes"):
        regular.read(tmp_path / "sparse.png")
    with pytest.raises(
        UserError, match=r"1 of 1 images in .* cannot be decoded \(sparse\.png\): remove them"
    ):
        open_source(f"folder:{tmp_path}", "all")


def test_a_damaged_manifest_only_causes_another_scan(tmp_path):
    save(tmp_path / "0.png", 7, mode="L")
    version = open_source(f"folder:{tmp_path}", "all").version
    (tmp_path / ".ntm_manifest.json").write_bytes(b'{"0.p')
    source = open_source(f"folder:{tmp_path}", "all")
    assert (source.version, source.image_shape, values(source)) == (version, (8, 8, 1), [7])


def test_an_empty_folder_is_refused_with_the_expected_suffixes(tmp_path):
    with pytest.raises(UserError, match=r"holds no images: expected files ending in \.png, \.jpg"):
        open_source(f"folder:{tmp_path}", "train")
