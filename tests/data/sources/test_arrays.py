"""Arrays in memory as a source: splits, content, and every mistake that is refused."""

import pickle
import re

import numpy as np
import pytest

from ntm_jax.data import pipeline
from ntm_jax.data.sources import arrays as module
from ntm_jax.data.sources import from_arrays, open_source, provide
from ntm_jax.errors import UserError

IMAGES = np.random.default_rng(0).integers(256, size=(20, 4, 6, 3), dtype=np.uint8)
LABELS = np.arange(20) % 4
CAPTIONS = [f"picture {i}" for i in range(20)]


@pytest.fixture(autouse=True)
def _nothing_provided(monkeypatch):
    monkeypatch.setattr(module, "_provided", {})


def contents(source):
    """(images, labels) of all records."""
    records = [source.records[i] for i in range(len(source.records))]
    return np.stack([record["image"] for record in records]), [r["label"] for r in records]


def test_splits_cut_the_permutation_of_their_seed():
    for seed in (0, 3):
        provide(from_arrays(IMAGES, LABELS, held_out=0.25, seed=seed))
        order = np.random.RandomState(seed).permutation(20)
        for split, rows in (("train", order[:15]), ("test", order[15:]), ("all", order)):
            source = open_source("arrays", split)
            images, labels = contents(source)
            np.testing.assert_array_equal(images, IMAGES[rows])
            assert labels == LABELS[rows].tolist()
    assert (source.image_shape, source.pixel_levels, source.num_classes) == ((4, 6, 3), 256, 4)
    assert len(open_source("arrays", "train[:40%]").records) == 6


def test_names_of_classes_are_numbered_in_sorted_order():
    names = np.array(["ring", "cross", "bar", "ring"] * 5)
    arrays = from_arrays(IMAGES, names)
    provide(arrays)
    source = open_source("arrays", "all")
    assert (source.class_names, source.num_classes) == (("bar", "cross", "ring"), 3)
    order = np.random.RandomState(0).permutation(20)
    assert [source.class_names[label] for label in contents(source)[1]] == list(names[order])
    assert from_arrays(IMAGES, names.astype(object)).name == arrays.name  # as pandas has them
    renamed = from_arrays(IMAGES, np.char.upper(names))
    assert renamed.version != arrays.version


def test_slices_sizes_and_captions_apply():
    provide(from_arrays(IMAGES, captions=CAPTIONS, held_out=0.0))
    words = f"words:2:picture {' '.join(map(str, range(20)))}"
    source = open_source("arrays", "all[5:8]", image_size=2, text=words)
    rows = np.random.RandomState(0).permutation(20)[5:8]
    assert list(source.captions) == [CAPTIONS[row] for row in rows]
    assert (source.image_shape, source.num_classes, source.text_tokens) == ((2, 2, 3), 0, 2)
    again = pickle.loads(pickle.dumps(source))
    for record, row in zip([again.records[i] for i in range(3)], rows, strict=True):
        assert (record["caption"], record["label"]) == (CAPTIONS[row], -1)
        np.testing.assert_array_equal(record["text"].argmax(1), [0, 1 + row])


def test_images_without_channels_and_of_fewer_levels():
    provide(from_arrays(IMAGES[..., 0] // 32, pixel_levels=8))
    source = open_source("arrays", "all")
    assert (source.image_shape, source.pixel_levels) == ((4, 6, 1), 8)
    assert contents(source)[0].max() == 7


def test_float32_images_are_latents():
    latents = np.random.default_rng(1).normal(size=(20, 2, 2, 5)).astype(np.float32)
    provide(from_arrays(latents, LABELS))
    source = open_source("arrays", "train")
    expected = pipeline.DataSpec((2, 2, 5), 1, pixel_levels=0, num_classes=4, count=18)
    assert pipeline.spec(source, 1) == expected
    batch = next(pipeline.evaluation_batches(source, 1, 18, 0, 1))
    order = np.random.RandomState(0).permutation(20)
    np.testing.assert_array_equal(batch["x"], latents[order[:18]].reshape(18, 4, 5))


def test_the_version_names_the_content_and_its_splits():
    same = [
        from_arrays(IMAGES, LABELS, CAPTIONS),
        from_arrays(IMAGES.copy(order="F"), list(LABELS), CAPTIONS, held_out=np.float64(0.1)),
    ]
    other = IMAGES.copy()
    other[3, 1, 2, 0] ^= 1
    different = [
        from_arrays(other, LABELS, CAPTIONS),
        from_arrays(IMAGES, LABELS[::-1], CAPTIONS),
        from_arrays(IMAGES, LABELS),
        from_arrays(IMAGES, captions=CAPTIONS),
        from_arrays(IMAGES, LABELS, CAPTIONS[::-1]),
        from_arrays(IMAGES, LABELS, CAPTIONS, held_out=0.2),
        from_arrays(IMAGES, LABELS, CAPTIONS, seed=1),
        from_arrays(IMAGES.reshape(20, 6, 4, 3), LABELS, CAPTIONS),
    ]
    assert same[0].version == same[1].version
    assert len({each.version for each in (same[0], *different)}) == 1 + len(different)


def test_arrays_open_by_their_version_and_only_where_they_are_provided():
    first, second = from_arrays(IMAGES), from_arrays(255 - IMAGES)
    message = "this run was trained on arrays in memory: pass data=... with the same images"
    for name in ("arrays", first.name):
        with pytest.raises(
            UserError, match=f"^data.source {name} is not in .*{re.escape(message)}"
        ):
            open_source(name, "train")
    provide(first)
    provide(second)
    assert open_source("arrays", "all").version == second.version
    for each in (first, second):
        source = open_source(each.name, "all")
        assert (source.name, source.version) == (each.name, each.version)
        np.testing.assert_array_equal(
            source.records[0]["image"], each.images[each.splits["all"][0]]
        )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"images": IMAGES[:0]}, "images are uint8 [0, 4, 6, 3]: expected uint8 pixels or"),
        ({"pixel_levels": 17}, "pixel_levels is 17, and the data are uint8 up to 255: expected"),
        ({"labels": LABELS[1:]}, "labels has 19 rows: expected one for each of the 20 records"),
        ({"held_out": float("nan")}, "held_out is nan: expected a share of the records"),
    ],
    ids=range(4),
)
def test_mistakes_are_refused_in_one_line(given, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        from_arrays(**{"images": IMAGES} | given)
    assert "\n" not in str(error.value)
