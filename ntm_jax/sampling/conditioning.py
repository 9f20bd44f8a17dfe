"""The conditions of samples: labels, texts or vectors, checked against the model.

Symbols: n images; M text tokens, E the width of their states or of a vector.
"""

import dataclasses
import functools
import math

import numpy as np

from ntm_jax.core.transformer.conditions import Text, Vector
from ntm_jax.data import transforms
from ntm_jax.errors import UserError, as_array, shown
from ntm_jax.runtime.run import Run


@functools.lru_cache(maxsize=2)
def _texts(data, split: str, version: str):
    """The records of a split with the states of their captions, encoded once for all batches.

    version: of arrays in memory, in whose place others may have been provided.
    """
    return data.open(split).records


def default_conditions(run: Run, index, split: str | None = None):
    """The default condition of these image indices.

    The classes in turn, or the texts or vectors of the records of a split in turn; the held-out
    split by default.
    """
    model = run.model.config
    if not (model.text_width or model.condition_width):
        return index % max(model.num_classes, 1)
    data, split = run.config.data, split or run.config.evaluate.split
    if model.condition_width:
        records = data.open(split).records
    else:
        in_memory = data.source.partition(":")[0] == "arrays"
        version = dataclasses.replace(data, text="").open(split).version if in_memory else ""
        records = _texts(data, split, version)
    chosen = [records[int(i) % len(records)] for i in index]
    if model.condition_width:
        values = np.stack([record["condition"] for record in chosen])
        return Vector(values, np.ones(len(values), bool))
    return Text(*(np.stack([record[name] for record in chosen]) for name in ("text", "text_mask")))


def check_condition(run: Run, n: int, label):
    """The condition of n images as arrays: labels [n], or the Text or Vector of such a model.

    label: one label, labels [n], integers or names of classes; Text with states [n, M, E] and mask
    [n, M], or [1, M, E] and [1, M] for all images; one vector [E] or vectors [n, E] in their own
    units. Raises UserError where it does not fit the model.
    """
    classes = run.model.config.num_classes
    each = f", or one for each of the {n} images" if n > 1 else ""
    if run.model.config.condition_width:
        return _check_vector(run, n, label)
    if run.model.config.text_width:
        return _check_text(run, n, label, each)
    if label is None and classes:
        raise UserError(f"no label is given, and the model has {classes} classes: give one label"
                        f"{each}")
    if label is not None and not classes:
        raise UserError(f"label {shown(label)} is given, and the model has no classes: leave it "
                        "out")
    expected = f"the number of a class, 0 to {classes - 1}, or its name"
    label = as_array("label", 0 if label is None else label, expected)
    if label.dtype == object:  # such as a column of pandas
        label = as_array("label", label.tolist(), expected)
    if label.dtype.kind == "U":
        label = np.vectorize(lambda name: run.spec.label_of(str(name)))(label)
    if label.dtype.kind not in "iu":
        raise UserError(f"label {shown(label.tolist())} is given: expected {expected}")
    if label.shape not in ((), (1,), (n,)):
        raise UserError(f"label has shape {label.shape}: expected one label{each}")
    label = np.broadcast_to(label, n)
    if classes and not ((0 <= label) & (label < classes)).all():
        raise UserError(f"labels run from {label.min()} to {label.max()}: expected 0 to "
                        f"{classes - 1}")
    return label.astype(np.int32)


def _check_text(run: Run, n: int, label, each: str) -> Text:
    """A Text of n texts, or of one for all, as the condition of n records."""
    width = run.model.config.text_width
    expected = ("the model is conditioned on text: give label=run.text(captions), with one caption"
                f"{each}, or your own Text(states [{n}, M, {width}], mask [{n}, M])")
    if not isinstance(label, Text):
        raise UserError(expected)
    states = as_array("Text.states", label.states, f"numbers [{n}, M, {width}]")
    mask = as_array("Text.mask", label.mask, f"true or false [{n}, M]")
    fits = states.ndim == 3 and len(states) in (1, n) and states.shape[2] == width
    numbers = not {states.dtype.kind, mask.dtype.kind} & set("OSU")
    if not fits or mask.shape != states.shape[:2] or not numbers:
        raise UserError(expected)
    with np.errstate(over="ignore"):  # which the next lines refuse
        states = states.astype(np.float16)
    if not np.isfinite(states).all():
        raise UserError("the states of a text hold a number that is not finite in float16, whose "
                        "largest is 65504: scale them as those of the training records")
    return Text(np.broadcast_to(states, (n, *states.shape[1:])),
                np.broadcast_to(mask.astype(bool), (n, mask.shape[1])))


def _check_vector(run: Run, n: int, condition) -> Vector:
    """Vectors [E] or [n, E] in their own units, standardised as the condition of n records."""
    width, spec = run.model.config.condition_width, run.spec
    one = f"{width} numbers [{width}]"
    expected = f"expected {one}, or [{n}, {width}]" if n > 1 else f"expected one condition, {one}"
    if condition is None:
        raise UserError("no condition is given, and the model is conditioned on vectors: "
                        f"{expected}")
    values = as_array("condition", condition, expected.removeprefix("expected "))
    if values.dtype.kind not in "fiub" or values.shape not in ((width,), (1, width), (n, width)):
        raise UserError(f"condition is {values.dtype} {list(values.shape)}: {expected}")
    with np.errstate(over="ignore"):  # which the next line refuses
        values = transforms.standardise(values, spec.condition_mean, spec.condition_std)
    if not np.isfinite(values).all():
        raise UserError("condition holds a number that is not finite, or that is too large for the "
                        "training conditions' deviation")
    return Vector(np.broadcast_to(values, (n, width)), np.ones(n, bool))


def own_conditions(run: Run, y: Vector) -> np.ndarray:
    """Standardised vectors in their own units, [n, E] float64."""
    return transforms.unstandardise(y.values, run.spec.condition_mean, run.spec.condition_std)


def parse_vectors(texts) -> tuple[tuple[float, ...], ...] | None:
    """Texts such as 0.5,-1.2 -> vectors; None without texts.

    Raises UserError for a text that does not hold finite numbers.
    """
    if not texts:
        return None
    try:
        vectors = tuple(tuple(map(float, text.split(","))) for text in texts)
    except ValueError:
        vectors = ((math.nan,),)
    if not all(math.isfinite(number) for vector in vectors for number in vector):
        raise UserError("--condition takes numbers separated by commas, such as 0.5,-1.2")
    return vectors
