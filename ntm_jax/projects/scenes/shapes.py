"""The source `shapes`: captioned scenes for GenEval's six tasks, and their exact scorer.

A scene is a 24 x 24 picture on black with at most one object in the middle of each quadrant: a
circle, square, triangle or cross of 8 to 10 pixels, in one of six colours. Its caption describes
what the record's task is about and leaves the rest open, and the scene shows no object that the
caption does not count: "a circle", "a circle and a square", "three circles", "a red circle", "a
circle left of a square", "a red circle and a blue square".

Some combinations are held out: no training caption describes them, and no training image shows
them, except relations (where a caption does not describe how two objects lie, they may lie in a
held-out relation). They are each colour with one shape, circle with cross, each count with one
shape, and four of the twelve ordered pairs of shapes in either direction: see `held_out`. Splits:
train, 1,000,000 scenes; test and heldout, 3,000 each, where every caption of heldout describes a
held-out combination. Scenes are drawn as they are read.

GenEval: Ghosh et al. 2023, arXiv 2310.11513. No jax is imported: grain's worker processes run this.
"""

import dataclasses
import functools
import itertools
import random
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from scipy import ndimage

from ntm_jax.data.sources.source import Lazy, Source, check_split

TASKS = (  # GenEval's names; a record's label
    "single_object",
    "two_object",
    "counting",
    "colors",
    "position",
    "color_attr",
)
SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (240, 50, 50),
    "green": (50, 200, 70),
    "blue": (60, 90, 240),
    "yellow": (240, 220, 50),
    "purple": (190, 50, 230),
    "white": (240, 240, 240),
}
COUNTS = {"two": 2, "three": 3, "four": 4}
PLURALS = {"circles": "circle", "squares": "square", "triangles": "triangle", "crosses": "cross"}
RELATIONS = {  # the first object's place relative to the second, (x, y)
    "left": (-1, 0),
    "right": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}
VOCABULARY = ("a", "and", "of", *RELATIONS, *COUNTS, *COLOURS, *SHAPES, *PLURALS)
SPLITS = {"train": 1_000_000, "test": 3_000, "heldout": 3_000}  # records
SIDE = 24  # pixels
_TURNS = (*TASKS, "counting", "color_attr")  # the tasks of successive records
# In training, the tasks that take longest to learn come more often.
_TRAIN_TURNS = (*_TURNS, "position", "color_attr", "color_attr")
_QUADRANT = SIDE // 2
_SIZES = (8, 9, 10)  # of an object, pixels


@dataclasses.dataclass(frozen=True)
class Thing:
    """An object of a scene, of a caption, or found in an image.

    colour: None if a caption does not describe it, or an image's object has none of the six. shape:
    None if an image's object has none of the four. x, y: the centre in pixels from the image's
    upper left corner.
    """

    colour: str | None
    shape: str | None
    x: float = 0.0
    y: float = 0.0


# Scenes.


def held_out(things: Sequence[Thing], relation: str | None = None) -> bool:
    """Whether the things of a caption or a scene form a held-out combination.

    relation: how the first of two things lies relative to the second, a key of RELATIONS or None.
    """
    shapes = [SHAPES.index(thing.shape) for thing in things]
    for thing, shape in zip(things, shapes, strict=True):
        if thing.colour and list(COLOURS).index(thing.colour) % len(SHAPES) == shape:
            return True
    if len(things) > 1 and len(set(shapes)) == 1:
        return shapes[0] == len(things) - 2  # two circles, three squares, four triangles
    if set(shapes) == {SHAPES.index("circle"), SHAPES.index("cross")}:
        return True
    if relation in ("right", "below"):
        shapes, relation = shapes[::-1], {"right": "left", "below": "above"}[relation]
    step = 1 if relation == "left" else 3
    return bool(relation) and (shapes[1] - shapes[0]) % len(SHAPES) == step


