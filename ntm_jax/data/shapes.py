"""Captioned scenes of coloured shapes for GenEval's six tasks, drawn as they are read, and the exact scorer that reads images of them.

A scene is a 24 x 24 picture on black, at most one object in the middle of a quadrant: a circle, square, triangle or cross of 8 to 10
pixels, in one of six colours. Its caption tells what the record's task is about and leaves the rest open, and the scene shows nothing
that it does not count: "a circle", "a circle and a square", "three circles", "a red circle", "a circle left of a square", "a red circle
and a blue square".

Some combinations are held out: no training caption tells them, and no training image shows them (but for the relations: where two
objects lie untold, they may lie in a held-out one). They are each colour with one shape, circle with cross, each count with one shape,
and four of either direction's twelve ordered pairs of shapes: see `held_out`. GenEval: Ghosh et al. 2023, arXiv 2310.11513. No jax is
imported: grain's worker processes run this.
"""

import dataclasses
import functools
import itertools
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import ndimage

from ntm_jax.errors import UserError

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")  # GenEval's names; a record's label
SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {"red": (240, 50, 50), "green": (50, 200, 70), "blue": (60, 90, 240), "yellow": (240, 220, 50), "purple": (190, 50, 230),
           "white": (240, 240, 240)}
COUNTS = {"two": 2, "three": 3, "four": 4}
PLURALS = {"circles": "circle", "squares": "square", "triangles": "triangle", "crosses": "cross"}
RELATIONS = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}  # the first's place from the second, (x, y)
VOCABULARY = ("a", "and", "of", *RELATIONS, *COUNTS, *COLOURS, *SHAPES, *PLURALS)
SPLITS = {"train": 1_000_000, "test": 3_000, "heldout": 3_000}  # records
SIDE = 24  # pixels
_TURNS = (*TASKS, "counting", "color_attr")  # the tasks of successive records
_TRAIN_TURNS = (*_TURNS, "position", "color_attr", "color_attr")  # in training those that take longest to learn more often
_QUADRANT = SIDE // 2
_SIZES = (8, 9, 10)  # of an object, pixels


@dataclasses.dataclass(frozen=True)
class Thing:
    """An object: of a scene, of a caption (colour None where it is not told) or found in an image (None where it is none of the known).
    x, y: its centre in pixels from the image's upper left corner."""

    colour: str | None
    shape: str | None
    x: float = 0.0
    y: float = 0.0


# Scenes.


def held_out(things: Sequence[Thing], relation: str | None = None) -> bool:
    """Whether this, a caption's or a scene's, has a held-out combination; relation: how the first of two lies to the second."""
    shapes = [SHAPES.index(thing.shape) for thing in things]
    if any(thing.colour and list(COLOURS).index(thing.colour) % len(SHAPES) == shape for thing, shape in zip(things, shapes, strict=True)):
        return True
    if len(things) > 1 and len(set(shapes)) == 1:
        return shapes[0] == len(things) - 2  # two circles, three squares, four triangles
    if set(shapes) == {SHAPES.index("circle"), SHAPES.index("cross")}:
        return True
    if relation in ("right", "below"):
        shapes, relation = shapes[::-1], {"right": "left", "below": "above"}[relation]
    return bool(relation) and (shapes[1] - shapes[0]) % len(SHAPES) == (1 if relation == "left" else 3)


def _draw(draw: random.Random, task: str) -> tuple[str, list[Thing], str | None]:
    """(caption, things with their quadrants, 0 or 1 each, as x and y, relation) of a random scene of a task, any combination."""
    count, relation = {"single_object": 1, "colors": 1, "counting": draw.choice(list(COUNTS.values()))}.get(task, 2), None
    shapes = [draw.choice(SHAPES)] * count if task == "counting" else draw.sample(SHAPES, count)
    colours = draw.sample(list(COLOURS), count) if task == "color_attr" else draw.choices(list(COLOURS), k=count)
    places = draw.sample(((0, 0), (0, 1), (1, 0), (1, 1)), count)
    if task == "counting":
        caption = f"{list(COUNTS)[count - 2]} {list(PLURALS)[SHAPES.index(shapes[0])]}"
    elif task == "position":
        (x, y), (other_x, other_y) = places
        fitting = [name for name, (across, down) in RELATIONS.items() if across * (x - other_x) + down * (y - other_y) > 0]
        relation = draw.choice(fitting)
        caption = f"a {shapes[0]} {relation}{' of' if relation in ('left', 'right') else ''} a {shapes[1]}"
    else:
        told = [f"{c} {s}" for c, s in zip(colours, shapes, strict=True)] if task in ("colors", "color_attr") else shapes
        caption = " and ".join(f"a {phrase}" for phrase in told)
    return caption, [Thing(*thing, *place) for *thing, place in zip(colours, shapes, places, strict=True)], relation


