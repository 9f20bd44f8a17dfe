"""Mock records: their shapes, values and options."""

import numpy as np

from ntm_jax.data.pipeline import DataSpec, spec
from ntm_jax.data.sources import open_source


def test_mock_latents_are_standard_normal_and_the_same_in_every_run():
    source = open_source("mock:16x16x32", "train")
    assert spec(source, 1) == DataSpec((16, 16, 32), 1, pixel_levels=0, num_classes=0, count=10_000)
    expected = np.random.default_rng((0, 7)).standard_normal((16, 16, 32), np.float32)
    record = open_source("mock:16x16x32", "train[7:8]").records[0]
    assert (record["image"].dtype, record["label"]) == (np.float32, -1)
    np.testing.assert_array_equal(record["image"], expected)
    np.testing.assert_array_equal(source.records[7]["image"], expected)
    assert not np.array_equal(source.records[8]["image"], expected)


def test_mock_test_records_differ_from_training_records():
    train, test = (open_source("mock:8x8x4,count=50", split) for split in ("train", "test"))
    assert (len(train.records), len(test.records)) == (50, 1000)
    assert not np.array_equal(train.records[0]["image"], test.records[0]["image"])


def test_mock_pixels_and_labels_take_all_their_values():
    source = open_source("mock:32x16x3,levels=17,classes=4,count=300", "train")
    assert spec(source, 2) == DataSpec((32, 16, 3), 2, pixel_levels=17, num_classes=4, count=300)
    records = [source.records[i] for i in range(300)]
    assert {record["label"] for record in records} == set(range(4))
    assert records[0]["image"].dtype == np.uint8
    assert set(records[0]["image"].flat) == set(range(17))


def test_mock_text_has_any_number_of_tokens_and_stays_near_1():
    source = open_source("mock:2x2x4,text=5x64", "train")
    assert (source.text_tokens, source.text_width) == (5, 64)
    records = [source.records[i] for i in range(100)]
    assert {int(record["text_mask"].sum()) for record in records} == {1, 2, 3, 4, 5}
    for record in records:
        assert (record["text"].shape, record["text"].dtype) == ((5, 64), np.float16)
        np.testing.assert_array_equal(record["text"].any(axis=1), record["text_mask"])
    values = np.concatenate([record["text"][record["text_mask"]] for record in records]).astype(
        np.float32
    )
    assert 0.5 <= np.abs(values).min() < np.abs(values).max() <= 1
    assert abs(values.mean()) < 0.02
