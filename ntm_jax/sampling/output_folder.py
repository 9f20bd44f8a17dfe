"""A folder that a program writes batch by batch, so that a stopped call can be resumed."""

import dataclasses
import time
from typing import Any, Protocol

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from ntm_jax import files
from ntm_jax.errors import UserError
from ntm_jax.progress import track
from ntm_jax.runtime import checksums
from ntm_jax.runtime.processes import require_same_everywhere
from ntm_jax.sampling.generate import in_batches


class Work(Protocol):
    """What makes the items of a folder."""

    def write_batch(self, output: "OutputFolder", number: int, index: np.ndarray) -> None:
        """Writes the batch of this number, items `index`, its `part` last."""
        ...

    def gather(self, output: "OutputFolder", batches: int) -> None:
        """Writes the files of all items from the parts of the batches, which it removes."""
        ...


@dataclasses.dataclass(frozen=True)
class OutputFolder:
    """The output of one call, in parts until it is complete.

    call: the file that records the call. last: the file that is written last.
    """

    folder: epath.Path
    call: str
    last: str

    @property
    def finished(self) -> bool:
        """Whether the output is complete."""
        return (self.folder / self.last).exists()

    def _claim(self, asked: dict, batches: int) -> np.ndarray:
        """Which batches the folder holds already, bool [batches]; the same in every process.

        asked: what the folder records of the call. Raises UserError where it holds anything that
        was not asked for.
        """
        folder, path = self.folder, self.folder / self.call
        if path.exists():
            before = files.read_json(path, "give another --out")
            for key in sorted(before | asked):
                if before.get(key) != files.to_json(asked.get(key)):
                    raise UserError(f"{folder} holds samples of {key} {before.get(key)!r}, and "
                                    f"this call has {asked.get(key)!r}: give another --out, or the "
                                    "same settings to go on; nothing was overwritten")
        elif folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder} is there and not empty: give a new folder as --out, nothing "
                            "was overwritten")
        done = np.array([self.finished or self.part(number).exists() for number in range(batches)])
        # Process 0 decides: a folder may appear late on another host.
        done = multihost_utils.broadcast_one_to_all(done)
        if jax.process_index() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            files.write_json(path, asked)
        return done

    def fill(self, asked: dict, num: int, batch: int, title: str, work: Work,
             params: Any) -> tuple[int, float | None]:
        """Claims the folder and makes what it lacks of items 0..num-1, `batch` at a time.

        asked: the call, by flag. title: of the progress. params: the arrays that the items depend
        on, of which the folder records a checksum.

        Returns how many items it wrote, and how many a second after the first batch, which
        compiles; None where that was the only one.
        """
        # No process has written yet: one that arrived late would find its own job's files.
        require_same_everywhere({"--out": str(self.folder)} | asked)
        batches = in_batches(num, batch)
        done = self._claim(asked | {"checksum": checksums.digest(params)}, len(batches))
        begin, made, first = time.perf_counter(), 0, 0
        for number, index in enumerate(track(batches, title, "batches")):
            if done[number]:
                continue
            try:
                work.write_batch(self, number, index)
            except BaseException:  # such as an unknown word of a prompt
                path = self.folder / self.call
                if jax.process_index() == 0 and list(self.folder.iterdir()) == [path]:
                    path.unlink()
                raise
            made += len(index)
            if not first:
                begin, first = time.perf_counter(), made
        if jax.process_index() == 0 and not self.finished:
            work.gather(self, len(batches))
        return made, (made - first) / (time.perf_counter() - begin) if made > first else None

    def part(self, number: int) -> epath.Path:
        """The file of a batch. It is written last and atomically: its presence marks the batch."""
        return self.folder / f"part-{number:06d}.npz"

    def read_parts(self, batches: int) -> dict[str, np.ndarray]:
        """The arrays of all batches, one after the other, by name."""
        parts = []
        for number in range(batches):
            with self.part(number).open("rb") as file, np.load(file, allow_pickle=False) as part:
                parts.append(dict(part))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def remove_parts(self, batches: int) -> None:
        """Removes the files of all batches, after everything else is written."""
        for number in range(batches):
            self.part(number).unlink()
