"""Prepared records: round trips, and the errors of damaged folders."""

import concurrent.futures
import dataclasses
import hashlib
import json
import os
import pickle
import re
import time

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from array_record.python.array_record_module import ArrayRecordWriter

from ntm_jax.data.pipeline import DataSpec, spec
from ntm_jax.data.records import Layout, read_manifest, reading, write_records
from ntm_jax.data.sources import open_source
from ntm_jax.errors import UserError
from tests.data.common import NOT_AN_OBJECT, captioned, latents

PIXELS = Layout((4, 4, 3), pixel_levels=256, num_classes=5)
LATENTS = Layout((2, 2, 4), pixel_levels=0, mean=(0.0, 1.0, 2.0, 3.0), std=(1.0, 2.0, 4.0, 8.0))
TEXT = Layout((2, 2, 4), pixel_levels=0, text_tokens=6, text_width=8)


def pixels(count, seed=0):
    random = np.random.default_rng(seed)
    return [
        {"image": random.integers(256, size=(4, 4, 3), dtype=np.uint8), "label": i % 5}
        for i in range(count)
    ]


def assert_records(source, images, labels):
    assert len(source.records) == len(images)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        record = source.records[i]
        assert record["image"].dtype == image.dtype
        np.testing.assert_array_equal(record["image"], image)
        assert record["label"] == label


def rewrite_manifest(path, **changes):
    """Changes keys of a manifest, and its hash with them."""
    content = json.loads((path / "manifest.json").read_text()) | changes
    del content["hash"]
    content["hash"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    (path / "manifest.json").write_text(json.dumps(content))


def forget_sha256(path):
    """Removes the shards' SHA-256 from a manifest, as earlier versions wrote it."""
    splits = json.loads((path / "manifest.json").read_text())["splits"]
    rewrite_manifest(
        path,
        splits={
            name: {key: split[key] for key in ("shards", "counts")}
            for name, split in splits.items()
        },
    )


def write_raw(path, *records):
    """Writes a shard of bytes."""
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


# Round trips


def test_pixels_are_read_as_they_were_written(tmp_path):
    train, test = pixels(10), pixels(3, seed=1)
    write_records(tmp_path, {"train": train, "test": iter(test)}, PIXELS, shard_size=4)
    _, splits, version = read_manifest(str(tmp_path))
    shards = [f"train-0000{i}.arrayrecord" for i in range(3)]
    sha256 = [hashlib.sha256((tmp_path / shard).read_bytes()).hexdigest() for shard in shards]
    assert splits["train"] == {"shards": shards, "counts": [4, 4, 2], "sha256": sha256}
    assert {file.name for file in tmp_path.iterdir()} == {
        *splits["train"]["shards"],
        *splits["test"]["shards"],
        "manifest.json",
    }
    for split, examples in {
        "train": train,
        "test": test,
        "all": train + test,
        "train[3:9]": train[3:9],
    }.items():
        source = open_source(f"records:{tmp_path}", split)
        assert_records(
            source,
            [example["image"] for example in examples],
            [example["label"] for example in examples],
        )
        assert spec(source, 2) == DataSpec(
            (4, 4, 3), 2, pixel_levels=256, num_classes=5, count=len(examples)
        )
        assert source.version == version
    assert source.records[0].keys() == {"image", "label"}


def test_pixels_may_be_resized(tmp_path):
    write_records(tmp_path, {"train": pixels(1)}, PIXELS)
    source = open_source(f"records:{tmp_path}", "train", image_size=8)
    assert source.image_shape == source.records[0]["image"].shape == (8, 8, 3)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_latents_are_read_in_unit_variance(tmp_path, dtype):
    examples = latents(3, dtype)
    write_records(tmp_path, {"train": examples}, LATENTS)
    source = open_source(f"records:{tmp_path}", "train")
    mean, std = np.array(LATENTS.mean, np.float32), np.array(LATENTS.std, np.float32)
    assert_records(
        source,
        [(example["image"].astype(np.float32) - mean) / std for example in examples],
        [-1] * 3,
    )
    assert spec(source, 1) == DataSpec(
        (2, 2, 4), 1, pixel_levels=0, num_classes=0, count=3, mean=LATENTS.mean, std=LATENTS.std
    )


def test_latents_without_mean_and_std_are_read_as_they_are(tmp_path):
    # After a transposition, the order in memory is not that of the axes.
    examples = [
        {"image": example["image"].swapaxes(0, 2)} for example in latents(2, shape=(4, 2, 2))
    ]
    write_records(tmp_path, {"train": examples}, dataclasses.replace(LATENTS, mean=(), std=()))
    assert_records(
        open_source(f"records:{tmp_path}", "train"),
        [example["image"].astype(np.float32) for example in examples],
        [-1] * 2,
    )


def test_text_is_padded_with_zeros_and_masked(tmp_path):
    examples = captioned(7)
    write_records(tmp_path, {"train": examples}, TEXT)
    source = open_source(f"records:{tmp_path}", "train")
    assert (spec(source, 1).text_tokens, spec(source, 1).text_width) == (6, 8)
    for i, example in enumerate(examples):
        record = source.records[i]
        assert (record["text"].shape, record["text"].dtype, record["text_mask"].dtype) == (
            (6, 8),
            np.float16,
            bool,
        )
        np.testing.assert_array_equal(record["text"][:i], example["text"])
        assert not record["text"][i:].any()
        assert record["text_mask"].tolist() == [True] * i + [False] * (6 - i)


def test_the_hash_names_counts_shapes_and_choices(tmp_path):
    layouts = [
        PIXELS,
        dataclasses.replace(PIXELS, choices={"size": 4, 1: "a"}),
        dataclasses.replace(PIXELS, num_classes=6),
        PIXELS,
        PIXELS,
    ]
    for i, layout in enumerate(layouts):
        write_records(tmp_path / str(i), {"train": pixels(2 if i < 4 else 3)}, layout)
    versions = [read_manifest(str(tmp_path / str(i)))[2] for i in range(5)]
    assert versions[0] == versions[3]
    assert len(set(versions)) == 4


def test_an_opened_source_can_be_pickled(tmp_path):
    write_records(tmp_path, {"train": pixels(3)}, PIXELS, shard_size=2)
    source = open_source(f"records:{tmp_path}", "train")
    first = source.records[2]["image"]
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(source)).records[2]["image"], first)


