"""Captioned images to records: inputs, bad images and captions, and interrupted runs."""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from ntm_jax.data.prepare import Choices, captioned, prepare
from ntm_jax.data.prepare.loading import make_pool
from ntm_jax.data.records import Layout, read_manifest, write_records
from ntm_jax.data.sources import open_source
from ntm_jax.errors import UserError
from tests.common import ROOT, environment, python

WORDS = "words:3:a red green circle"


def picture(seed, size=(20, 30), detail=(3, 4)):
    """A random smooth image [H, W, 3] uint8."""
    coarse = np.random.default_rng(seed).integers(256, size=(*detail, 3), dtype=np.uint8)
    return np.array(Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC))


def encoded(image, kind="png", **options):
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(
        file, kind, **options
    )
    return file.getvalue()


def write_folder(folder, files, rows=None):
    """Writes files {name: bytes} and metadata.jsonl with `rows`, by default a caption "a" each."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    lines = [
        json.dumps(row) for row in (rows or [{"file_name": name, "caption": "a"} for name in files])
    ]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def pictures(folder, count, **keys):
    """A folder of `count` images with captions and labels."""
    files = {f"{i:03}.png": encoded(picture(i)) for i in range(count)}
    captions = ["a green circle", "a red circle"]
    return write_folder(
        folder,
        files,
        [
            {"file_name": name, "caption": captions[i % 2], "label": i % 3, **keys}
            for i, name in enumerate(files)
        ],
    )


def run(tmp_path, folder, out="out", **options):
    choices = {field.name for field in dataclasses.fields(Choices)}
    given = {"image_size": 8, "test": 0, "input": f"folder:{folder}"} | {
        key: options.pop(key) for key in choices & options.keys()
    }
    prepare(Choices(**given), str(tmp_path / out), **options)
    return tmp_path / out


def records(folder, split="train"):
    source = open_source(f"records:{folder}", split)
    return [source.records[i] for i in range(len(source.records))]


def choices(folder):
    return read_manifest(str(folder))[0].choices


def files(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


# Inputs


def test_a_folder_becomes_records(tmp_path, capsys):
    out = run(tmp_path, pictures(tmp_path / "in", 10), text=WORDS, shard_size=4)
    layout, splits, _ = read_manifest(str(out))
    names = [f"train-0000{i}.arrayrecord" for i in range(3)]
    assert splits == {
        "train": {
            "shards": names,
            "counts": [4, 4, 2],
            "sha256": [files(out)[name] for name in names],
        }
    }
    assert (
        layout.image_shape,
        layout.pixel_levels,
        layout.num_classes,
        layout.text,
        layout.captions,
    ) == ((8, 8, 3), 256, 3, WORDS, True)
    for i, record in enumerate(records(out)):
        square = Image.fromarray(picture(i)[:, 5:25]).resize(
            (8, 8), Image.Resampling.BICUBIC, reducing_gap=3.0
        )
        np.testing.assert_array_equal(record["image"], np.array(square))
        assert (record["label"], record["caption"]) == (
            i % 3,
            "a red circle" if i % 2 else "a green circle",
        )
        np.testing.assert_array_equal(record["text"].argmax(1), [0, 1 if i % 2 else 2, 3])
    printed = capsys.readouterr().out
    assert "records: 10 in train; 3 shards" in printed
    assert (
        "bad images left out: 0 of 10\nnull captions: 0 empty, 0 not UTF-8\ncaptions cut: 0\n"
        in printed
    )
    assert f"--config.data.source=records:{out} '--config.data.text={WORDS}'" in printed


def test_a_csv_and_names_of_classes(tmp_path):
    folder = write_folder(tmp_path / "in", {f"{i}.png": encoded(picture(i)) for i in range(3)})
    (folder / "metadata.jsonl").unlink()
    (tmp_path / "list.csv").write_text(
        'image,text,label\n0.png,"two\nlines, and ""this""",zebra\n1.png,b,ant\n2.png,c,zebra\n'
    )
    out = run(tmp_path, folder, captions=str(tmp_path / "list.csv"))
    assert [(record["caption"], record["label"]) for record in records(out)] == [
        ('two\nlines, and "this"', 1),
        ("b", 0),
        ("c", 1),
    ]
    assert choices(out)["classes"] == ["ant", "zebra"]
    (folder / "metadata.csv").write_text("file_name,caption\n1.png,found by itself\n")
    assert [record["caption"] for record in records(run(tmp_path, folder, "second"))] == [
        "found by itself"
    ]


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def test_tars_of_webdataset(tmp_path):
    for i in range(2):
        with tarfile.open(tmp_path / f"{i}.tar", "w") as tar:
            add(
                tar, "x/1.a.PNG", encoded(picture(i))
            )  # a key ends at the first dot: no image of key 1
            add(tar, "x/2.txt", b"a red circle")
            add(tar, "x/2.jpg", encoded(picture(10 + i), "jpeg"))
            add(tar, "x/3.webp", encoded(picture(20 + i), "webp", lossless=True))
            add(tar, "x/3.json", json.dumps({"caption": "a circle", "width": 3}).encode())
            add(tar, "x/4.txt", b"alone")
            add(tar, "x/5.png", encoded(picture(30 + i)))
    out = run(tmp_path, "", input=f"tars:{tmp_path}/*.tar", max_bad=0.3)
    assert [record["caption"] for record in records(out)] == ["a red circle", "a circle", ""] * 2
    np.testing.assert_array_equal(
        records(out)[4]["image"],
        captioned.load(lambda item: (picture(21), "", None), 8, captioned.Item("", None)).image,
    )
    bad = json.loads((out / "train-00000.json").read_text())["bad"]
    assert bad == [["0.tar/x/4", "not there"], ["1.tar/x/4", "not there"]]


