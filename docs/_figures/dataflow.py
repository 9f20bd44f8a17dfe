"""Draws docs/images/dataflow.png, the data flow of training and sampling.

    python docs/_figures/dataflow.py
"""

import pathlib

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

OUT = pathlib.Path(__file__).parents[1] / "images" / "dataflow.png"
INK, BLUE, ORANGE, GREY = "#1f2430", "#dbe7f6", "#fbe3cd", "#eef0f3"
WIDTH, HEIGHT = 1.5, 0.62


def box(axes, x, y, text, colour=GREY, width=WIDTH):
    """A rounded box around a text, centred at (x, y)."""
    axes.add_patch(FancyBboxPatch(
        (x - width / 2, y - HEIGHT / 2), width, HEIGHT, boxstyle="round,pad=0.02,rounding_size=0.1",
        facecolor=colour, edgecolor=INK, linewidth=1))
    axes.text(x, y, text, ha="center", va="center", color=INK, fontsize=10.5)


def arrow(axes, start, end, text="", above=0.16):
    """An arrow between two points, with a text beside its middle."""
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color=INK,
                                   linewidth=1.1, shrinkA=0, shrinkB=0))
    axes.text((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + above, text, ha="center",
              va="center", color=INK, fontsize=9.5)


def row(axes, y, parts):
    """Boxes (x, text, colour, text of the arrow to the next) from left to right."""
    half = WIDTH / 2 + 0.04
    for (x, text, colour, then), following in zip(parts, [*parts[1:], None], strict=True):
        box(axes, x, y, text, colour)
        if following:
            arrow(axes, (x + half, y), (following[0] - half, y), then)


def main():
    """Draws the figure and writes it."""
    figure, axes = plt.subplots(figsize=(9.2, 3.9), facecolor="white")
    axes.set(xlim=(-0.2, 10.4), ylim=(-0.15, 4.0))
    axes.axis("off")
    axes.text(-0.1, 3.75, "Training: exact likelihood of a trajectory", color=INK, fontsize=11.5,
              weight="bold")
    row(axes, 3.0, [
        (0.75, "clean tokens\n$x$", GREY, "add noise"),
        (3.45, "trajectory\n$x_0 \\ldots x_T$", GREY, ""),
        (5.8, "transporter\n$f_T$", BLUE, "$u_0 \\ldots u_T$"),
        (8.3, "predictor\n$f_P$", ORANGE, "")])
    box(axes, 5.35, 1.85, "loss  =  $\\frac{1}{2}|z_k|^2 + \\sum\\,\\log\\,\\sigma_k"
        " - \\log\\,|\\det\\,\\partial f_T / \\partial x_k|$,  summed over levels", GREY, 7.4)
    arrow(axes, (5.8, 2.65), (5.8, 2.2))
    axes.text(5.91, 2.43, "log-determinant, $u_k$", color=INK, fontsize=9.5, va="center")
    arrow(axes, (8.3, 2.65), (8.3, 2.2))
    axes.text(8.41, 2.43, "$\\mu_k, \\sigma_k$ from $u_{k+1}$", color=INK, fontsize=9.5,
              va="center")
    axes.text(-0.1, 1.05, "Sampling: T steps, one inverse", color=INK, fontsize=11.5,
              weight="bold")
    row(axes, 0.3, [
        (0.75, "noise\n$u_T$", GREY, ""),
        (3.45, "predictor $\\times T$\n$\\mu_k + \\sigma_k z$", ORANGE, "$u_0 \\ldots u_T$"),
        (5.8, "inverse\n$f_T^{-1}$", BLUE, "$x_0 \\ldots x_T$"),
        (8.3, "score\ndenoising", GREY, "")])
    arrow(axes, (9.09, 0.3), (9.6, 0.3))
    axes.text(9.68, 0.3, "image", color=INK, fontsize=10.5, va="center")
    figure.savefig(OUT, dpi=160, bbox_inches="tight", pad_inches=0.2)


if __name__ == "__main__":
    main()
