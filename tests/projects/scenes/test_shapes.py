"""Scenes of shapes: drawing, held-out combinations, and the scorer.

The scorer is tested on true scenes, noise, shuffled captions and single mistakes.
"""

import itertools
import pickle

import numpy as np
import pytest

from ntm_jax.data.sources import open_source
from ntm_jax.data.transforms import scale, unscale
from ntm_jax.projects.scenes import shapes
from ntm_jax.projects.scenes.shapes import COLOURS, SHAPES
from tests.common import experiment

COUNT = 1600  # records of a split: 145 of a task at least


@pytest.fixture(scope="module")
def splits():
    """{split: (images [n, 24, 24, 3], captions, labels [n])}."""
    found = {}
    for name in shapes.SPLITS:
        records = list(open_source("shapes", f"{name}[:{COUNT}]").records)
        images, captions, labels = (
            [record[key] for record in records] for key in ("image", "caption", "label")
        )
        found[name] = np.stack(images), captions, np.array(labels)
    return found


def picture(*things):
    """The image of things (colour, shape, quadrant's x, y), drawn here from their geometry.

    Shapes have 9 pixels.
    """
    image = np.zeros((24, 24, 3), np.uint8)
    for colour, shape, column, row in things:
        for y, x in itertools.product(range(-4, 5), repeat=2):
            inside = {
                "circle": x * x + y * y < 21,
                "square": True,
                "triangle": 2 * abs(x) <= y + 5,
                "cross": abs(x) <= 1 or abs(y) <= 1,
            }[shape]
            if inside:
                image[12 * row + 6 + y, 12 * column + 6 + x] = COLOURS[colour]
    return image


def right(caption, *things):
    return bool(shapes.score(picture(*things)[None], [caption])["right"][0])


def test_a_record_is_a_function_of_its_split_and_index(splits):
    source = pickle.loads(pickle.dumps(open_source("shapes", "train[5:]")))
    images, captions, labels = splits["train"]
    record = source.records[7]
    np.testing.assert_array_equal(record["image"], images[12])
    assert record["image"].dtype == np.uint8
    assert record["image"].shape == source.image_shape == (24, 24, 3)
    assert (record["caption"], record["label"]) == (captions[12], labels[12])
    assert len(source.captions) == len(source.records) == 999_995
    assert [source.captions[i] for i in range(20)] == captions[5:25]


def combinations(things, relation=None):
    """Every pair of attributes: colour and shape, two shapes, count and shape, and relations.

    The relation of two shapes counts in both directions.
    """
    found = {(thing.colour, thing.shape) for thing in things if thing.colour}
    names = [thing.shape for thing in things]
    if len(set(names)) > 1:
        found |= {frozenset(names)}
    elif len(names) > 1:
        found |= {(len(names), names[0])}
    if relation:
        opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}
        found |= {(relation, *names), (opposite[relation], *names[::-1])}
    return found


def test_held_out_combinations_are_in_every_held_out_caption_and_not_in_train(splits):
    described = {
        name: set().union(*(combinations(*shapes.read(caption)) for caption in captions))
        for name, (_, captions, _) in splits.items()
    }
    drawn = {
        name: set().union(*(combinations(things) for things in shapes.find(images)))
        for name, (images, _, _) in splits.items()
    }
    unseen = described["heldout"] - described["train"]
    # Each colour and each count with one shape, and circle with cross.
    assert len([c for c in unseen if len(c) == 2]) == 10
    # Four of twelve in either direction, of which circle with cross is held out in both.
    assert len([c for c in unseen if len(c) == 3 and c[0] in ("left", "above")]) == 10
    assert not unseen & (drawn["train"] | described["test"] | drawn["test"])
    assert described["test"] <= described["train"]
    assert set(splits["test"][1]) & set(splits["train"][1])
    assert not set(splits["heldout"][1]) & (set(splits["test"][1]) | set(splits["train"][1]))
    for caption in splits["heldout"][1]:
        assert combinations(*shapes.read(caption)) & unseen, caption
    assert set(itertools.product(COLOURS, SHAPES)) <= described["train"] | unseen


def noised(images, t):
    """Images as sampled at a model's lowest level: x_0 / (1 - t), x_0 = (1 - t) x + t eps."""
    noise = np.random.default_rng(0).normal(size=images.shape)
    return unscale(scale(images, 256) + t / (1 - t) * noise, 256)


