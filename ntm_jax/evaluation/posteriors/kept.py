"""Keeps what is scored of a benchmark of posteriors, so that an interrupted call goes on."""

import dataclasses
import json
import zipfile

import numpy as np
from etils import epath

from ntm_jax import files


@dataclasses.dataclass(frozen=True)
class Kept:
    """Scored observations in a folder, a file sbi-observation-NUMBER.npz each.

    asked: a digest of all that the scores depend on; files of another are not read.
    """

    folder: str
    asked: str

    def _path(self, number: int):
        return epath.Path(self.folder) / f"sbi-observation-{number}.npz"

    def read(self, number: int) -> tuple[dict, tuple[np.ndarray, np.ndarray]] | None:
        """(the scores of an observation, its samples before and after weighting), or None."""
        try:
            with self._path(number).open("rb") as file, np.load(file, allow_pickle=False) as found:
                if found["asked"].item() != self.asked:
                    return None
                row = files.parse_object(found["row"].item())
                return row, (found["before"], found["after"])
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            return None  # there is none, or it is damaged: the observation is scored anew

    def write(self, number: int, row: dict, samples: tuple[np.ndarray, np.ndarray]) -> None:
        """Keeps what `read` returns."""
        epath.Path(self.folder).mkdir(parents=True, exist_ok=True)
        before, after = samples
        with files.aside(self._path(number)) as file:
            np.savez(file, asked=self.asked, row=json.dumps(row), before=before, after=after)

    def remove(self, numbers) -> None:
        """Removes what is kept of these observations, once the results are written."""
        for number in numbers:
            self._path(number).unlink(missing_ok=True)
