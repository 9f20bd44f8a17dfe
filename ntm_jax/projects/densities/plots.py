"""Plots of known densities: the errors of estimates, and true and learned densities of the plane.

Symbols: K levels, m points along one side of a density's grid.
"""

import numpy as np

from ntm_jax.runtime.plots import figure, save_figure

COLUMNS = 8  # noise levels side by side in a picture of densities


def truth_plot(result: dict, out_png) -> None:
    """Draws the signed errors of a truth.json by evaluations; above 0 one is too high.

    Errors of less than 0.1 nats have a linear scale, others a logarithmic one.
    """
    plot, axes = figure(8, 5, 1, 1)
    axis = axes[0, 0]
    for run in result["runs"]:
        for method in dict.fromkeys(row["method"] for row in run["rows"]):
            rows = [row for row in run["rows"] if row["method"] == method]
            error = [row["error"] for row in rows]
            axis.errorbar([row["evaluations"] for row in rows], [e["mean"] for e in error],
                          [e["stderr"] for e in error], fmt="o-", markersize=4, label=method)
    axis.set_xscale("log", base=2)
    axis.set_yscale("symlog", linthresh=0.1)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set(xlabel="network evaluations for one log-density",
             ylabel="estimate less true log-density, nats",
             title=f"{result['source']}: above 0 an estimate is too high")
    plot.legend(loc="outside lower center", ncols=2)
    save_figure(plot, out_png)


def density_picture(true, learned, levels, extent: float, out_png) -> None:
    """Draws densities of the plane, true above learned, from noisy (left) to clean.

    true, learned: [K, m, m] by row y and column x on [-extent, extent]^2, at noise levels [K] in
    any order. More levels than COLUMNS continue below. Both densities of a level share their
    colours; white is 0.
    """
    levels = np.asarray(levels)
    bands = -(-len(levels) // COLUMNS)
    columns = -(-len(levels) // bands)
    plot, axes = figure(1.3 * columns + 0.4, 3 * bands, 2 * bands, columns)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    for place, level in enumerate(np.argsort(-levels)):
        band, column = divmod(place, columns)
        pair = axes[2 * band : 2 * band + 2, column]
        pair[0].set_title(f"t={levels[level]:.2g}")
        brightest = max(np.max(true[level]), np.max(learned[level]))
        for axis, density in zip(pair, (true[level], learned[level]), strict=True):
            axis.imshow(density, cmap="Blues", vmin=0, vmax=brightest, origin="lower",
                        extent=(-extent, extent) * 2)
    for row, axis in enumerate(axes[:, 0]):
        axis.set_ylabel(("true", "learned")[row % 2])
    save_figure(plot, out_png)