# Writing


def test_incomplete_records_have_no_manifest(tmp_path):
    with pytest.raises(
        UserError,
        match=re.escape(
            "example 1 of train-00001.arrayrecord image is [4, 4, 1] uint8, expected [4, 4, 3] "
            "uint8"
        ),
    ):
        write_records(
            tmp_path,
            {"train": [*pixels(3), {"image": np.zeros((4, 4, 1), np.uint8), "label": 0}]},
            PIXELS,
            shard_size=2,
        )
    assert [file.name for file in tmp_path.iterdir()] == ["train-00000.arrayrecord"]
    write_records(tmp_path, {"train": pixels(3)}, PIXELS)
    with pytest.raises(UserError, match="holds prepared records already"):
        write_records(tmp_path, {"train": pixels(3)}, PIXELS)


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        (
            PIXELS,
            {"image": np.zeros((4, 4, 3), np.float32)},
            "image is [4, 4, 3] float32, expected [4, 4, 3] uint8",
        ),
        (PIXELS, {"label": 5}, "label is 5, expected 0 to 4"),
        (PIXELS, {"label": [1, 2]}, "label is [2] int32, expected [] int32"),
        (
            PIXELS,
            {"text": np.zeros((1, 8), np.float16)},
            "has image, label, text, expected image, label",
        ),
        (
            dataclasses.replace(PIXELS, pixel_levels=17),
            {"image": np.full((4, 4, 3), 17, np.uint8)},
            "image has a pixel of 17, expected 0 to 16",
        ),
        (
            TEXT,
            {"image": np.zeros((2, 2, 4))},
            "image is [2, 2, 4] float64, expected [2, 2, 4] float16 or bfloat16 or float32",
        ),
        (
            TEXT,
            {"text": np.zeros((7, 8), np.float16)},
            "text is [7, 8] float16, expected [6, 8] float16",
        ),
        (
            TEXT,
            {"text": np.zeros((2, 9), np.float16)},
            "text is [2, 9] float16, expected [2, 8] float16",
        ),
        (
            TEXT,
            {"text": np.zeros((2, 8), np.float32)},
            "text is [2, 8] float32, expected [2, 8] float16",
        ),
    ],
)
def test_an_example_that_does_not_fit_is_not_written(tmp_path, layout, change, message):
    example = captioned(2)[1] if layout is TEXT else pixels(1)[0]
    with pytest.raises(
        UserError, match=re.escape(f"example 0 of train-00000.arrayrecord {message}")
    ):
        write_records(tmp_path, {"train": [example | change]}, layout)


