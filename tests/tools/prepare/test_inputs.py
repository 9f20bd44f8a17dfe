"""Preparing records: every kind of input, image and caption, and what is left out."""

import io
import json
import re
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image

from ntm_jax.data.records import Split, read_manifest
from ntm_jax.data.sources import open_source
from ntm_jax.errors import UserError
from ntm_jax.tools.prepare import captioned
from tests.tools.prepare.common import (
    WORDS,
    add,
    choices,
    devkit,
    encoded,
    files,
    picture,
    pictures,
    records,
    run,
    tar_of_tars,
    write_folder,
)


def loaded(data, size=8):
    """The image of a file's bytes, or of pixels, as it is recorded."""
    return captioned.load(lambda _: (data, "", None), size, captioned.Item("key", None)).image


# Inputs


def test_a_folder_becomes_records(tmp_path, capsys):
    out = run(tmp_path, pictures(tmp_path / "in", 10), text=WORDS, shard_size=4)
    layout, splits, _ = read_manifest(str(out))
    names = [f"train-0000{i}.arrayrecord" for i in range(3)]
    hashes = [files(out)[name] for name in names]
    assert splits == {"train": Split(names, [4, 4, 2], hashes)}
    assert (layout.image_shape, layout.pixel_levels, layout.num_classes) == ((8, 8, 3), 256, 3)
    assert (layout.text, layout.captions) == (WORDS, True)
    for i, record in enumerate(records(out)):
        square = Image.fromarray(picture(i)[:, 5:25])
        small = square.resize((8, 8), Image.Resampling.BICUBIC, reducing_gap=3.0)
        np.testing.assert_array_equal(record["image"], np.array(small))
        caption = "a red circle" if i % 2 else "a green circle"
        assert (record["label"], record["caption"]) == (i % 3, caption)
        np.testing.assert_array_equal(record["text"].argmax(1), [0, 1 if i % 2 else 2, 3])
    printed = capsys.readouterr().out
    assert f"--config.data.source=records:{out} '--config.data.text_encoder={WORDS}'" in printed


def test_a_csv_and_names_of_classes(tmp_path):
    folder = write_folder(tmp_path / "in", {f"{i}.png": encoded(picture(i)) for i in range(3)})
    (folder / "metadata.jsonl").unlink()
    (tmp_path / "list.csv").write_text(
        'image,text,label\n0.png,"two\nlines, and ""this""",zebra\n1.png,b,ant\n2.png,c,zebra\n'
    )
    out = run(tmp_path, folder, captions=str(tmp_path / "list.csv"))
    assert [(record["caption"], record["label"]) for record in records(out)] == [
        ('two\nlines, and "this"', 1), ("b", 0), ("c", 1)]
    assert choices(out)["classes"] == ["ant", "zebra"]


