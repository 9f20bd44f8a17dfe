"""Where a run's metrics go besides the terminal: one file for each kind, behind one table.

`launch.train --writer=NAME[:ARGUMENT]` adds a writer to those that every run has, metrics.jsonl and
TensorBoard.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, cast

from ntm_jax.registry import Registry


class MetricsWriter(Protocol):
    """Receives the metrics of one run, in process 0. A writer that raises stops the run."""

    def open(self, workdir: str, start_step: int, settings: dict) -> None:
        """Begins a run, or resumes it where `start_step` is above 0; called once, first.

        settings: those of the configuration, as JSON, {"section.key": value}.
        """
        ...

    def scalars(self, step: int, scalars: dict[str, float]) -> None:
        """Takes the scalars of a step, once per step in ascending order; some may not be finite.

        A resumed run repeats the steps after its last checkpoint, with the same scalars.
        """
        ...

    def picture(self, step: int, path) -> None:
        """Takes a PNG file of a step, after that step's scalars; its stem is the picture's name."""
        ...

    def close(self) -> None:
        """Ends the run or, where it was stopped, this part of it; called once, last."""
        ...


# {usage: function from the text after the colon to a MetricsWriter}; it raises UserError where the
# argument is wrong or a package is missing, before the run begins.
WRITERS: Registry[Callable[[str], MetricsWriter]] = Registry(
    "--writer", {"wandb[:PROJECT]": "ntm_jax.training.writers.wandb:WandB"})
register = WRITERS.register


class AfterEvaluation:
    """Calls a function with the step and its scalars after each held-out evaluation."""

    def __init__(self, function: Callable[[int, dict[str, float]], object]):
        self._function = function

    def open(self, workdir: str, start_step: int, settings: dict) -> None:
        """Opens nothing."""

    def scalars(self, step: int, scalars: dict[str, float]) -> None:
        """Calls the function if scalars of an evaluation are among these."""
        if any(name.startswith("evaluate/") for name in scalars):
            self._function(step, scalars)

    def picture(self, step: int, path) -> None:
        """Takes no pictures."""

    def close(self) -> None:
        """Closes nothing."""


Given = str | MetricsWriter | Callable[[int, dict[str, float]], object]


def find(given: Sequence[Given]) -> list[MetricsWriter]:
    """The writers of names as of --writer, writers and functions; see AfterEvaluation.

    They are not yet opened. Raises UserError for an unknown name.
    """
    found = []
    for one in given:
        if isinstance(one, str):
            make, argument = WRITERS.find(one)
            one = make(argument)
        found.append(one if hasattr(one, "scalars") else AfterEvaluation(cast(Callable, one)))
    return found
