"""What an objective may add to every batch before its steps, such as samples of the model."""

from ntm_jax.data.sources import Source
from ntm_jax.runtime.run import Run


class Extension:
    """An extension of batches; this one adds nothing, and others override it.

    updates: the steps that are taken on a batch, between which a run is not saved.
    ahead: whether the next batch is begun before this one is finished, so that the devices work
    while the host does.
    """

    updates: int = 1
    ahead: bool = False

    def __init__(self, run: Run, source: Source):
        """Raises UserError where the run's settings do not go with its training data."""

    def begin(self, params, reference, batch: dict, step: int, logged: bool):
        """Dispatches the devices' work for a batch without waiting for it; what `finish` takes.

        params: those of `step`. reference: see objectives.Objective. logged: whether scalars of
        this batch are logged.
        """
        return batch

    def finish(self, pending) -> tuple[dict, dict[str, float]]:
        """(the batch with its further arrays, scalars to log)."""
        return pending, {}

    def to_save(self, pending) -> dict:
        """The arrays that a checkpoint keeps of a batch that is begun and not finished."""
        return {}

    def abstract(self, names: tuple[str, ...]) -> dict:
        """The shapes and shardings of those arrays of `to_save`."""
        return {}

    def restore(self, saved: dict, batch: dict, logged: bool):
        """What `begin` returned before these arrays were saved, for the same batch."""
        raise NotImplementedError

    def pictures(self, run: Run, reference, held_out: Source) -> list[str]:
        """Draws pictures of a trained run; their paths."""
        return []

    def close(self) -> None:
        """Ends what the extension keeps open."""
