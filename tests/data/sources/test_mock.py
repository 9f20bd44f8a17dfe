"""Mock records: their shapes, values and options."""

import numpy as np
import pytest

from ntm_jax.data.pipeline import DataSpec, spec
from ntm_jax.data.sources import open_source
from ntm_jax.errors import UserError


def test_mock_latents_are_standard_normal_and_the_same_in_every_run():
    source, test = (open_source("mock:16x16x32", split) for split in ("train", "test"))
    assert spec(source, 1) == DataSpec((16, 16, 32), 1, pixel_levels=0, num_classes=0, count=10_000)
    expected = np.random.default_rng((0, 7)).standard_normal((16, 16, 32), np.float32)
    record = open_source("mock:16x16x32", "train[7:8]").records[0]
    assert (record["image"].dtype, record["label"], len(test.records)) == (np.float32, -1, 1000)
    np.testing.assert_array_equal(record["image"], expected)
    for other in (source.records[8], test.records[7]):
        assert not np.array_equal(other["image"], expected)


def test_mock_pixels_and_labels_take_all_their_values():
    source = open_source("mock:32x16x3,levels=17,classes=4,count=300", "train")
    assert spec(source, 2) == DataSpec((32, 16, 3), 2, pixel_levels=17, num_classes=4, count=300)
    records = list(source.records)
    assert {record["label"] for record in records} == set(range(4))
    assert records[0]["image"].dtype == np.uint8
    assert set(records[0]["image"].flat) == set(range(17))
    with pytest.raises(UserError, match="mock:8x8x1,level=2 is not understood: expected HxWxC"):
        open_source("mock:8x8x1,level=2", "train")


def test_mock_text_has_any_number_of_tokens_and_stays_near_1():
    source = open_source("mock:2x2x4,text=5x64,count=100", "train")
    assert (source.text_tokens, source.text_width) == (5, 64)
    text, mask = (np.stack([record[key] for record in source.records])
                  for key in ("text", "text_mask"))
    assert (text.shape, text.dtype) == ((100, 5, 64), np.float16)
    assert set(mask.sum(1)) == {1, 2, 3, 4, 5}
    np.testing.assert_array_equal(text.any(-1), mask)
    assert 0.5 <= np.abs(text[mask]).min() < np.abs(text[mask]).max() <= 1
