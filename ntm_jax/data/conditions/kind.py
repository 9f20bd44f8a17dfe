"""What every kind of condition answers, with the answers of models that have none.

Symbols: n images; M text tokens, E the width of their states or of a vector.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from ntm_jax.core import conditions
from ntm_jax.data.pipeline import DataSpec
from ntm_jax.errors import UserError, abbreviate


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of condition, for data of a shape.

    needs: what the data must have, for errors; '' for nothing. remedy: how else to give it.
    flag: of launch.sample, whose values are conditions. from_records: conditions that nobody gives
    are those of a split's records. captioned: conditions are texts.
    task: the Hugging Face Hub's name of what the model does.
    """

    spec: DataSpec
    needs: ClassVar[str] = ""
    remedy: ClassVar[str] = ""
    flag: ClassVar[str] = ""
    from_records: ClassVar[bool] = False
    captioned: ClassVar[bool] = False
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

    def facts(self) -> dict[str, Any]:
        """What two models must share where one takes the conditions of the other, by name."""
        return {}

    def describe(self) -> str:
        """The model's condition in a sentence: "the model is ..."."""
        return "is unconditional"

    def card(self) -> str:
        """The conditions of an export, for its card."""
        return "none"

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
