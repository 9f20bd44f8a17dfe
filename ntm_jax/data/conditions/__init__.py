"""The kinds of condition: the table that config.model.condition chooses from.

A kind knows what data hold for it, what users may give, how it is described, and how it enters the
networks: its core.conditions.Condition. A new kind is one file here and its line in KINDS, or a
call of `register`.

Symbols: n images; M text tokens, E the width of their states or of a vector.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from ntm_jax.core import conditions
from ntm_jax.data.pipeline import DataSpec
from ntm_jax.errors import UserError, abbreviate
from ntm_jax.registry import Registry

# The settings of config.model that belong to one kind.
SETTINGS = {"condition_layers": "vector", "condition_shift": "vector"}


@dataclasses.dataclass(frozen=True)
class Kind:
    """What every kind answers, for data of a shape, with the answers of models without conditions.

    needs: what the data must have, for errors; '' for nothing.
    flag: of launch.sample, whose values are conditions. from_records: conditions that nobody gives
    are those of a split's records. captioned: conditions are texts.
    shared: the fields of DataSpec in which two models must agree where one takes the conditions of
    the other.
    task: the Hugging Face Hub's name of what the model does.
    """

    spec: DataSpec
    needs: ClassVar[str] = ""
    flag: ClassVar[str] = ""
    from_records: ClassVar[bool] = False
    captioned: ClassVar[bool] = False
    shared: ClassVar[tuple[str, ...]] = ()
    task: ClassVar[str] = "unconditional-image-generation"

    @property
    def width(self) -> int:
        """The number of classes, or E; 0 where the data have none."""
        return 0

    @property
    def classes(self) -> int:
        """The number of classes that samples have in turn; 0 for other kinds."""
        return 0

    def network(self, settings: Mapping[str, Any]) -> conditions.Condition:
        """How conditions of this width enter the networks. settings: those of config.model."""
        return conditions.NOTHING

    def describe(self) -> str:
        """What the model is conditioned on, for errors and model cards."""
        return "nothing"

    def validate(self, n: int, given) -> Any:
        """The condition of n images as arrays, from what a user gives, or UserError.

        given: one for all images, or one for each.
        """
        if given is not None:
            raise UserError(f"label {abbreviate(given)} is given, and the model has no classes: "
                            "leave it out")
        return np.zeros(n, np.int32)

    def default(self, index, data, split: str) -> Any:
        """The condition of these image indices where nobody gives one.

        data: config.data, which opens the split whose records may hold conditions.
        """
        return np.zeros(len(index), np.int32)

    def given(self, batch: Mapping[str, np.ndarray], captions: Sequence[str] | None) -> list:
        """The conditions of a batch as users have them: labels, captions, or vectors [E].

        captions: of all records, if there are any.
        """
        return batch["label"].tolist()

    def numbers(self, y) -> np.ndarray:
        """The numbers that are written beside samples on y: labels [n], or vectors [n, E]."""
        return np.asarray(y, np.int64)


def stacked(index, data, split: str, *names: str) -> list[np.ndarray]:
    """The arrays of these names in the records of a split, in turn over image indices, [n, ...]."""
    # the name `arrays` may open others than before
    open_records = _records.__wrapped__ if data.source == "arrays" else _records
    records = open_records(data, split)
    chosen = [records[int(i) % len(records)] for i in index]
    return [np.stack([record[name] for record in chosen]) for name in names]


@functools.lru_cache(maxsize=2)
def _records(data, split: str):
    """The records of a split, opened, and their captions encoded, once for all batches."""
    return data.open(split).records


KINDS: Registry[type[Kind]] = Registry("config.model.condition", {
    "none": Kind,
    "class": "ntm_jax.data.conditions.label:Label",
    "text": "ntm_jax.data.conditions.text:Text",
    "vector": "ntm_jax.data.conditions.vector:Vector",
})
register = KINDS.register


def find(name: str) -> type[Kind]:
    """The kind of a name. Raises UserError if there is none."""
    return KINDS.find(name)[0]
