"""Pictures of a benchmark of posteriors: samples over references, and calibration.

Symbols: n simulations; L draws of each posterior; m samples; D parameters.
"""

import dataclasses

import numpy as np

from ntm_jax.projects.sbi import scores
from ntm_jax.runtime.plots import figure, save_figure

SHOWN, POINTS = 4, 2000  # observations side by side, and samples of each
PAIRS = {"slcp": (2, 3), "slcp_moments": (2, 3)}  # the parameters drawn; the first two of others


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What the pictures show.

    references, samples: for each observation, the reference [m, D], and the run's samples before
      and after weighting, [m, D] each.
    ranks, shares: [n, D] and [n]; see scores.
    """

    references: list[np.ndarray]
    samples: list[tuple[np.ndarray, np.ndarray]]
    ranks: np.ndarray
    shares: np.ndarray


def posteriors(result: dict, drawn: Drawn, out_png) -> None:
    """Draws two parameters of some observations' samples, over those of the reference posterior.

    Above as the run draws them, below resampled by their weights.
    """
    shown = list(zip(drawn.references, drawn.samples, strict=True))[:SHOWN]
    plot, axes = figure(3 * len(shown) + 0.4, 6.4, 2, len(shown))
    pair = PAIRS.get(result["task"], (0, 1))
    for column, (known, both) in enumerate(shown):
        for row, name in enumerate(("c2st", "c2st_reweighted")):
            axis, score = axes[row, column], result["observations"][column][name]
            for points, colour, label in (
                    (known, "black", "reference"), (both[row], "tab:blue", "samples")):
                axis.scatter(*points[:POINTS, pair].T, s=2, alpha=0.4, color=colour, linewidths=0,
                             label=label if not (row or column) else None)
            axis.set_title(f"observation {column + 1}: C2ST {score:.3f}", fontsize=9)
    for axis, name in zip(axes[:, 0], ("samples", "resampled by weight"), strict=True):
        axis.set_ylabel(name)
    plot.legend(loc="outside lower center", ncols=2, markerscale=4)
    save_figure(plot, out_png)


def calibration(result: dict, drawn: Drawn, out_png) -> None:
    """Draws the ranks' distribution functions less the uniform one's, and the expected coverage.

    The curve of an exact posterior stays in the grey band with probability 0.99.
    """
    checks = result["calibration"]
    plot, axes = figure(9, 4, 1, 2)
    left, right = axes[0]
    width, counts = scores.band(checks["simulations"]), np.arange(checks["draws"] + 1)
    level = (counts + 1) / len(counts)  # the uniform distribution function of counts
    left.fill_between(level, -width, width, color="0.85")
    right.fill_between(level, level - width, level + width, color="0.85")
    for number, ranks in enumerate(drawn.ranks.T, 1):
        left.plot(level, scores.distribution(ranks, counts) - level, linewidth=1,
                  label=f"parameter {number}")
    right.plot(level, scores.distribution(np.rint(drawn.shares * checks["draws"]), counts),
               color="tab:blue")
    right.plot([0, 1], [0, 1], color="black", linewidth=0.5)
    left.axhline(0, color="black", linewidth=0.5)
    left.set(title=f"{result['task']}: ranks of the truth", xlabel="rank / draws",
             ylabel="share of simulations below, less uniform")
    right.set(title="expected coverage (TARP)", xlabel="credibility", ylabel="coverage",
              xlim=(0, 1), ylim=(0, 1))
    plot.legend(loc="outside lower center", ncols=5)
    save_figure(plot, out_png)