def _draw(draw: random.Random, task: str) -> tuple[str, list[Thing], str | None]:
    """A random scene of a task, of any combination: (caption, things, relation).

    The things' x and y are their quadrants, 0 or 1 each.
    """
    relation, some_count = None, draw.choice(list(COUNTS.values()))
    count = {"single_object": 1, "colors": 1, "counting": some_count}.get(task, 2)
    same = task == "counting"
    shapes = [draw.choice(SHAPES)] * count if same else draw.sample(SHAPES, count)
    names = list(COLOURS)
    colours = draw.sample(names, count) if task == "color_attr" else draw.choices(names, k=count)
    places = draw.sample(((0, 0), (0, 1), (1, 0), (1, 1)), count)
    if task == "counting":
        caption = f"{list(COUNTS)[count - 2]} {list(PLURALS)[SHAPES.index(shapes[0])]}"
    elif task == "position":
        (x, y), (other_x, other_y) = places
        fitting = [
            name
            for name, (across, down) in RELATIONS.items()
            if across * (x - other_x) + down * (y - other_y) > 0
        ]
        relation = draw.choice(fitting)
        of = " of" if relation in ("left", "right") else ""
        caption = f"a {shapes[0]} {relation}{of} a {shapes[1]}"
    else:
        phrases = shapes
        if task in ("colors", "color_attr"):
            phrases = [f"{colour} {shape}" for colour, shape in zip(colours, shapes, strict=True)]
        caption = " and ".join(f"a {phrase}" for phrase in phrases)
    described = zip(colours, shapes, places, strict=True)
    return caption, [Thing(colour, shape, *place) for colour, shape, place in described], relation


def _scene(split: str, index: int) -> tuple[str, list[Thing], random.Random]:
    """The caption and things of a record, and the random generator for its remaining draws.

    All three are functions of the split and the index alone. Every caption of the held-out split
    describes a held-out combination, so that split has no single objects.
    """
    # NumPy's generators would take longer for a scene's few draws than drawing all its pixels.
    draw = random.Random(f"{split} {index}")
    tasks = _TRAIN_TURNS if split == "train" else _TURNS[split == "heldout" :]
    while True:
        caption, things, relation = _draw(draw, tasks[index % len(tasks)])
        if split == "heldout":
            accepted = held_out(*read(caption))
        else:
            accepted = not held_out(things, relation)
        if accepted:
            return caption, things, draw