class Captioned(tfds.core.GeneratorBasedBuilder):
    """Six images, each with two captions."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(num_classes=4),
            "captions": tfds.features.Sequence({"text": tfds.features.Text()}),
            "title": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(6), "test": self._generate_examples(2)}

    def _generate_examples(self, count):
        for i in range(count):
            texts = [{"text": f"first {i}"}, {"text": f"second {i}"}]
            yield (
                i,
                {
                    "image": io.BytesIO(encoded(picture(i))),
                    "label": i % 4,
                    "captions": texts,
                    "title": f"title {i}",
                },
            )


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    Captioned(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder / "captioned" / "1.0.0"


def test_a_tfds_data_set(tfds_folder, tmp_path):
    first = run(
        tmp_path, "", input=f"tfds:{tfds_folder}", caption_feature="captions/text", workers=1
    )
    assert sorted(record["caption"] for record in records(first)) == [
        f"first {i}" for i in range(6)
    ]
    for record in records(first):
        i = int(record["caption"][-1])
        np.testing.assert_array_equal(
            record["image"],
            captioned.load(
                lambda _, i=i: (picture(i), "", None), 8, captioned.Item("", None)
            ).image,
        )
        assert record["label"] == i % 4
    titles = run(
        tmp_path,
        "",
        "titles",
        input=f"tfds:{tfds_folder}",
        caption_feature="title",
        tfds_split="train[:3]+test",
    )
    assert len(records(titles)) == 5
    assert read_manifest(str(titles))[0].num_classes == 4


def test_a_mirror_image_follows_every_training_image(tmp_path):
    out = run(tmp_path, pictures(tmp_path / "in", 12), flip=True, test=4, shard_size=3)
    train, test = records(out), records(out, "test")
    assert (len(train), len(test)) == (16, 4)
    for first, mirror in zip(train[::2], train[1::2], strict=True):
        np.testing.assert_array_equal(first["image"][:, ::-1], mirror["image"])
        assert np.abs(first["image"].astype(int) - mirror["image"]).max() > 20
        assert (first["caption"], first["label"]) == (mirror["caption"], mirror["label"])


def test_the_split_follows_the_key_alone(tmp_path):
    def held_out(folder, out, test):
        return {
            record["image"].tobytes()
            for record in records(run(tmp_path, folder, out, test=test), "test")
        }

    folder = pictures(tmp_path / "in", 40)
    few = held_out(folder, "few", 4)
    assert few == held_out(folder, "share", 0.1)
    assert len(few) == 4
    assert few < held_out(folder, "more", 10)
    # Two captions of one image are in one split.
    rows = [{"file_name": f"{i:03}.png", "caption": f"{i} {j}"} for j in "ab" for i in range(40)]
    out = run(tmp_path, write_folder(folder, {}, rows), "twice", test=10)
    assert len({record["caption"].split()[0] for record in records(out, "test")}) == 5


# Kinds of images


def loaded(data, size=8):
    return captioned.load(lambda _: (data, "", None), size, captioned.Item("key", None))


def test_images_of_other_kinds_become_8_bit_rgb():
    grey, red = np.full((8, 8), 100, np.uint8), np.full((8, 8, 3), (200, 30, 40), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    half = np.concatenate([np.zeros((4, 8, 3), np.uint8), np.full((4, 8, 3), 255, np.uint8)])
    cmyk = loaded(encoded(Image.fromarray(red).convert("CMYK"), "jpeg", quality=100)).image
    assert np.abs(cmyk.astype(int) - red).max() <= 3
    np.testing.assert_array_equal(loaded(encoded(grey)).image, np.repeat(grey[..., None], 3, -1))
    np.testing.assert_array_equal(
        loaded(encoded(Image.fromarray(np.full((8, 8), 51400, np.uint16)))).image, 200
    )
    np.testing.assert_array_equal(loaded(encoded(half, exif=exif)).image, half[::-1])
    frames = [Image.fromarray(red), Image.fromarray(half)]
    for kind in ("gif", "png", "webp"):
        moving = encoded(
            frames[0],
            kind,
            save_all=True,
            append_images=frames[1:],
            **({"lossless": True} if kind == "webp" else {}),
        )
        np.testing.assert_array_equal(loaded(moving).image, red)
    np.testing.assert_array_equal(
        loaded(encoded(Image.new("RGBA", (9, 9), (9, 9, 9, 0)))).image, 255
    )
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 9, 8, 7])
    assert loaded(encoded(palette, transparency=b"\xff\xff")).image[0, 0].tolist() == [9, 8, 7]


def test_a_large_photograph_keeps_its_content():
    """A JPEG may be decoded at a fraction of its size, at least twice the record's."""
    large = encoded(picture(1, (640, 960), (40, 60)), "jpeg", quality=95)
    full = loaded(np.array(Image.open(io.BytesIO(large))), 160).image.astype(int)
    assert np.abs(loaded(large, 160).image - full).max() <= 6
    assert full.std() > 30