@pytest.mark.parametrize(
    "keys",
    [
        {"mean": (1.0,), "std": (1.0,)},
        {"mean": (1.0,) * 4},
        {"mean": (0.0,) * 4, "std": (1.0, 1.0, 0.0, 1.0)},
        {"pixel_levels": 1},
        {"pixel_levels": 256, "mean": (0.0,) * 4, "std": (1.0,) * 4},
        {"image_shape": (2, 2)},
    ],
)
def test_a_layout_that_contradicts_itself_is_refused(keys):
    with pytest.raises(ValueError, match="expected"):
        Layout(**{"image_shape": (2, 2, 4), "pixel_levels": 0} | keys)


# Mistakes and damage


@pytest.fixture
def folder(tmp_path):
    write_records(tmp_path, {"train": pixels(6), "test": pixels(1)}, PIXELS, shard_size=3)
    return tmp_path


def assert_message(open_one, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        open_one()
    assert "\n" not in str(error.value)


def test_a_missing_folder_or_manifest_or_split_is_named(folder):
    assert_message(
        lambda: open_source("records:/no/such", "train"),
        "data.source records:/no/such is not there: expected a folder that",
    )
    (folder / "empty").mkdir()
    assert_message(
        lambda: open_source(f"records:{folder}/empty", "train"),
        "empty has no manifest.json: expected a folder that",
    )
    assert_message(
        lambda: open_source(f"records:{folder}", "dev"),
        f"records:{folder} has no split 'dev': it has train, test, all",
    )


def test_a_damaged_manifest_is_named(folder):
    file = folder / "manifest.json"
    text = file.read_text()
    for damaged, reason in (
        (text[:50], ""),
        ("[]", ""),
        ("{}", "no 'hash'"),
        (
            text.replace('"levels": 256', '"levels": 255'),
            "not of format 1, or edited since it was written",
        ),
    ):
        file.write_text(damaged)
        assert_message(
            lambda reason=reason: open_source(f"records:{folder}", "train"),
            f"manifest {file} is not understood ({reason}",
        )
    file.write_text(text)
    for changes, reason in (
        ({"format": 2}, "not of format 1"),
        ({"levels": 1}, "image_shape (4, 4, 3) and pixel levels 1"),
        ({"new": 1}, ""),
    ):
        file.write_text(text)
        rewrite_manifest(folder, **changes)
        assert_message(
            lambda reason=reason: open_source(f"records:{folder}", "train"),
            f"manifest {file} is not understood ({reason}",
        )
    file.write_text(text.replace('"levels": 256', '"pixel_levels": 256'))
    rewrite_manifest(folder)
    assert open_source(f"records:{folder}", "train").pixel_levels == 256
    file.write_text(text)
    rewrite_manifest(folder, choices={"a": 1})
    assert len(open_source(f"records:{folder}", "train").records) == 6


def test_a_missing_shard_is_named_before_anything_is_read(folder):
    (folder / "train-00001.arrayrecord").unlink()
    assert_message(
        lambda: open_source(f"records:{folder}", "train"),
        f"data.source records:{folder} lacks 1 of the 2 shards in its manifest "
        "(train-00001.arrayrecord): copy it there again",
    )
    assert len(open_source(f"records:{folder}", "test").records) == 1


@pytest.mark.parametrize("damage", ["fewer", "more", "cut", "html"])
def test_a_shard_of_another_count_is_named_when_it_is_read(folder, damage):
    forget_sha256(folder)
    file = folder / "train-00001.arrayrecord"
    if damage in ("fewer", "more"):
        write_raw(file, *[b"record"] * (2 if damage == "fewer" else 4))
    else:
        file.write_bytes(file.read_bytes()[:1000] if damage == "cut" else b"<html>")
    source = open_source(f"records:{folder}", "train")
    assert source.records[2]["label"] == 2
    found = {"fewer": 2, "more": 4}.get(damage, 0)
    for index in (3, 5):
        assert_message(
            lambda index=index: source.records[index],
            f"shard {file} holds {found} records, its manifest says 3: copy it",
        )


def test_a_damaged_record_is_named_when_it_is_read(folder):
    forget_sha256(folder)
    file = folder / "train-00001.arrayrecord"
    image, label = np.zeros((4, 4, 3), np.uint8), np.array(1, np.int32)
    good = {"image": image, "label": label}
    write_raw(
        file,
        *map(
            safetensors.numpy.save,
            (good | {"image": image[1:]}, {"image": image}, good | {"label": np.array(1.0)}),
        ),
    )
    source = open_source(f"records:{folder}", "train")
    assert_message(
        lambda: source.records[3],
        f"record 0 of {file} image is [3, 4, 3] uint8, expected [4, 4, 3] uint8: copy it there",
    )
    assert_message(
        lambda: source.records[4],
        f"record 1 of {file} has image, expected image, label: copy it there again",
    )
    assert_message(
        lambda: source.records[5],
        f"record 2 of {file} cannot be decoded ('F64'): copy it there again",
    )
    write_raw(file, b"<html>", pickle.dumps(good), safetensors.numpy.save(good))
    source = open_source(f"records:{folder}", "train")
    assert_message(
        lambda: source.records[3],
        f"record 0 of {file} cannot be decoded (Error while deserializing",
    )
    assert_message(
        lambda: source.records[4],
        f"record 1 of {file} cannot be decoded (Error while deserializing",
    )
    assert source.records[5]["label"] == 1


def test_a_shard_of_another_preparation_is_named_when_it_is_read(tmp_path):
    for seed in (0, 1):
        write_records(tmp_path / str(seed), {"train": pixels(6, seed)}, PIXELS, shard_size=3)
    file = tmp_path / "0" / "train-00001.arrayrecord"
    file.write_bytes((tmp_path / "1" / file.name).read_bytes())
    source = open_source(f"records:{tmp_path}/0", "train")
    np.testing.assert_array_equal(source.records[2]["image"], pixels(3)[2]["image"])
    message = (
        f"shard {file} is damaged or another's: its SHA-256 is not that of the manifest; "
        "copy it there"
    )
    assert_message(lambda: source.records[3], message)
    forget_sha256(tmp_path / "0")  # records of earlier versions are read without verification
    assert len([open_source(f"records:{tmp_path}/0", "train").records[i] for i in range(6)]) == 6


def test_a_process_hashes_a_shard_once(folder, monkeypatch):
    hashed, sha256 = [], reading.sha256
    monkeypatch.setattr(
        reading,
        "sha256",
        lambda path: hashed.append(os.path.basename(path)) or time.sleep(0.02) or sha256(path),
    )
    source = open_source(f"records:{folder}", "train")
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert [
            record["label"] for record in pool.map(source.records.__getitem__, [0, 1, 2, 3, 4, 5])
        ] == [0, 1, 2, 3, 4, 0]
    again = open_source(f"records:{folder}", "all")
    for one in (again, pickle.loads(pickle.dumps(source))):
        assert one.records[5]["label"] == 0
    assert sorted(hashed) == ["train-00000.arrayrecord", "train-00001.arrayrecord"]
    # A file that changes is hashed again.
    file = folder / "train-00001.arrayrecord"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert_message(
        lambda: open_source(f"records:{folder}", "train").records[5], "is damaged or another's"
    )


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_shard_that_is_no_regular_file_is_named(folder, make):
    (folder / "train-00001.arrayrecord").unlink()
    make(folder / "train-00001.arrayrecord")
    assert_message(
        lambda: open_source(f"records:{folder}", "train").records[4],
        "train-00001.arrayrecord is not a regular file: copy it",
    )


@pytest.mark.parametrize(
    "content",
    [
        *NOT_AN_OBJECT,
        b"7",
        b'{"hash": []}',
    ],
)
def test_a_manifest_of_any_bytes_is_refused_in_one_line(folder, content):
    (folder / "manifest.json").write_bytes(content)
    assert_message(
        lambda: open_source(f"records:{folder}", "train"),
        f"manifest {folder}/manifest.json is not understood (",
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"levels": "256"},
        {"levels": None},
        {"image_shape": [4, 4]},
        {"image_shape": [4, 4, "3"]},
        {"image_shape": 4},
        {"image_shape": [4, 4, 0]},
        {"num_classes": -1},
        {"num_classes": True},
        {"text_tokens": 1.5},
        {"mean": "0"},
        {"captions": 1},
        {"choices": []},
        {"format": "1"},
        {"splits": []},
        {"splits": None},
        {"splits": {"train": []}},
        {"splits": {"train": {"shards": ["a"]}}},
        *(
            {"splits": {"train": {"shards": shards, "counts": counts, **more}}}
            for shards, counts, more in (
                ("a", [1], {}),
                (["a"], [-1], {}),
                (["a"], ["1"], {}),
                (["a"], [1, 2], {}),
                (["a"], [1], {"sha256": ["b", "c"]}),
                ([1], [1], {}),
                (["../a"], [1], {}),
                (["/a"], [1], {}),
                (["a/b"], [1], {}),
                ([".."], [1], {}),
                ([""], [1], {}),
                (["\ud800"], [1], {}),
            )
        ),
    ],
    ids=str,
)
def test_a_manifest_of_wrong_types_is_refused_in_one_line(folder, changes):
    rewrite_manifest(folder, **changes)
    assert_message(
        lambda: open_source(f"records:{folder}", "train"),
        f"manifest {folder}/manifest.json is not understood (",
    )


def test_captions_that_are_not_utf_8_are_named(tmp_path):
    layout = dataclasses.replace(PIXELS, captions=True)
    example = pixels(1)[0] | {"caption": "a"}
    with pytest.raises(
        UserError,
        match=r"^example 0 of train-00000\.arrayrecord has a caption that UTF-8 cannot hold$",
    ):
        write_records(tmp_path, {"train": [example | {"caption": "\ud800"}]}, layout)
    write_records(tmp_path, {"train": [example]}, layout)
    forget_sha256(tmp_path)
    arrays = example | {"label": np.array(0, np.int32), "caption": np.array([255], np.uint8)}
    write_raw(tmp_path / "train-00000.arrayrecord", safetensors.numpy.save(arrays))
    assert_message(
        lambda: open_source(f"records:{tmp_path}", "train").records[0],
        "cannot be decoded ('utf-8' codec",
    )


def test_latents_cannot_be_resized(tmp_path):
    write_records(tmp_path, {"train": latents(1)}, LATENTS)
    for name in (f"records:{tmp_path}", "mock:2x2x4"):
        assert_message(
            lambda name=name: open_source(name, "train", image_size=2),
            f"data.image_size=2 does not go with {name}, whose latents",
        )
