"""Vectors as conditions: numbers in any units, standardised for the model.

Symbols: n images; E the numbers of a vector.
"""

import math

import numpy as np

from ntm_jax.core.transformer import conditions
from ntm_jax.data import transforms
from ntm_jax.data.conditions.kind import Kind
from ntm_jax.errors import UserError, as_array


class Vector(Kind):
    """The vector of each image or row."""

    needs = "vectors as conditions"
    remedy = "give condition=..., or "
    flag = "--condition"
    from_records = True
    task = "other"

    @property
    def width(self):
        return self.spec.condition_width

    def network(self, settings):
        return conditions.VectorCondition(
            self.width, settings["condition_layers"], settings["condition_shift"])

    def facts(self):
        return {"vectors of length": self.width,
                "vectors normalised by": (self.spec.condition_mean, self.spec.condition_std)}

    def describe(self):
        return "is conditioned on vectors"

    def card(self):
        return (f"vectors of {self.width} numbers; `sample.py` takes one, in own units, as third "
                "argument, and their mean by default")

    def validate(self, n, given):
        """A Vector of n standardised vectors. given: [E] or [n, E] numbers in their own units."""
        one = f"{self.width} numbers [{self.width}]"
        expected = f"{one}, or [{n}, {self.width}]" if n > 1 else f"one condition, {one}"
        if given is None:
            raise UserError("no condition is given, and the model is conditioned on vectors: "
                            f"expected {expected}")
        values = as_array("condition", given, expected)
        shapes = (self.width,), (1, self.width), (n, self.width)
        if values.dtype.kind not in "fiub" or values.shape not in shapes:
            raise UserError(f"condition is {values.dtype} {list(values.shape)}: expected "
                            f"{expected}")
        with np.errstate(over="ignore"):  # which the next line refuses
            values = transforms.standardise(
                values, self.spec.condition_mean, self.spec.condition_std)
        if not np.isfinite(values).all():
            raise UserError("condition holds a number that is not finite, or that is too large for "
                            "the training conditions' deviation")
        return conditions.Vector(np.broadcast_to(values, (n, self.width)), np.ones(n, bool))

    def default(self, index, data, split):
        """The vectors of the split's records in turn."""
        records = data.open(split).records
        values = np.stack([records[int(i) % len(records)]["condition"] for i in index])
        return conditions.Vector(values, np.ones(len(values), bool))

    def given(self, batch, captions):
        return list(self._own_units(batch["condition"]))

    def numbers(self, y):
        return self._own_units(y.values)

    def _own_units(self, values) -> np.ndarray:
        return transforms.unstandardise(values, self.spec.condition_mean, self.spec.condition_std)


def parse(texts) -> tuple[tuple[float, ...], ...] | None:
    """Texts such as 0.5,-1.2 -> vectors; None without texts.

    Raises UserError for a text that does not hold finite numbers, and for other lengths than the
    first one's.
    """
    if not texts:
        return None
    try:
        vectors = tuple(tuple(map(float, text.split(","))) for text in texts)
    except ValueError:
        vectors = ((math.nan,),)
    if not all(math.isfinite(number) for vector in vectors for number in vector):
        raise UserError("--condition takes numbers separated by commas, such as 0.5,-1.2")
    if len({len(vector) for vector in vectors}) > 1:
        raise UserError("--condition has vectors of different lengths: give each the same")
    return vectors