@pytest.mark.parametrize("t", [0, 0.1])
def test_true_scenes_are_right_even_with_a_models_noise(splits, t):
    for images, captions, _ in splits.values():
        found = shapes.score(noised(images, t), captions)
        assert found["right"].mean() >= 0.99
        assert np.nanmin(found["colour"]) > 0.9
        assert np.nanmin(found["shape"]) > 0.6
        assert not found["empty"].any()


TRUE = {
    "a circle": [("red", "circle", 0, 1)],
    "a circle and a square": [("green", "square", 1, 0), ("green", "circle", 0, 0)],
    "three crosses": [("red", "cross", 0, 0), ("blue", "cross", 1, 1), ("blue", "cross", 0, 1)],
    "a purple triangle": [("purple", "triangle", 1, 1)],
    "a circle left of a square": [("white", "circle", 0, 1), ("yellow", "square", 1, 0)],
    "a square above a circle": [("white", "circle", 0, 1), ("yellow", "square", 1, 0)],
    "a red circle and a blue square": [("blue", "square", 0, 0), ("red", "circle", 1, 0)],
}


@pytest.mark.parametrize("caption", TRUE)
def test_one_mistake_makes_an_image_wrong(caption):
    things = TRUE[caption]
    assert right(caption, *things)
    colour, shape, *place = things[0]
    free = next(
        p for p in itertools.product((0, 1), repeat=2) if p not in [(x, y) for _, _, x, y in things]
    )
    assert not right(caption, *things, ("white", "square", *free)), "one too many"
    assert not right(caption, *things[1:]), "one too few"
    for other in set(SHAPES) - {shape}:
        assert not right(caption, (colour, other, *place), *things[1:]), other
    for other in set(COLOURS) - {colour}:
        assert right(caption, (other, shape, *place), *things[1:]) == (colour not in caption), other


@pytest.mark.parametrize("place", [(1, 0), (0, 1), (1, 1)])
def test_relations_are_those_described(place):
    things = ("red", "circle", 0, 0), ("blue", "square", *place)
    for relation, opposite, holds in (("left of", "right of", place[0]),
                                      ("above", "below", place[1])):
        assert right(f"a circle {relation} a square", *things) == holds
        assert right(f"a square {opposite} a circle", *things) == holds
        assert not right(f"a circle {opposite} a square", *things)
        assert not right(f"a square {relation} a circle", *things)


def test_objects_without_a_known_shape_or_colour_are_found_and_wrong():
    square = picture(("red", "square", 0, 0))
    two_coloured, blob, speck = square.copy(), square.copy(), square.copy()
    two_coloured[2:6, :12][square[2:6, :12, 0] > 0] = COLOURS["blue"]  # 4 of its 9 rows
    blob[2:11, 2:11] = 0
    blob[4:6, 0:20] = COLOURS["red"]
    speck[20:22, 20:22] = 255
    images = np.stack([square, two_coloured, blob, speck])
    found = [things for (things,) in shapes.find(images)]
    assert [(thing.colour, thing.shape) for thing in found] == [
        ("red", "square"), (None, "square"), ("red", None), ("red", "square")]
    assert (found[0].x, found[0].y) == (6.5, 6.5)
    result = shapes.score(images, ["a red square"] * 4)
    assert result["right"].tolist() == [True, False, False, True]
    np.testing.assert_array_equal(result["colour"], [1, 0, 1, 1])
    np.testing.assert_array_equal(result["shape"], [1, 1, 0, 1])


def test_blank_images_are_empty_and_wrong():
    result = shapes.score(np.zeros((2, 24, 24, 3), np.uint8), ["a red circle", "two squares"])
    assert result["empty"].all()
    assert not result["right"].any()
    assert np.isnan([result["colour"], result["shape"]]).all()
    things = picture(("red", "circle", 0, 0), ("blue", "square", 1, 0), ("red", "cross", 1, 1))
    shares = shapes.score(np.stack([things] * 2), ["a red circle and a white square", "a circle"])
    np.testing.assert_allclose(shares["colour"], [2 / 3, np.nan])  # the second describes no colour
    np.testing.assert_allclose(shares["shape"], [2 / 3, 1 / 3])


def test_the_experiments_encoder_knows_every_caption(splits):
    encoder = experiment("shapes").data.text_encoder
    assert set(encoder.split(":")[2].split()) == set(shapes.VOCABULARY)
    source = open_source("shapes", "train", text=encoder)
    captions = [caption for _, captions, _ in splits.values() for caption in captions]
    assert source.text_tokens == max(len(caption.split()) for caption in captions) == 7
    record = source.records[0]
    assert record["text"].shape == (7, source.text_width)
    assert record["text_mask"].sum() == len(record["caption"].split())
