"""Classes as conditions: labels 0..num_classes-1, or names of classes."""

import dataclasses
import math

import flax.linen as nn
import numpy as np

from ntm_jax.core import conditions
from ntm_jax.core.transformer import partitioned
from ntm_jax.data.conditions import Kind
from ntm_jax.errors import UserError, abbreviate, as_array, few

NAMES_SHOWN = 20  # classes that an error or a model card lists


@dataclasses.dataclass(frozen=True)
class ClassCondition(conditions.Condition):
    """A class: labels [B] in 0..width; the label width is the null class.

    transporter: whether the transporter sees it.
    """

    transporter: bool = False

    def embed(self, module, y, total):
        inner = total.shape[-1]
        init = partitioned((None, "embed"), nn.initializers.normal, 0.02 * math.sqrt(inner))
        return total + nn.Embed(self.width + 1, inner, embedding_init=init, name="class")(y)

    def embed_in_transporter(self, module, y, total):
        return self.embed(module, y, total) if self.transporter else total


class Label(Kind):
    """One class of each image."""

    needs = "labels"
    flag = "--labels"
    shared = ("num_classes", "class_names")

    @property
    def width(self):
        return self.spec.num_classes

    @property
    def classes(self):
        return self.width

    def network(self, settings):
        return ClassCondition(self.width, settings["transporter_condition"] == "class")

    def describe(self):
        names = self.spec.class_names
        listed = f": {few(names, NAMES_SHOWN)}" if names else ""
        return f"one of {self.width} classes{listed}"

    def validate(self, n, given):
        """Labels [n]. given: one label, or labels [n]: integers, or names of classes."""
        expected = f"the number of a class, 0 to {self.width - 1}, or its name" + (
            f", or one for each of the {n} images" if n > 1 else "")
        if given is None:
            raise UserError(f"no label is given: expected {expected}")
        label = np.array(as_array("label", given, expected).tolist())  # pandas' are objects
        if label.dtype.kind == "U":
            label = np.vectorize(lambda name: self._of_name(str(name)))(label)
        fits = label.dtype.kind in "iu" and label.shape in ((), (1,), (n,))
        if not fits or not ((0 <= label) & (label < self.width)).all():
            raise UserError(f"label {abbreviate(label.tolist())} of shape {label.shape} is given: "
                            f"expected {expected}")
        return np.broadcast_to(label, n).astype(np.int32)

    def _of_name(self, name: str) -> int:
        """The label of the class of this name, or of this number where no class has the name."""
        names = self.spec.class_names
        if name in names:
            return names.index(name)
        if name.isdecimal() and int(name) < self.width:
            return int(name)
        listed = f"{few(names, NAMES_SHOWN)}, or " if names else ""
        raise UserError(f"label {name!r} is not a class of the model: expected {listed}"
                        f"0 to {self.width - 1}")

    def default(self, index, data, split):
        """The classes in turn."""
        return (np.asarray(index) % self.width).astype(np.int32)