def bomb():
    """A PNG whose header says 20,000 x 20,000."""
    data = bytearray(encoded(np.zeros((4, 4), np.uint8)))
    data[16:24] = (20000).to_bytes(4, "big") * 2
    import zlib

    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


BAD = {
    "truncated.png": lambda: encoded(picture(1, (64, 64)))[:-2000],
    "truncated.jpg": lambda: encoded(picture(1, (64, 64)), "jpeg")[:900],
    "truncated.webp": lambda: encoded(picture(1, (64, 64)), "webp")[:200],
    "page.jpg": lambda: b"<html>",
    "empty.png": lambda: b"",
    "float.png": lambda: encoded(Image.new("F", (8, 8)), "tiff"),
    "bomb.png": bomb,
    "program.png": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n",
}


def test_bad_images_are_counted_named_and_left_out(tmp_path, capsys):
    good = {f"{i}.png": encoded(picture(i)) for i in range(9)}
    folder = write_folder(tmp_path / "in", good | {name: data() for name, data in BAD.items()})
    with (folder / "metadata.jsonl").open("a") as file:
        file.write('{"file_name": "absent.png", "caption": "a"}\n')
    with pytest.raises(
        UserError,
        match=r"^9 images are bad, and --max_bad allows 8: .*leave them out; complete shards stay "
        r"in",
    ):
        run(tmp_path, folder, max_bad=0.49, shard_size=5)
    assert not (tmp_path / "out" / "manifest.json").exists()
    out = run(tmp_path, folder, max_bad=0.5, shard_size=5)
    assert [
        len(part)
        for part in (records(out), json.loads((out / "train-00002.json").read_text())["bad"])
    ] == [9, 5]
    printed = capsys.readouterr().out
    assert "bad images left out: 9 of 18: " in printed
    for name, reason in {
        "page.jpg": "not an image",
        "empty.png": "not an image",
        "program.png": "not an image",
        "absent.png": "not there",
        "float.png": "its pixels have more than 16 bits",
    }.items():
        assert f"{name} ({reason})" in printed
    assert re.search(r"truncated.jpg \(.*truncated", printed)
    assert re.search(r"bomb.png \(.*exceeds limit", printed)
    assert choices(out)["bad_images"] == 9


