"""Keeps what is scored of a benchmark of posteriors, so that an interrupted call goes on."""

import dataclasses
import json
from collections.abc import Iterable

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

    def read(self, number: int) -> tuple[dict, tuple[np.ndarray, np.ndarray]] | None:
        """(the scores of an observation, its samples before and after weighting).

        None where it has to be scored: without a file, and for one that is damaged or of another
        call.
        """
        try:
            with (_path(self.folder, number).open("rb") as file,
                  np.load(file, allow_pickle=False) as found):
                if found["asked"].item() != self.asked:
                    return None
                row = files.parse_object(found["row"].item())
                return row, (found["before"], found["after"])
        except Exception:  # no file, or damaged bytes, for which zipfile raises many kinds
            return None

    def write(self, number: int, row: dict, samples: tuple[np.ndarray, np.ndarray]) -> None:
        """Keeps what `read` returns."""
        epath.Path(self.folder).mkdir(parents=True, exist_ok=True)
        before, after = samples
        with files.aside(_path(self.folder, number)) as file:
            np.savez(file, asked=self.asked, row=json.dumps(row), before=before, after=after)


def remove(folder: epath.PathLike, numbers: Iterable[int]) -> None:
    """Removes what is kept of these observations, once the results are written."""
    for number in numbers:
        _path(folder, number).unlink(missing_ok=True)


def _path(folder: epath.PathLike, number: int) -> epath.Path:
    return epath.Path(folder) / f"sbi-observation-{number}.npz"