@functools.cache
def _mask(shape: str, size: int) -> np.ndarray:
    """The pixels of a shape, [size, size] bool."""
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    return {
        "circle": x**2 + y**2 <= size**2 / 4,
        "square": np.ones_like(x, bool),
        "triangle": np.abs(x) <= (y + (size + 1) / 2) / 2,
        "cross": (np.abs(x) <= 1) | (np.abs(y) <= 1),
    }[shape]


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
            assert thing.colour is not None  # a scene's things have all properties
            size = draw.choice(_SIZES)
            x, y = (_QUADRANT * place + (_QUADRANT - size) // 2 for place in (thing.x, thing.y))
            square = image[y : y + size, x : x + size]
            square[_mask(thing.shape, size)] = COLOURS[thing.colour]
        return {"image": image, "label": TASKS.index(task_of(caption)), "caption": caption}


def _caption(split: str, index: int) -> str:
    """A record's caption, made without drawing its scene."""
    return _scene(split, index)[0]


def open_shapes(argument: str, split: str) -> Source:
    """Opens a split of the scenes; `argument` is unused."""
    check_split("shapes", split, SPLITS)
    return Source(
        _Scenes(split),
        (SIDE, SIDE, 3),
        pixel_levels=256,
        num_classes=len(TASKS),
        version="2",
        captions=Lazy(functools.partial(_caption, split), range(SPLITS[split])),
        tasks=score,
        unseen="heldout",
    )


# The scorer.

# A pixel is bright if its largest channel, of 255, exceeds this: half of every colour's; the ground
# is black.
_FOREGROUND = 110
_SPECK = 8  # pixels; a smaller region is no object: the smallest true one has 28
# Intersection over union with the best drawing of any shape, size and place; below it an object has
# no known shape.
_LIKENESS = 0.7
_OF_ONE_COLOUR = 0.6  # the share of an object's pixels that must be nearest to its colour


@functools.cache
def read(caption: str) -> tuple[tuple[Thing, ...], str | None]:
    """The things that a caption describes, in order, and how the first lies from the second.

    Words that are not in VOCABULARY, which the captions' encoder refuses, mean nothing.
    """
    things, colour, count, relation = [], None, 1, None
    for word in caption.split():
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
    """Every shape in every size and place, [24 24, drawings] float32, and the things they show."""
    columns, things = [], []
    for shape, size in itertools.product(SHAPES, _SIZES):
        for y, x in itertools.product(range(SIDE - size + 1), repeat=2):
            columns.append(np.zeros((SIDE, SIDE), np.float32))
            columns[-1][y : y + size, x : x + size] = _mask(shape, size)
            things.append(Thing(None, shape, x + size / 2, y + size / 2))
    return np.stack(columns, -1).reshape(SIDE * SIDE, -1), things


def find(images) -> list[list[Thing]]:
    """The objects in images [n, 24, 24, 3] uint8, a list for each image.

    An object is a connected bright region. Its shape is that of the most similar drawing, its
    colour the one that most of its pixels are nearest to.
    """
    found = [[] for _ in images]
    bright = np.max(images, -1) > _FOREGROUND
    # Pixels touch within an image, corners included, and never across images.
    neighbours = np.stack([np.zeros((3, 3)), np.ones((3, 3)), np.zeros((3, 3))])
    regions, count = cast(tuple[np.ndarray, int], ndimage.label(bright, neighbours))
    number, y, x = np.nonzero(regions)
    region = regions[number, y, x] - 1
    masks, votes = np.zeros((count, SIDE * SIDE), np.float32), np.zeros((count, len(COLOURS)))
    owner = np.zeros(count, int)  # each region's image
    masks[region, y * SIDE + x], owner[region] = 1, number
    colours = images[number, y, x][:, None].astype(int)
    distance = np.square(colours - list(COLOURS.values())).sum(-1)
    np.add.at(votes, (region, distance.argmin(-1)), 1)
    drawings, things = _drawings()
    for start in range(0, count, 1000):  # 12 MB of overlaps
        mask = masks[start : start + 1000]
        overlap = mask @ drawings
        union = mask.sum(1, keepdims=True) + drawings.sum(0) - overlap
        likeness = overlap / union
        for row, (best, alike) in enumerate(zip(likeness.argmax(1), likeness.max(1), strict=True)):
            count_of = votes[start + row]  # of the region's pixels, by their nearest colour
            if count_of.sum() < _SPECK:
                continue
            one_colour = count_of.max() >= _OF_ONE_COLOUR * count_of.sum()
            colour = list(COLOURS)[count_of.argmax()] if one_colour else None
            shape = things[best].shape if alike >= _LIKENESS else None
            thing = dataclasses.replace(things[best], colour=colour, shape=shape)
            found[owner[start + row]].append(thing)
    return found


def _shows(found: Sequence[Thing], described: Sequence[Thing], relation: str | None) -> bool:
    """Whether the objects found are exactly those described, and lie as `relation` says."""

    def fits(things):
        if relation:
            across, down = RELATIONS[relation]
            first, second = things[:2]
            offset = across * (first.x - second.x) + down * (first.y - second.y)
            if offset <= _QUADRANT / 2:
                return False
        return all(
            wanted.shape == thing.shape and wanted.colour in (None, thing.colour)
            for wanted, thing in zip(described, things, strict=True)
        )

    return len(found) == len(described) and any(map(fits, itertools.permutations(found)))


def score(images, captions: Sequence[str]) -> dict[str, np.ndarray]:
    """Whether images [n, 24, 24, 3] uint8 show exactly what their n captions describe.

    Number, shapes, colours and places count as far as the caption describes them.

    Returns:
      Arrays [n]: "task", of TASKS; "right", bool; "empty", bool, true without any object; and
      "colour" and "shape", the share of the image's objects that have a colour, or a shape, of the
      caption: NaN if there are no objects or the caption describes none; and "traits" [n, 24],
      which pairs of a colour and a shape a right image shows where the caption leaves colours open.
    """
    rows = []
    for caption, found in zip(captions, find(np.asarray(images)), strict=True):
        described, relation = read(caption)
        right = _shows(found, described, relation)
        row = {"task": task_of(caption), "right": right, "empty": not found}
        for kind in ("colour", "shape"):
            named = {getattr(thing, kind) for thing in described} - {None}
            hits = [getattr(thing, kind) in named for thing in found]
            row[kind] = np.mean(hits) if found and named else np.nan
        shown = {(thing.colour, thing.shape) for thing in found if right}
        is_open = not any(thing.colour for thing in described)
        row["traits"] = [is_open and pair in shown for pair in itertools.product(COLOURS, SHAPES)]
        rows.append(row)
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}
