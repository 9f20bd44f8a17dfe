"""A folder that a program writes batch by batch, so that a stopped call can be resumed."""

import dataclasses
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from ntm_jax import files
from ntm_jax.errors import UserError
from ntm_jax.progress import track


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

    def claim(self, asked: dict, batches: int) -> np.ndarray:
        """Which batches the folder holds already, bool [batches]; the same in every process.

        asked: the call, by flag, which is recorded. Raises UserError where the folder holds
        anything that was not asked for.
        """
        folder, path = self.folder, self.folder / self.call
        if path.exists():
            before = files.read_json(path, "give another --out")
            for key in sorted(before | asked):
                if before.get(key) != files.plain(asked.get(key)):
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

    def fill(self, asked: dict, batches: Sequence[np.ndarray], title: str,
             write_batch: Callable[[int, np.ndarray], None]) -> tuple[int, float | None]:
        """Claims the folder and writes the batches of indices that it lacks.

        write_batch(number, index) writes a batch, its `part` last. title: of the progress.

        Returns how many items it wrote, and how many a second after the first batch, which
        compiles; None where that was the only one.
        """
        done = self.claim(asked, len(batches))
        begin, made, first = time.perf_counter(), 0, 0
        for number, index in enumerate(track(batches, title, "batches")):
            if done[number]:
                continue
            try:
                write_batch(number, index)
            except BaseException:
                self._release()
                raise
            made += len(index)
            if not first:
                begin, first = time.perf_counter(), made
        return made, (made - first) / (time.perf_counter() - begin) if made > first else None

    def _release(self) -> None:
        """Undoes `claim` where no part was written, such as after an unknown word of a prompt."""
        path = self.folder / self.call
        if jax.process_index() == 0 and list(self.folder.iterdir()) == [path]:
            path.unlink()

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
