"""The batches of a run's steps: read by every process, placed on the devices and extended."""

import dataclasses
from typing import Any

import jax

from ntm_jax.data import pipeline
from ntm_jax.errors import UserError
from ntm_jax.runtime import sharding
from ntm_jax.runtime.run import Run
from ntm_jax.training.extension import Extension


@dataclasses.dataclass
class Batch:
    """The global batch of the steps that begin at one step.

    position: the data iterator's state before the batch.
    complete: in a job of several processes, whether each has its share (sharding.flag_by_process);
      a step on an incomplete batch changes nothing. None in a job of one process.
    pending: the extension's, until it is finished.
    scalars: of the extension, to log.
    """

    arrays: dict
    position: dict
    complete: Any
    pending: Any
    scalars: dict = dataclasses.field(default_factory=dict)


class Batches:
    """Reads the batches of a run and extends them, one ahead if the extension asks for it.

    saved: the extension's arrays in the checkpoint from which the run is resumed; {} if none.
    """

    def __init__(self, run: Run, iterator: pipeline.TrainIterator, extension: Extension,
                 reference, saved: dict):
        self._run, self._iterator, self._extension = run, iterator, extension
        self._reference, self._saved = reference, saved
        self._read: list[Batch] = []  # batches that no step has been taken on
        self._local: dict = {}
        self._is_first = True
        # In a job of several processes, the error with which this one could not read its share of
        # a batch; None where it could.
        self.error: UserError | None = None

    def next(self, step: int, params) -> Batch:
        """The batch of a step; params: those of that step.

        Raises UserError for a record that cannot be read; to_save then gives what a run needs to
        resume at `step`. In a job of several processes a save needs all of them, and the others
        read on: so from the second batch on, `Batch.complete` tells them.
        """
        if not self._read:
            self._begin(step, params)
        following = step + self._extension.updates
        if self._extension.ahead and following < self._run.config.train.steps:
            self._begin(following, params)
        first = self._read[0]
        first.arrays, first.scalars = self._extension.finish(first.pending)
        first.pending, self._is_first = None, False
        return self._read.pop(0)

    def to_save(self) -> tuple[dict, dict]:
        """(the data's position of the next batch, the extension's arrays of it).

        All processes must call it together.
        """
        if not self._read:
            return self._iterator.get_state(), {}
        first = self._read[0]
        complete = first.complete is None or sharding.to_host(first.complete).all()
        return first.position, self._extension.to_save(first.pending) if complete else {}

    def _begin(self, step: int, params) -> None:
        """Reads the batch of a step, and begins to extend it."""
        position, complete = self._iterator.get_state(), None
        try:
            self._local = next(self._iterator)
        except UserError as error:
            if self._is_first or jax.process_count() == 1:
                raise
            self.error = error
        if jax.process_count() > 1:
            complete = sharding.flag_by_process(self.error is None, self._run.mesh)
        arrays = sharding.to_global(self._local, self._run.mesh)
        every = self._run.config.train.log_every
        logged = (step + self._extension.updates) // every > step // every
        if self._saved:
            pending = self._extension.restore(self._saved, arrays, logged)
        else:
            pending = self._extension.begin(params, self._reference, arrays, step, logged)
        self._saved = {}
        self._read.append(Batch(arrays, position, complete, pending))