def _scene(split: str, index: int) -> tuple[str, list[Thing], random.Random]:
    """A record's caption and things, and the generator of what is left to draw: of the split and its index alone.

    Of the held-out split every caption tells a held-out combination, so it has no single objects.
    """
    draw = random.Random(f"{split} {index}")  # a small scene's few draws take numpy's generators longer than all its pixels
    tasks = _TRAIN_TURNS if split == "train" else _TURNS[split == "heldout" :]
    while True:
        caption, things, relation = _draw(draw, tasks[index % len(tasks)])
        if held_out(*read(caption)) if split == "heldout" else not held_out(things, relation):
            return caption, things, draw


@functools.cache
def _mask(shape: str, size: int) -> np.ndarray:
    """The pixels of a shape, [size, size] bool."""
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    return {"circle": x**2 + y**2 <= size**2 / 4, "square": np.ones_like(x, bool), "triangle": np.abs(x) <= (y + (size + 1) / 2) / 2,
            "cross": (np.abs(x) <= 1) | (np.abs(y) <= 1)}[shape]


@dataclasses.dataclass(frozen=True)
class _Scenes:
    """The records of a split."""

    split: str

    def __len__(self) -> int:
        return SPLITS[self.split]

    def __getitem__(self, index: int) -> dict[str, Any]:
        caption, things, draw = _scene(self.split, range(len(self))[index])
        image = np.zeros((SIDE, SIDE, 3), np.uint8)
        for thing in things:
            size = draw.choice(_SIZES)
            x, y = (_QUADRANT * place + (_QUADRANT - size) // 2 for place in (thing.x, thing.y))
            image[y : y + size, x : x + size][_mask(thing.shape, size)] = COLOURS[thing.colour]
        return {"image": image, "label": TASKS.index(task_of(caption)), "caption": caption}


@dataclasses.dataclass(frozen=True)
class _Captions(Sequence):
    """The captions of a split, nothing drawn."""

    split: str

    def __len__(self) -> int:
        return SPLITS[self.split]

    def __getitem__(self, index: int) -> str:
        return _scene(self.split, range(len(self))[index])[0]


def open_shapes(split: str) -> dict[str, Any]:
    """The fields of sources.Source that a split has, but for its name and split."""
    return dict(version="2", records=_Scenes(split), captions=_Captions(split), image_shape=(SIDE, SIDE, 3), levels=256,
                num_classes=len(TASKS), tasks=score, unseen="heldout")


# The scorer.

_FOREGROUND = 110  # of 255, a pixel's largest channel: half of every colour's, black being the ground
_SPECK = 8  # pixels; what is smaller is no object, the smallest true one having 28
_LIKENESS = 0.7  # intersection over union with the best drawing of any shape, size and place; below it an object is of no known shape
_OF_ONE_COLOUR = 0.6  # the share of an object's pixels that must be nearest to its colour


@functools.cache
def read(caption: str) -> tuple[tuple[Thing, ...], str | None]:
    """What a caption tells: the things in its order, and how the first lies to the second. UserError: a word that is not known."""
    things, colour, count, relation = [], None, 1, None
    for word in caption.split():
        if word not in VOCABULARY:
            raise UserError(f"the caption {caption!r} has the word {word!r}, of no scene of shapes: expected {', '.join(VOCABULARY)}")
        if word in COLOURS:
            colour = word
        elif word in COUNTS:
            count = COUNTS[word]
        elif word in RELATIONS:
            relation = word
        elif word in SHAPES or word in PLURALS:
            things += [Thing(colour, PLURALS.get(word, word))] * count
            colour, count = None, 1
    return tuple(things), relation


def task_of(caption: str) -> str:
    """The task that a caption belongs to, one of TASKS."""
    things, relation = read(caption)
    if len(things) == 1:
        return "colors" if things[0].colour else "single_object"
    if len({thing.shape for thing in things}) == 1:
        return "counting"
    return "position" if relation else "color_attr" if things[0].colour else "two_object"


@functools.cache
def _drawings() -> tuple[np.ndarray, list[Thing]]:
    """Every shape in every size and place, [24 24, drawings] float32, and what each is."""
    columns, things = [], []
    for shape, size in itertools.product(SHAPES, _SIZES):
        for y, x in itertools.product(range(SIDE - size + 1), repeat=2):
            columns.append(np.zeros((SIDE, SIDE), np.float32))
            columns[-1][y : y + size, x : x + size] = _mask(shape, size)
            things.append(Thing(None, shape, x + size / 2, y + size / 2))
    return np.stack(columns, -1).reshape(SIDE * SIDE, -1), things


def find(images) -> list[list[Thing]]:
    """The objects in images [n, 24, 24, 3] uint8: connected regions that are not dark, each named as the nearest drawing of a shape and by
    the colour that most of its pixels are nearest to."""
    found = [[] for _ in images]
    bright = np.max(images, -1) > _FOREGROUND
    regions, count = ndimage.label(bright, np.stack([np.zeros((3, 3)), np.ones((3, 3)), np.zeros((3, 3))]))  # none spans two images
    number, y, x = np.nonzero(regions)
    region = regions[number, y, x] - 1
    masks, votes, owner = np.zeros((count, SIDE * SIDE), np.float32), np.zeros((count, len(COLOURS))), np.zeros(count, int)
    masks[region, y * SIDE + x], owner[region] = 1, number
    distance = np.square(images[number, y, x][:, None].astype(int) - list(COLOURS.values())).sum(-1)
    np.add.at(votes, (region, distance.argmin(-1)), 1)
    drawings, things = _drawings()
    for start in range(0, count, 1000):  # 12 MB of overlaps
        mask, vote = masks[start : start + 1000], votes[start : start + 1000]
        overlap = mask @ drawings
        likeness = overlap / (mask.sum(1, keepdims=True) + drawings.sum(0) - overlap)
        for image, best, alike, share, area in zip(owner[start:], likeness.argmax(1), likeness.max(1), vote, vote.sum(1), strict=False):
            if area < _SPECK:
                continue
            colour = list(COLOURS)[share.argmax()] if share.max() >= _OF_ONE_COLOUR * area else None
            thing = dataclasses.replace(things[best], colour=colour)
            found[image].append(thing if alike >= _LIKENESS else dataclasses.replace(thing, shape=None))
    return found


def _shows(found: Sequence[Thing], told: Sequence[Thing], relation: str | None) -> bool:
    """Whether the objects found are those told, no more and no fewer, and lie so."""
    def fits(things):
        lies = True
        if relation:
            across, down = RELATIONS[relation]
            lies = across * (things[0].x - things[1].x) + down * (things[0].y - things[1].y) > _QUADRANT / 2
        return lies and all(t.shape == f.shape and t.colour in (None, f.colour) for t, f in zip(told, things, strict=True))

    return len(found) == len(told) and any(map(fits, itertools.permutations(found)))


def score(images, captions: Sequence[str]) -> dict[str, np.ndarray]:
    """Whether images [n, 24, 24, 3] uint8 show what their captions tell, exactly: number, shapes, colours and places, as far as told.

    Returns arrays [n]: "task", of TASKS; "right", bool; "empty", bool, without any object; and "colour" and "shape", the share of the
    image's objects that have a colour, or a shape, of the caption: nan where there are no objects or it tells none.
    """
    rows = []
    for caption, found in zip(captions, find(np.asarray(images)), strict=True):
        told, relation = read(caption)
        row = {"task": task_of(caption), "right": _shows(found, told, relation), "empty": not found}
        for kind in ("colour", "shape"):
            named = {getattr(thing, kind) for thing in told} - {None}
            row[kind] = np.mean([getattr(thing, kind) in named for thing in found]) if found and named else np.nan
        rows.append(row)
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}