def test_at_most_ten_bad_images_are_named(tmp_path):
    folder = write_folder(tmp_path / "in", {f"{i:02}.png": b"" for i in range(12)})
    with pytest.raises(UserError, match=r"09\.png \(not an image\), \.\.\.; mend") as error:
        run(tmp_path, folder)
    assert "10.png" not in str(error.value)


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


def test_a_file_name_that_is_not_utf_8_is_read(tmp_path):
    folder = write_folder(tmp_path / "in", {})
    with open(os.fsencode(folder) + b"/caf\xe9.png", "wb") as file:
        file.write(encoded(picture(1)))
    (folder / "metadata.jsonl").write_bytes(b'{"file_name": "caf\xe9.png", "caption": "a"}\n')
    assert len(records(run(tmp_path, folder))) == 1
    with open(os.fsencode(folder) + b"/caf\xe9.png", "wb") as file:
        file.write(b"<html>")
    with pytest.raises(UserError, match=r"caf\\udce9\.png \(not an image\)"):
        run(tmp_path, folder, "bad")


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
            "line 2 is not understood (Unterminated string",
        ),
        ("[1, 2]", "line 1 is not understood (it is not a JSON object"),
        (
            '{"file_name": "a.png", "caption": "a", "label": 1}\n{"file_name": "b.png", "caption": '
            '"a"}',
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
        ("a.jsonl", "null", "line 1 is not understood (it is not a JSON object)"),
        ("a.jsonl", labelled("9" * 5000), "line 1 is not understood (Exceeds the limit"),
        ("a.jsonl", labelled("9" * 4000), "expected numbers below 100000"),
        (
            "a.jsonl",
            labelled(10**12),
            "has the label 1000000000000 for a.png: expected numbers below 100000",
        ),
        ("a.jsonl", labelled("[" * 900 + "1" + "]" * 900), "has the label of type list for a.png"),
        ("a.jsonl", labelled("1e999"), "has the label of type float for a.png"),
        (
            "a.csv",
            "file_name,caption,label\na.png,a," + "9" * 5000,
            "expected numbers below 100000, the number of images or 100000; write",
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
    ],
    ids=range(12),
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
        (member("a.json", b"[]"), "captions (it is not a JSON object)"),
        (member("a.json", b"9" * 5000), "captions (Exceeds the limit"),
        (member("a.json", b"\xff"), "captions (Expecting value"),
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
    (out / ".partkilled").mkdir()
    run(tmp_path, folder, shard_size=5)
    assert opened == [f"{i:03}.png" for i in (*range(5, 10), *range(15, 20))]
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
        b"[]",
        b"null",
        b"",
        b"\xff",
        b"[" * 100_000,
        b'{"input": ' + b"9" * 5000 + b"}",
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


def test_killed_at_random_and_restarted_the_shards_are_bit_identical(tmp_path):
    folder = pictures(tmp_path / "in", 200)
    (folder / "017.png").write_bytes(b"<html>")
    call = [
        "-m",
        "launch.prepare",
        f"--input=folder:{folder}",
        "--image_size=96",
        "--shard_size=10",
        "--workers=1",
        f"--text={WORDS}",
    ]
    out, random, kills = tmp_path / "killed", np.random.default_rng(0), 0
    done = python(*call, f"--out={tmp_path}/expected").stdout
    while kills < 3:
        before = len(list(out.glob("*.json")))
        process = subprocess.Popen(
            [sys.executable, *call, f"--out={out}"],
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.time() + 60
        while (
            len(list(out.glob("*.json"))) < before + 3
            and process.poll() is None
            and time.time() < deadline
        ):
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.03))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, (
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