def test_a_txt_beside_each_image_is_its_caption(tmp_path):
    texts = {f"{i}.txt": f"picture {i}\n".encode() for i in range(2)}
    folder = write_folder(tmp_path / "in", {f"{i}.png": encoded(picture(i)) for i in range(3)})
    write_folder(folder, texts)
    (folder / "metadata.jsonl").unlink()
    with pytest.raises(UserError, match=r"jsonl is not there, nor a \.txt .* class \(2\.png\)"):
        run(tmp_path, folder)
    (tmp_path / "secret.txt").write_text("elsewhere")
    (folder / "2.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(UserError, match=r"has the file_name 2\.txt, which lies outside"):
        run(tmp_path, folder)
    out = run(tmp_path, folder, follow_outside=True)
    assert [record["caption"] for record in records(out)] == ["picture 0", "picture 1", "elsewhere"]


def test_tars_of_webdataset(tmp_path):
    for i in range(2):
        with tarfile.open(tmp_path / f"{i}.tar", "w") as tar:
            # A key ends at the first dot: no image of key 1.
            add(tar, "x/1.a.PNG", encoded(picture(i)))
            add(tar, "x/2.txt", b"a red circle")
            add(tar, "x/2.jpg", encoded(picture(10 + i), "jpeg"))
            add(tar, "x/3.webp", encoded(picture(20 + i), "webp", lossless=True))
            add(tar, "x/3.json", json.dumps({"caption": "a circle", "label": 7}).encode())
            add(tar, "x/4.txt", b"alone")
            for key in "234":
                add(tar, f"x/{key}.cls", f"{key}\n".encode())
    out = run(tmp_path, "", input=f"tars:{tmp_path}/*.tar", max_bad=0.4)
    assert [record["caption"] for record in records(out)] == ["a red circle", "a circle"] * 2
    assert [record["label"] for record in records(out)] == [2, 7] * 2
    np.testing.assert_array_equal(records(out)[3]["image"], loaded(picture(21)))
    bad = json.loads((out / "train-00000.json").read_text())["bad"]
    assert bad == [["0.tar/x/4", "not there"], ["1.tar/x/4", "not there"]]


def test_imagenets_own_files(tmp_path):
    """Tars in a tar, and a flat tar of the validation images with the devkit: no caption."""
    def grey(value):
        return encoded(np.full((9, 9, 3), value, np.uint8), "jpeg")

    names = ["n3", "n1", "n2"]
    tar_of_tars(tmp_path / "train.tar", {
        name: {f"{name}_{i}.JPEG": grey(40 * int(name[1]) + i) for i in range(2)}
        for name in names})
    with tarfile.open(tmp_path / "val.tar", "w") as tar:
        for i in (2, 0, 1):
            add(tar, f"val_{i}.JPEG", grey(40 * (i + 1)))
    given = {"input": f"tars:{tmp_path}/train.tar", "test_input": f"tars:{tmp_path}/val.tar",
             "test_labels": str(devkit(tmp_path / "kit.tgz", names, [2, 3, 1]))}
    out = run(tmp_path, "", **given)
    assert open_source(f"records:{out}", "train").class_names == ("n1", "n2", "n3")
    for split, count in (("train", 6), ("test", 3)):
        found = records(out, split)
        assert len(found) == count
        for record in found:
            assert record.keys() == {"image", "label"}
            assert round(record["image"].mean() / 40) == record["label"] + 1


def test_a_folder_for_each_class(tmp_path):
    for i, name in enumerate(("train/red bee", "train/ant", "val/red bee")):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.png").write_bytes(encoded(np.full((8, 8, 3), i, np.uint8)))
    (tmp_path / "labels.txt").write_text("red bee\n")
    for name, flags in (("folders", {}), ("list", {"test_labels": str(tmp_path / "labels.txt")})):
        out = run(tmp_path, tmp_path / "train", name, test_input=f"folder:{tmp_path}/val", **flags)
        assert choices(out)["classes"] == ["ant", "red bee"]
        for split, expected in (("train", [(1, 0), (0, 1)]), ("test", [(2, 1)])):
            assert [(r["image"].max(), r["label"]) for r in records(out, split)] == expected


def test_a_tfds_data_set(squares_dir, tmp_path):
    given = {"input": f"tfds:{squares_dir}/squares/1.2.3", "caption_feature": "captions/text"}
    out = run(tmp_path, "", tfds_split="train[:3]+test", **given)
    assert len(records(out)) == 7
    for record in records(out):
        i = int(record["caption"].removeprefix("first "))
        np.testing.assert_array_equal(record["image"], i)
        assert record["label"] == i % 3
    assert open_source(f"records:{out}", "train").class_names == ("ant", "bee", "cat")
    with pytest.raises(UserError, match=r"^the split trian of --input=.*train"):
        run(tmp_path, "", "other", tfds_split="trian", **given)
    name = given["input"]
    out = run(tmp_path, "", "labels", input=name, test_input=name, test_tfds_split="test")
    assert [record["label"] for record in records(out, "test")] == [1, 0, 1, 2]
    assert (choices(out)["classes"], len(records(out))) == (["ant", "bee", "cat"], 10)


def test_a_mirror_image_follows_every_training_image(tmp_path):
    out = run(tmp_path, pictures(tmp_path / "in", 12), flip=True, test=4, shard_size=3)
    train, test = records(out), records(out, "test")
    assert (len(train), len(test)) == (16, 4)
    for first, mirror in zip(train[::2], train[1::2], strict=True):
        np.testing.assert_array_equal(first["image"][:, ::-1], mirror["image"])
        assert (first["caption"], first["label"]) == (mirror["caption"], mirror["label"])


def test_the_split_follows_the_key_alone(tmp_path):
    def held_out(out, test):
        made = records(run(tmp_path, folder, out, test=test), "test")
        return {record["image"].tobytes() for record in made}

    folder = pictures(tmp_path / "in", 40)
    few = held_out("few", 4)
    assert len(few) == 4
    assert few == held_out("share", 0.1)
    assert few < held_out("more", 10)
    # Two captions of one image are in one split.
    rows = [{"file_name": f"{i:03}.png", "caption": f"{i} {j}"} for j in "ab" for i in range(40)]
    out = run(tmp_path, write_folder(folder, {}, rows), "twice", test=10)
    assert len({record["caption"].split()[0] for record in records(out, "test")}) == 5


# Kinds of images


def test_images_of_other_kinds_become_8_bit_rgb():
    grey, red = np.full((8, 8), 100, np.uint8), np.full((8, 8, 3), (200, 30, 40), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    half = np.concatenate([np.zeros((4, 8, 3), np.uint8), np.full((4, 8, 3), 255, np.uint8)])
    cmyk = loaded(encoded(Image.fromarray(red).convert("CMYK"), "jpeg", quality=100))
    assert np.abs(cmyk.astype(int) - red).max() <= 3
    for image, expected in (
        (encoded(grey), 100),
        (encoded(Image.fromarray(np.full((8, 8), 51400, np.uint16))), 200),
        (encoded(half, exif=exif), half[::-1]),
        (encoded(Image.new("RGBA", (9, 9), (9, 9, 9, 0))), 255),
    ):
        np.testing.assert_array_equal(loaded(image), np.broadcast_to(expected, (8, 8, 3)))
    frames = {"save_all": True, "append_images": [Image.fromarray(half)]}
    moving = encoded(Image.fromarray(red), "webp", lossless=True, **frames)
    np.testing.assert_array_equal(loaded(moving), red)


def test_a_large_photograph_keeps_its_content():
    """A JPEG may be decoded at a fraction of its size, at least twice the record's."""
    large = encoded(picture(1, (640, 960), (40, 60)), "jpeg", quality=95)
    full = loaded(np.array(Image.open(io.BytesIO(large))), 160).astype(int)
    assert np.abs(loaded(large, 160) - full).max() <= 6
    assert full.std() > 30


def bomb():
    """A PNG whose header says 20,000 x 20,000."""
    data = bytearray(encoded(np.zeros((4, 4), np.uint8)))
    data[16:24] = (20000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


BAD = {
    "truncated.jpg": lambda: encoded(picture(1, (64, 64)), "jpeg")[:900],
    "page.jpg": lambda: b"<html>",
    "float.png": lambda: encoded(Image.new("F", (8, 8)), "tiff"),
    "bomb.png": bomb,
    "program.png": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n",
}


def test_bad_images_are_counted_named_and_left_out(tmp_path, capsys):
    good = {f"{i}.png": encoded(picture(i)) for i in range(6)}
    folder = write_folder(tmp_path / "in", good | {name: data() for name, data in BAD.items()})
    with (folder / "metadata.jsonl").open("a") as file:
        file.write('{"file_name": "absent.png", "caption": "a"}\n')
    with pytest.raises(UserError, match=r"^6 images are bad, and --max_bad allows 5: .*leave them "
                       r"out; complete shards stay$"):
        run(tmp_path, folder, max_bad=0.49, shard_size=5)
    assert not (tmp_path / "out" / "manifest.json").exists()
    out = run(tmp_path, folder, max_bad=0.5, shard_size=5)
    assert (len(records(out)), choices(out)["bad_images"]) == (6, 6)
    printed = capsys.readouterr().out
    assert "bad images left out: 6 of 12: " in printed
    for name, reason in {
        "page.jpg": "not an image",
        "program.png": "not an image",
        "absent.png": "not there",
        "float.png": "its pixels have more than 16 bits",
        "truncated.jpg": ".*truncated",
        "bomb.png": ".*exceeds limit",
    }.items():
        assert re.search(rf"{name} \({reason}", printed)


# Kinds of captions


def test_missing_and_invalid_captions_become_the_null_caption(tmp_path, capsys):
    names = [f"{i}.png" for i in range(6)]
    rows = [
        b'{"file_name": "0.png", "caption": "a circle"}',
        b'{"file_name": "1.png", "caption": "  "}',
        b'{"file_name": "2.png", "caption": "caf\xe9"}',
        b'{"file_name": "3.png", "caption": "\\ud800 a"}',
        b'{"file_name": "4.png", "caption": null}',
        b'{"file_name": "5.png", "caption": [" a a red circle ", "b"]}',
    ]
    folder = write_folder(tmp_path / "in", {name: encoded(picture(1)) for name in names})
    (folder / "metadata.jsonl").write_bytes(b"\n".join(rows))
    made = records(run(tmp_path, folder, text=WORDS))
    assert [record["caption"] for record in made] == ["a circle", "", "", "", "", "a a red circle"]
    assert [int(record["text_mask"].sum()) for record in made] == [2, 0, 0, 0, 0, 3]
    assert "null captions: 2 empty, 2 not UTF-8\ncaptions cut: 1\n" in capsys.readouterr().out
