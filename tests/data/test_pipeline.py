"""Batches: the records of an epoch, resuming, and each process's share."""

import dataclasses
import json
import multiprocessing
import re

import numpy as np
import pytest
from absl import flags
from PIL import Image

from ntm_jax.data.pipeline import (
    DataSpec,
    evaluation_batches,
    spec,
    spec_from_json,
    spec_to_json,
    train_iterator,
)
from ntm_jax.data.records import Layout, write_records
from ntm_jax.data.sources import open_source
from ntm_jax.data.transforms import patchify, scale
from ntm_jax.errors import UserError


@pytest.fixture(scope="module")
def digits():
    return open_source("digits", "test[:60]")


@pytest.fixture(scope="module", autouse=True)
def _parsed_flags():
    """Grain's worker processes read absl flags, which launch/ parses."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


@pytest.fixture
def train(digits):
    """Opens train iterators over 60 digits, and closes them."""
    opened = []

    def open_one(batch_size=12, seed=0, workers=0, process_index=0, process_count=1, source=digits):
        opened.append(
            train_iterator(source, 2, batch_size, seed, workers, process_index, process_count)
        )
        return opened[-1]

    yield open_one
    for iterator in opened:
        iterator.close()


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def indices(batches):
    return np.concatenate([batch["index"] for batch in batches]).tolist()


def assert_equal(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for key in batch:
            np.testing.assert_array_equal(batch[key], other[key])


def test_spec(digits):
    assert spec(digits, 2) == DataSpec(
        image_shape=(8, 8, 1), patch_size=2, pixel_levels=17, num_classes=10, count=60
    )
    assert (spec(digits, 2).tokens, spec(digits, 2).dim) == (16, 4)
    for patch_size in (3, 0, 16):
        with pytest.raises(
            UserError,
            match=f"data.patch_size={patch_size} does not divide the 8x8 images of digits",
        ):
            spec(digits, patch_size)
    for shape in ((8, 6, 1), (6, 8, 1)):
        with pytest.raises(UserError, match=f"does not divide the {shape[0]}x{shape[1]} images"):
            spec(dataclasses.replace(digits, image_shape=shape), 4)


SPEC = DataSpec((8, 8, 1), 2, 17, 10, 60, 4, 384, "minilm", (0.5,), (2.0,))


def test_a_spec_in_json_has_the_key_levels_and_loads_with_either_key():
    values = spec_to_json(SPEC)
    assert values == {
        "image_shape": [8, 8, 1],
        "patch_size": 2,
        "levels": 17,
        "num_classes": 10,
        "count": 60,
        "text_tokens": 4,
        "text_width": 384,
        "text": "minilm",
        "mean": [0.5],
        "std": [2.0],
        "class_names": [],
        "columns": 0,
        "condition_width": 0,
        "condition_mean": [],
        "condition_std": [],
        "version": "",
    }
    assert list(values)[2] == "levels"
    assert spec_from_json(json.loads(json.dumps(values))) == SPEC
    levels = values.pop("levels")
    assert spec_from_json(values | {"pixel_levels": levels}) == SPEC


def test_an_invalid_spec_is_refused_in_one_line():
    values = spec_to_json(SPEC)
    with pytest.raises(UserError, match=r"^spec\.pixel_levels is '17', of type str: expected int"):
        spec_from_json(values | {"levels": "17"})


def test_a_batch_holds_its_records(digits, train):
    batch = next(train())
    assert {key: (type(value), value.shape, value.dtype) for key, value in batch.items()} == {
        "x": (np.ndarray, (12, 16, 4), np.float32),
        "label": (np.ndarray, (12,), np.int32),
        "index": (np.ndarray, (12,), np.int32),
    }
    for x, label, index in zip(batch["x"], batch["label"], batch["index"], strict=True):
        record = digits.records[index]
        np.testing.assert_array_equal(x, patchify(scale(record["image"], 17), 2))
        assert label == record["label"]


def test_every_epoch_covers_each_record_once_in_a_new_order(train):
    batches = take(train(), 15)
    epochs = [indices(batches[i : i + 5]) for i in (0, 5, 10)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(60))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[0] != list(range(60))
    assert indices(take(train(), 5)) == epochs[0]
    # Another seed is not a later epoch of this one.
    assert indices(take(train(seed=1), 5)) not in epochs


def test_a_batch_may_be_larger_than_the_source(train):
    index = next(train(batch_size=150))["index"]
    assert sorted(index[:60]) == sorted(index[60:120]) == list(range(60))


def test_a_resumed_iterator_continues_exactly(train):
    first = train()
    take(first, 7)
    state = json.loads(json.dumps(first.get_state()))
    rest = take(first, 6)
    resumed = train()
    take(resumed, 2)  # setting a state discards what was read ahead
    resumed.set_state(state)
    assert resumed.get_state() == state
    assert_equal(take(resumed, 6), rest)


def test_a_state_moves_between_numbers_of_processes(train):
    expected = [sorted(batch["index"].tolist()) for batch in take(train(), 8)]
    state, step = train().get_state(), 0
    for process_count in (1, 2, 4, 1):
        processes = [
            train(process_index=i, process_count=process_count) for i in range(process_count)
        ]
        for iterator in processes:
            iterator.set_state(state)
        for _ in range(2):
            batches = [next(iterator) for iterator in processes]
            assert [len(batch["x"]) for batch in batches] == [12 // process_count] * process_count
            assert sorted(indices(batches)) == expected[step]
            step += 1
        assert all(iterator.get_state() == processes[0].get_state() for iterator in processes)
        state = processes[0].get_state()


@pytest.mark.parametrize("process_count", [1, 2, 3])
def test_evaluation_reads_each_record_once_in_order(digits, process_count):
    processes = [
        list(evaluation_batches(digits, 2, 18, i, process_count)) for i in range(process_count)
    ]
    assert [len(batches) for batches in processes] == [4] * process_count
    joined = [
        {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        for parts in zip(*processes, strict=True)
    ]
    assert all(batch["x"].shape == (18, 16, 4) for batch in joined)
    mask = np.concatenate([batch["mask"] for batch in joined])
    assert mask.dtype == np.float32
    np.testing.assert_array_equal(mask, np.arange(72) < 60)
    assert indices(joined) == [*range(60), *[0] * 12]
    np.testing.assert_array_equal(
        joined[0]["x"][7], patchify(scale(digits.records[7]["image"], 17), 2)
    )


def test_evaluation_reads_chosen_records(digits):
    parts = [list(evaluation_batches(digits, 2, 2, i, 2, [5, 59, 7])) for i in range(2)]
    assert [[batch["index"].tolist() for batch in part] for part in parts] == [
        [[5], [7]], [[59], [0]]]
    assert [batch["mask"].tolist() for batch in parts[1]] == [[1], [0]]


def test_a_split_smaller_than_its_batch_still_gives_every_process_one(digits):
    few = open_source("digits", "test[:2]")
    masks = [
        [batch["mask"].tolist() for batch in evaluation_batches(few, 2, 6, i, 3)] for i in range(3)
    ]
    assert masks == [[[1, 1]], [[0, 0]], [[0, 0]]]


def test_processes_share_a_batch_evenly(digits):
    for open_one in (
        lambda: train_iterator(digits, 2, 10, 0, 0, 0, 4),
        lambda: evaluation_batches(digits, 2, 10, 0, 4),
    ):
        with pytest.raises(
            UserError, match="batch_size=10 must be a positive multiple of the 4 processes"
        ):
            open_one()


def test_an_unreadable_record_ends_the_run_with_its_own_message(tmp_path, train):
    for i in range(12):
        Image.new("L", (8, 8), i).save(tmp_path / f"{i:02}.png")
    source = open_source(f"folder:{tmp_path}", "all")
    bad = 5
    (tmp_path / source.records.records.files[bad]).write_text("<html>")
    iterator = train(batch_size=2, source=source)
    seen = []
    with pytest.raises(UserError) as error:
        seen.extend(index for batch in iterator for index in batch["index"])
    path = tmp_path / source.records.records.files[bad]
    assert str(error.value) == f"image {path} cannot be decoded (not an image): remove it"
    # The state is that of the last good batch, and the error repeats.
    assert iterator.get_state() == {"global_next_index": len(seen)}
    with pytest.raises(UserError) as again:
        next(iterator)
    assert str(again.value) == str(error.value)
    with pytest.raises(UserError, match="cannot be decoded"):
        list(evaluation_batches(source, 2, 4, 0, 1))


# Latents and text


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """20 records of latents, labels and text, in three shards; record i has i % 4 tokens."""
    random = np.random.default_rng(0)
    examples = [
        {
            "image": random.normal(size=(4, 4, 2)).astype(np.float16),
            "label": i % 3,
            "text": random.normal(size=(i % 4, 8)).astype(np.float16),
        }
        for i in range(20)
    ]
    folder = tmp_path_factory.mktemp("captioned")
    layout = Layout(
        (4, 4, 2),
        pixel_levels=0,
        num_classes=3,
        text_tokens=3,
        text_width=8,
        mean=(1.0, 2.0),
        std=(2.0, 3.0),
    )
    write_records(folder, {"train": examples}, layout, shard_size=7)
    return open_source(f"records:{folder}", "train")


def assert_holds(batch, source):
    """The rows of a batch are the records at its indices."""
    for row, index in enumerate(batch["index"]):
        record = source.records[index]
        np.testing.assert_array_equal(batch["x"][row], patchify(record["image"], 2))
        np.testing.assert_array_equal(batch["text"][row], record["text"])
        np.testing.assert_array_equal(batch["text_mask"][row], record["text_mask"])
        assert batch["label"][row] == record["label"]


def test_a_batch_holds_its_latents_and_text(captioned, train):
    batch = next(train(source=captioned))
    assert {key: (type(value), value.shape, value.dtype) for key, value in batch.items()} == {
        "x": (np.ndarray, (12, 4, 8), np.float32),
        "label": (np.ndarray, (12,), np.int32),
        "index": (np.ndarray, (12,), np.int32),
        "text": (np.ndarray, (12, 3, 8), np.float16),
        "text_mask": (np.ndarray, (12, 3), np.bool_),
    }
    assert_holds(batch, captioned)
    np.testing.assert_array_equal(batch["text_mask"].sum(axis=1), batch["index"] % 4)


def test_a_state_moves_between_numbers_of_workers(captioned, train):
    """Worker processes read the same latents, labels and text."""
    expected = take(train(source=captioned), 11)
    first = train(source=captioned)
    assert_equal(take(first, 3), expected[:3])
    second = train(source=captioned, workers=2)
    second.set_state(first.get_state())
    batches = take(second, 4)
    assert len(multiprocessing.active_children()) == 2
    assert_equal(batches, expected[3:7])
    assert_holds(batches[3], captioned)
    # Plain arrays: grain's own lie in shared memory, which is unmapped with them.
    assert {type(value) for batch in batches for value in batch.values()} == {np.ndarray}
    third = train(source=captioned)
    third.set_state(second.get_state())
    assert_equal(take(third, 4), expected[7:])


def test_evaluation_pads_latents_and_text(captioned):
    shares = [list(evaluation_batches(captioned, 2, 12, i, 2)) for i in range(2)]
    assert [[batch["index"].tolist() for batch in share] for share in shares] == [
        [[0, 1, 2, 3, 4, 5], [12, 13, 14, 15, 16, 17]],
        [[6, 7, 8, 9, 10, 11], [18, 19, 0, 0, 0, 0]],
    ]
    for batch in (*shares[0], *shares[1]):
        assert batch.keys() == {"x", "label", "index", "text", "text_mask", "mask"}
        assert (batch["text"].dtype, batch["text_mask"].dtype) == (np.float16, bool)
        assert_holds(batch, captioned)
    assert shares[1][1]["mask"].tolist() == [1, 1, 0, 0, 0, 0]


def test_a_damaged_shard_ends_a_worker_with_its_own_message(tmp_path, train):
    write_records(
        tmp_path,
        {"train": [{"image": np.zeros((4, 4, 1), np.uint8)}] * 8},
        Layout((4, 4, 1), pixel_levels=2),
        shard_size=4,
    )
    source = open_source(f"records:{tmp_path}", "train")
    (tmp_path / "train-00001.arrayrecord").write_text("<html>")
    iterator, seen = train(batch_size=2, workers=1, source=source), []
    with pytest.raises(UserError) as error:
        seen.extend(index for batch in iterator for index in batch["index"])
    assert re.match(
        rf"record \d of {tmp_path}/train-00001\.arrayrecord cannot be read \(the file holds 0 ",
        str(error.value),
    )
    assert iterator.get_state() == {"global_next_index": len(seen)}
    with pytest.raises(UserError) as again:
        next(iterator)
    assert str(again.value) == str(error.value)
