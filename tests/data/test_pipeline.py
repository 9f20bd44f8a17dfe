"""Batches: the records of an epoch, resuming, and each process's share."""

import dataclasses
import json
import multiprocessing
import os
import signal

import jax
import numpy as np
import pytest
from absl import flags

from ntm_jax.data.pipeline import (
    DataSpec,
    TrainIterator,
    evaluation_batches,
    spec,
    spec_from_json,
    spec_to_json,
)
from ntm_jax.data.records import Layout
from ntm_jax.data.sources import open_source
from ntm_jax.data.transforms import patchify, scale
from ntm_jax.errors import UserError
from ntm_jax.runtime.config import Data
from tests.data.common import write_records


@pytest.fixture(scope="module")
def digits():
    return open_source("digits", "test[:60]")


@pytest.fixture(scope="module")
def captioned():
    """20 records of latents, labels and text of 1 to 3 tokens."""
    return open_source("mock:4x4x2,classes=3,text=3x8,count=20", "train")


@pytest.fixture(scope="module", autouse=True)
def _parsed_flags():
    """Grain's worker processes read absl flags, which launch/ parses."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


@pytest.fixture
def train(digits):
    """Opens train iterators over 60 digits, and closes them."""
    opened = []

    def open_one(source=digits, batch_size=12, seed=0, workers=0, **share):
        opened.append(TrainIterator(source, 2, batch_size, seed, workers, **share))
        return opened[-1]

    yield open_one
    for iterator in opened:
        iterator.close()


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def indices(batches):
    return np.concatenate([batch["index"] for batch in batches]).tolist()


def assert_holds(batch, source):
    """The rows of a batch are the records at its indices."""
    for row, index in enumerate(batch["index"]):
        record = source.records[index]
        image, levels = record["image"], source.pixel_levels
        x = patchify(scale(image, levels) if levels else image, 2)
        np.testing.assert_array_equal(batch["x"][row], x)
        for key in batch.keys() - {"x", "index", "mask"}:
            np.testing.assert_array_equal(batch[key][row], record[key])


def test_spec(digits):
    assert spec(digits, 2) == DataSpec(
        image_shape=(8, 8, 1), patch_size=2, pixel_levels=17, num_classes=10, count=60
    )
    assert (spec(digits, 2).tokens, spec(digits, 2).dim) == (16, 4)
    with pytest.raises(UserError, match="patch_size=4 does not divide the 8x6 images"):
        spec(dataclasses.replace(digits, image_shape=(8, 6, 1)), 4)


def test_a_spec_in_json_has_the_key_levels_and_loads_with_either_key():
    own = DataSpec((8, 8, 1), 2, 17, 10, 60, 4, 384, "minilm", (0.5,), (2.0,))
    values = spec_to_json(own)
    assert values == {
        "image_shape": [8, 8, 1], "patch_size": 2, "levels": 17, "num_classes": 10, "count": 60,
        "text_tokens": 4, "text_width": 384, "text": "minilm", "mean": [0.5], "std": [2.0],
        "class_names": [], "columns": 0, "condition_width": 0, "condition_mean": [],
        "condition_std": [], "version": ""}
    assert spec_from_json(json.loads(json.dumps(values))) == own
    levels = values.pop("levels")
    assert spec_from_json(values | {"pixel_levels": levels}) == own


def test_a_batch_holds_its_records(digits, captioned, train):
    own = {"x": "float32", "label": "int32", "index": "int32"}
    text = {"text": "float16", "text_mask": "bool"}
    for source, expected in ((digits, own), (captioned, own | text)):
        batch = next(train(source))
        assert {key: value.dtype.name for key, value in batch.items()} == expected
        assert_holds(batch, source)


def test_flips_mirror_half_of_the_images_anew_in_each_epoch_in_any_process(digits, train):
    def mirrored(batches):
        """{(epoch, record): whether its image is mirrored}."""
        found = {}
        for number, batch in enumerate(batches):
            for index, x in zip(batch["index"], batch["x"], strict=True):
                image = scale(digits.records[index]["image"], 17)
                flips = [f for f in (0, 1) if (x == patchify(image[:, :: 1 - 2 * f], 2)).all()]
                found[number // 5, int(index)] = flips[0]
        return found

    iterator = train(flip=True)
    batches = take(iterator, 10)
    flips, order = mirrored(batches), indices(take(train(), 10))
    assert indices(batches) == order  # as without flips
    counts = [sum(flips[epoch, i] for i in range(60)) for epoch in (0, 1)]
    assert all(20 < count < 40 for count in counts)
    assert [flips[0, i] for i in range(60)] != [flips[1, i] for i in range(60)]
    shares = [train(flip=True, process_index=i, process_count=2) for i in (0, 1)]
    assert mirrored(take(shares[0], 5)) | mirrored(take(shares[1], 5)) == {
        (0, i): flips[0, i] for i in range(60)}
    resumed = train(flip=True)
    resumed.set_state(iterator.get_state())
    np.testing.assert_array_equal(next(resumed)["x"], next(iterator)["x"])
    with pytest.raises(UserError, match=r"config\.data\.flip mirrors .*, and \S+ has latents: set"):
        Data(source="mock:4x4x2,count=20", flip=True).open("train")


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
    larger = next(train(batch_size=150))["index"]  # than the source
    assert sorted(larger[:60]) == sorted(larger[60:120]) == list(range(60))


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


@pytest.mark.parametrize(("process_count", "chosen"), [
    (1, None), (2, None), (3, None), (2, [5, 19, 7])])
def test_evaluation_reads_each_record_once_in_order(captioned, process_count, chosen):
    expected = chosen or [*range(20)]
    shares = [list(evaluation_batches(captioned, 2, 6, i, process_count, chosen))
              for i in range(process_count)]
    joined = [
        {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        for parts in zip(*shares, strict=True)
    ]
    padding = -len(expected) % 6
    assert indices(joined) == expected + [0] * padding
    mask = np.concatenate([batch["mask"] for batch in joined])
    np.testing.assert_array_equal(mask, np.float32([1] * len(expected) + [0] * padding))
    for batch in joined:
        assert_holds(batch, captioned)


def test_a_state_continues_exactly_in_workers_and_threads_and_an_error_is_final(tmp_path, train):
    random = np.random.default_rng(0)
    images = [{"image": random.integers(256, size=(4, 4, 1), dtype=np.uint8)} for _ in range(20)]
    write_records(tmp_path, {"train": images}, Layout((4, 4, 1), pixel_levels=256), shard_size=1)
    source = open_source(f"records:{tmp_path}", "train")
    expected = take(train(source, batch_size=2), 9)
    first = train(source, batch_size=2)
    take(first, 3)
    damaged = tmp_path / f"train-{expected[7]['index'][0]:05}.arrayrecord"
    content = damaged.read_bytes()
    damaged.write_text("<html>")
    workers = train(source, batch_size=2, workers=2)
    workers.set_state(json.loads(json.dumps(first.get_state())))
    jax.tree.map(np.testing.assert_array_equal, take(workers, 2), expected[3:5])
    assert len(multiprocessing.active_children()) == 2
    for worker in multiprocessing.active_children():  # a scheduler's signal to all processes
        os.kill(worker.pid, signal.SIGTERM)
    jax.tree.map(np.testing.assert_array_equal, take(workers, 2), expected[5:7])
    again = open_source(f"records:{tmp_path}", "train")
    for read_on in (
        lambda: next(workers),
        lambda: next(workers),  # an error is final
        lambda: list(evaluation_batches(again, 2, 2)),  # in this process
    ):
        with pytest.raises(UserError, match=f"^record 0 of {damaged} cannot be read"):
            read_on()
    damaged.write_bytes(content)
    threads = train(open_source(f"records:{tmp_path}", "train"), batch_size=2)
    next(threads)  # setting a state discards what was read ahead
    threads.set_state(workers.get_state())  # that of the last good batch
    jax.tree.map(np.testing.assert_array_equal, take(threads, 2), expected[7:])
