"""Prints errors of estimates of known log-densities; docs/results/truth.md has the main rows.

    python docs/_figures/truth.py FOLDER [FOLDER ...]

The folders are those that launch.truth wrote, for several densities and training runs. A cell is
the mean error over the runs in nats, with its standard error, and a mass its mean over the runs.
"""

import collections
import math
import pathlib
import sys

import numpy as np

from ntm_jax import files


def gather(folders) -> tuple[dict, dict]:
    """({density: {estimate: [(mean, stderr) of each run]}}, {density: {estimate: masses}}).

    An estimate is a method and its number of evaluations.
    """
    errors, masses = (collections.defaultdict(lambda: collections.defaultdict(list))
                      for _ in range(2))
    for folder in folders:
        result = files.read_json(pathlib.Path(folder) / "truth.json", "run launch.truth again")
        density = result["source"].removeprefix("toy:")
        for row in (row for run in result["runs"] for row in run["rows"]):
            estimate = row["method"], row["evaluations"]
            errors[density][estimate].append((row["error"]["mean"], row["error"]["stderr"]))
            if "mass" in row:
                masses[density][estimate].append(row["mass"])
    return errors, masses


def combine(runs: list[tuple[float, float]]) -> tuple[float, float]:
    """The mean error over several runs, and its standard error.

    All runs are scored on the same records, so the error over records does not shrink with runs.
    """
    means, stderrs = np.transpose(runs)
    between = np.var(means, ddof=1) / len(means) if len(means) > 1 else 0.0
    return float(means.mean()), math.sqrt(np.mean(stderrs**2) + between)


def table(found: dict, cell) -> str:
    """A Markdown table: a row for each estimate, a column for each density, cell(runs) in each."""
    lines = [["estimate", "evaluations", *found], ["---"] * (len(found) + 2)]
    for estimate in dict.fromkeys(estimate for rows in found.values() for estimate in rows):
        cells = [cell(rows[estimate]) for rows in found.values()]
        lines.append([estimate[0], str(estimate[1]), *cells])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main(folders) -> None:
    errors, masses = gather(folders)
    print(table(errors, lambda runs: "{:+.3f} ± {:.3f}".format(*combine(runs))))
    if masses:
        print("\nmass\n")
        print(table(masses, lambda runs: f"{np.mean(runs):,.3g}"))


if __name__ == "__main__":
    main(sys.argv[1:])
