"""Prepared records: round trips, and the errors of damaged folders."""

import contextlib
import dataclasses
import hashlib
import json
import pickle
import random
import re

import ml_dtypes
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from ntm_jax.data.pipeline import DataSpec, spec
from ntm_jax.data.records import Layout, Split, read_manifest, verify, write_shard
from ntm_jax.data.sources import open_source
from ntm_jax.errors import UserError
from tests.data.common import captioned, latents, write_records

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


# Round trips


def test_pixels_are_read_as_they_were_written(tmp_path):
    train, test = pixels(10), pixels(3, seed=1)
    write_records(tmp_path, {"train": train, "test": test}, PIXELS, shard_size=4)
    _, splits, version = read_manifest(str(tmp_path))
    shards = [f"train-0000{i}.arrayrecord" for i in range(3)]
    sha256 = [hashlib.sha256((tmp_path / shard).read_bytes()).hexdigest() for shard in shards]
    assert splits["train"] == Split(shards, [4, 4, 2], sha256)
    parts = {"train": train, "test": test, "all": train + test, "train[3:9]": train[3:9]}
    for split, examples in parts.items():
        source = open_source(f"records:{tmp_path}", split)
        images, labels = zip(*[example.values() for example in examples], strict=True)
        assert_records(pickle.loads(pickle.dumps(source)), images, labels)
        assert spec(source, 2) == DataSpec((4, 4, 3), 2, 256, num_classes=5, count=len(examples))
        assert source.version == version
    assert source.records[0].keys() == {"image", "label"}


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("layout", [LATENTS, dataclasses.replace(LATENTS, mean=(), std=())])
def test_latents_are_read_in_unit_variance_or_as_they_are(tmp_path, dtype, layout):
    # After a transposition, the order in memory is not that of the axes.
    examples = [{"image": example["image"].swapaxes(0, 2)}
                for example in latents(3, dtype, (4, 2, 2))]
    write_records(tmp_path, {"train": examples}, layout)
    source = open_source(f"records:{tmp_path}", "train")
    mean, std = (np.array(values, np.float32) for values in (layout.mean or 0, layout.std or 1))
    images = [(example["image"].astype(np.float32) - mean) / std for example in examples]
    assert_records(source, images, [-1] * 3)
    assert spec(source, 1) == DataSpec(
        (2, 2, 4), 1, pixel_levels=0, num_classes=0, count=3, mean=layout.mean, std=layout.std
    )


def test_text_is_padded_with_zeros_and_masked(tmp_path):
    examples = captioned(7)
    write_records(tmp_path, {"train": examples}, TEXT)
    source = open_source(f"records:{tmp_path}", "train")
    assert (spec(source, 1).text_tokens, spec(source, 1).text_width) == (6, 8)
    for i, example in enumerate(examples):
        record = source.records[i]
        assert (record["text"].shape, record["text"].dtype) == ((6, 8), np.float16)
        np.testing.assert_array_equal(record["text"][:i], example["text"])
        assert not record["text"][i:].any()
        np.testing.assert_array_equal(record["text_mask"], np.arange(6) < i)


# Writing


def test_an_example_that_does_not_fit_is_refused_and_leaves_no_shard(tmp_path):
    examples = [*pixels(1), {"image": np.zeros((4, 4, 1), np.uint8), "label": 0}]
    with pytest.raises(ValueError, match=r"^image is \[4, 4, 1\] uint8, expected \[4, 4, 3\] "):
        write_shard(tmp_path / "train.arrayrecord", examples, PIXELS)
    assert not [*tmp_path.iterdir()]


# Mistakes and damage


@pytest.fixture
def folder(tmp_path):
    write_records(tmp_path, {"train": pixels(6), "test": pixels(1)}, PIXELS, shard_size=3)
    return tmp_path


def test_a_missing_folder_manifest_split_or_shard_is_named(folder):
    (folder / "train-00001.arrayrecord").unlink()
    for name, split, message in (
        (f"{folder}/no", "train", "no has no manifest.json: expected a folder that"),
        (folder, "dev", f"records:{folder} has no split 'dev': it has train, test, all"),
        (folder, "train", f"records:{folder} lacks 1 of the 2 shards in its manifest (train-00001"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            open_source(f"records:{name}", split)
    assert len(open_source(f"records:{folder}", "test").records) == 1


def test_a_damaged_manifest_is_named(folder):
    file = folder / "manifest.json"
    text = file.read_text()
    for damaged, reason in (
        (text[:50], "it is not JSON"),
        (text.replace('"levels": 256', '"levels": 255'), "not of format 1, or edited since"),
    ):
        file.write_text(damaged)
        with pytest.raises(UserError, match=re.escape(f"{file} cannot be used ({reason}")):
            open_source(f"records:{folder}", "train")


def test_a_manifest_of_earlier_versions_is_read(folder):
    file = folder / "manifest.json"
    content = json.loads(file.read_text())
    del content["hash"]
    for split in content["splits"].values():
        del split["sha256"]
    content["pixel_levels"] = content.pop("levels")
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    file.write_text(json.dumps(content | {"hash": digest[:16]}))
    source = open_source(f"records:{folder}", "train")
    assert (source.pixel_levels, source.records[5]["label"]) == (256, 0)
    with pytest.raises(UserError, match=r"^3 of 3 shards of .* the manifest has no SHA-256"):
        verify(str(folder))


def test_a_damaged_shard_or_record_is_named_when_it_is_read(folder):
    file = folder / "train-00001.arrayrecord"
    pickles = folder / "pickles"  # which nothing may load
    with contextlib.closing(ArrayRecordWriter(str(pickles), "group_size:1")) as writer:
        for record in pixels(3):
            writer.write(pickle.dumps(record))
    for damaged, message in (
        (file.read_bytes()[:1000], "the file holds 0 records, its manifest says 3"),
        (pickles.read_bytes(), "Error while deserializing"),
    ):
        file.write_bytes(damaged)
        source = open_source(f"records:{folder}", "train")
        assert source.records[2]["label"] == 2
        message = re.escape(f"record 0 of {file} cannot be read ({message}")
        with pytest.raises(UserError, match=f"^{message}.*$"):
            source.records[3]


def test_flipped_bytes_of_a_shard_are_refused_or_change_no_record(tmp_path):
    """array_record's own hashes suffice: no record is silently another one."""
    examples = pixels(12)
    write_records(tmp_path, {"train": examples}, PIXELS)
    file = tmp_path / "train-00000.arrayrecord"
    content, draw, refused = file.read_bytes(), random.Random(0), 0
    used = len(content.rstrip(b"\0"))  # the file ends in padding
    for trial in range(60):
        flipped = bytearray(content)
        flipped[draw.randrange(used if trial % 2 else 3000)] ^= 1 << draw.randrange(8)
        file.write_bytes(flipped)
        source = open_source(f"records:{tmp_path}", "train")
        for i, example in enumerate(examples):
            with contextlib.suppress(UserError):
                found = source.records[i]
                np.testing.assert_array_equal(found["image"], example["image"])
                assert found["label"] == example["label"]
                continue
            refused += 1
    assert refused > 12
