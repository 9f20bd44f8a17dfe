"""Draws the charts of the results pages from the tables of the same pages, into docs/images/.

    python docs/_figures/results.py

No number is written here: a chart follows its table. tests/test_docs_figures.py finds pictures that
are older than their tables.
"""

import dataclasses
import itertools
import pathlib
import re

import numpy as np
import style
from matplotlib.ticker import NullLocator, ScalarFormatter
from style import BAND, BLUE, GREEN, GREY, INK, ORANGE, PURPLE, RED, SKY, chart

PAGES = pathlib.Path(__file__).parents[1] / "results"
NUMBER = r"[-+]?\d[\d,]*(?:\.\d+)?"
CELL = re.compile(rf"({NUMBER})(?: ± ({NUMBER}))?(?: (?:%|of {NUMBER}))?")


def number(cell: str) -> tuple[float, float]:
    """(value, error) of a cell: '2.04 ± 0.02', '98.1 ± 0.2 %', '1,407' or '25.5 of 95'.

    The error is 0 where the cell has none. Raises ValueError for anything else.
    """
    match = CELL.fullmatch(cell)
    if not match:
        raise ValueError(f"{cell!r} is not a number with an error")
    value, error = (float((text or "0").replace(",", "")) for text in match.groups())
    return value, error


@dataclasses.dataclass
class Table:
    """A Markdown table: the texts of its first row and of the others, without * and `."""

    columns: list[str]
    rows: list[list[str]]

    def row(self, name: str) -> list[str]:
        """The one row whose first cell is this text. Raises ValueError where there is another."""
        (found,) = [row for row in self.rows if row[0] == name]
        return found

    def names(self) -> list[str]:
        """The first cell of each row."""
        return [row[0] for row in self.rows]

    def keys(self) -> list[float]:
        """The first cell of each row, as a number."""
        return numbers(self.names())[0]

    def column(self, name: str, rows: list[str] | None = None) -> tuple:
        """(values, errors) of a column, in all rows or in those of these first cells."""
        place = self.columns.index(name)
        return numbers([row[place] for row in (
            self.rows if rows is None else map(self.row, rows))])


def numbers(cells) -> tuple[list, list | None]:
    """(values, errors) of several cells; errors None where no cell has one."""
    pairs = [number(cell) for cell in cells]
    errors = [error for _, error in pairs]
    return [value for value, _ in pairs], errors if any(errors) else None


def table(page: str, section: str, *columns: str) -> Table:
    """The table of a page, such as digits, under a heading, that has these columns.

    Raises ValueError unless there is exactly one.
    """
    found, heading, lines = [], "", (PAGES / f"{page}.md").read_text().splitlines()
    for in_table, group in itertools.groupby(lines, lambda line: line.startswith("|")):
        if not in_table:
            headings = [line for line in group if re.match("#+ ", line)]
            heading = headings[-1].lstrip("# ") if headings else heading
        elif heading == section:
            header, _, *rows = [[cell.strip(" *`") for cell in line.strip("|").split("|")]
                                for line in group]
            if set(columns) <= set(header):
                found.append(Table(header, rows))
    if len(found) != 1:
        raise ValueError(f"{page}.md has {len(found)} tables of {columns} under {section!r}, not 1")
    return found[0]


def number_axis(axis, ticks):
    """Ticks of a logarithmic axis: these and no others, as plain numbers."""
    axis.set_major_formatter(ScalarFormatter())
    axis.set_ticks(ticks)
    axis.set_minor_locator(NullLocator())


def digits_trajectories_k():
    """The importance-weighted bound by the number of trajectories."""
    bounds = table("digits", "More trajectories tighten the bound", "K")
    counts, _ = numbers(bounds.columns[1:])
    figure, ((axes,),) = chart(3.0)
    axes.errorbar(counts, *numbers(bounds.row("bits/dim")[1:]), fmt="o-", color=BLUE)
    axes.set(xscale="log", xlabel="trajectories of each image, K",
             ylabel="importance-weighted\nbound, bits/dim",
             title="Digits: the bound on the held-out images")
    number_axis(axes.xaxis, counts)
    return figure


def guidance():
    """The distance and the recall of samples of digits by guidance, beside their accuracy."""
    scores = table("guidance", "Digits", "guidance", "class accuracy")
    figure, grid = chart(2.6, 1, 3)
    for axes, score in zip(
            grid[0], ("class accuracy", "Fréchet distance", "recall"), strict=True):
        axes.errorbar(scores.keys(), *scores.column(score), fmt="o-", color=BLUE)
        axes.set(xlabel="guidance scale w", title=score, xticks=[0, 1, 2, 3])
    return figure


def euler(scores: Table) -> tuple[list[str], list[float]]:
    """The rows of flow matching by Euler steps, and their numbers of steps."""
    rows = [name for name in scores.names() if name.endswith(" Euler steps")]
    return rows, [number(re.search(NUMBER, row).group())[0] for row in rows]


NTMS = {"NTM fine-tuned, lambda 2.5": ("s", ORANGE), "NTM fine-tuned, lambda 0": ("D", RED),
        "NTM from scratch": ("^", GREEN)}


def flow_matching_steps():
    """Accuracy and distance of flow matching by Euler steps, beside the NTMs of four steps."""
    figure, grid = chart(5.6, 2, 2, sharex=True)
    sections = {"Digits": "From flow matching to four steps", "MNIST": "MNIST"}
    for (name, section), column in zip(sections.items(), grid.T, strict=True):
        scores = table("frontier", section, "model", "class accuracy")
        rows, steps = euler(scores)
        for axes, score in zip(column, ("class accuracy", "Fréchet distance"), strict=True):
            axes.errorbar(steps, *scores.column(score, rows), fmt="o-", color=BLUE,
                          label="flow matching, Euler steps")
            for place, (row, (marker, colour)) in enumerate(NTMS.items()):
                beside = steps[0] * 0.92 ** (place + 1)  # of as many steps, without covering
                axes.errorbar([beside], *scores.column(score, [row]), fmt=marker, color=colour,
                              label=f"{row}, {steps[0]:g} steps")
            axes.axvspan(steps[0] * 0.92 ** 4, steps[0] * 1.08, color=BAND)
        column[0].set(title=name, ylabel="class accuracy, %")
        column[1].set(xscale="log", xlabel="steps", ylabel="Fréchet distance",
                      ylim=(0, 1.1 * max(scores.column("Fréchet distance")[0])))
        number_axis(column[1].xaxis, steps)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def pods_chips():
    """Times of the resources and memory a chip by the number of chips, on logarithmic axes."""
    section = "More chips at the same batch"
    times, memory = (table("pods", section, "chips", column)
                     for column in ("network, ms", "state, GiB a chip"))
    (capacity,) = {row[2].split(" of ")[1] for row in table("pods", "Does it fit?", "topology").rows
                   if row[1].startswith("v5p")}
    figure, ((left, right),) = chart(3.4, 1, 2)
    for axes, source, columns in (
            (left, times, {"compute, ms": "compute", "memory, ms": "memory",
                           "network, ms": "network"}),
            (right, memory, {"all memory, GiB a chip": "all memory",
                             "state, GiB a chip": "state"})):
        for (column, text), marker, colour in zip(
                columns.items(), "os^", (BLUE, ORANGE, GREEN), strict=False):
            values, _ = source.column(column)
            axes.plot(source.keys(), values, f"{marker}-", color=colour)
            axes.annotate(text, (source.keys()[-1], values[-1]), (8, -4),
                          textcoords="offset points", color=colour)
        axes.set(xscale="log", yscale="log", xlabel="chips, TPU v5p",
                 xlim=(source.keys()[0] * 0.8, source.keys()[-1] * 3))
        number_axis(axes.xaxis, source.keys())
        number_axis(axes.yaxis, [1, 2, 5, 10, 20, 50, 100, 200, 500])
    left.set(title="imagenet256: time of a step", ylabel="ms, each resource at its peak",
             ylim=(10, 500))
    right.set(title="imagenet256: memory", ylabel="GiB a chip", ylim=(1, 140))
    right.axhline(float(capacity), color=INK, linestyle="--")
    right.annotate("HBM", (memory.keys()[-1], float(capacity)), (8, -13),
                   textcoords="offset points")
    return figure


def shapes_guidance():
    """Captions shown rightly by guidance, for each task."""
    figure, grid = chart(4.6, 1, 2, sharey=True)
    looks = {"single object": ("v", GREY), "two objects": ("s", ORANGE), "counting": ("^", GREEN),
             "colours": ("D", RED), "position": ("P", PURPLE), "colour attribution": ("X", SKY)}
    for axes, section, everything, title in zip(
            grid[0], ("Test captions, by guidance", "Held-out combinations, by guidance"),
            ("all six tasks", "all tasks"), ("Test captions", "Held-out combinations"),
            strict=True):
        shares = table("shapes", section, "task")
        guidance, _ = numbers(shares.columns[1:])
        for task, *cells in shares.rows:
            marker, colour = looks.get(task, ("o", INK))
            axes.errorbar(guidance, *numbers(cells), fmt=f"{marker}-", color=colour,
                          label="all tasks" if task == everything else task,
                          linewidth=2.6 if task == everything else 1.3)
        axes.set(title=title, xlabel="guidance scale w", xticks=guidance, ylim=(0, 100))
    grid[0, 0].set_ylabel("captions shown exactly, %")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def reward_updates():
    """The reward of held-out captions, and the likelihood of held-out images, by updates."""
    learned = table("reward", "Captioned shapes", "updates", "reward")
    figure, ((left, right),) = chart(2.8, 1, 2)
    left.plot(learned.keys(), learned.column("reward")[0], "o-", color=BLUE)
    left.set(title="Samples that show their caption", xlabel="updates of 192 samples",
             ylabel="share", ylim=(0.5, 1))
    right.plot(learned.keys(), learned.column("trajectory NLL")[0], "o-", color=GREEN)
    right.set(title="Held-out images", xlabel="updates of 192 samples",
              ylabel="trajectory NLL, nats/dim", ylim=(0.56, 0.57))
    return figure


ESTIMATES = {"NTM, bound": ("o", GREEN), "NTM, importance-weighted, 32 trajectories": ("s", BLUE),
             "flow matching, Euler, exact divergence": ("^", ORANGE),
             "flow matching, Heun, exact divergence": ("v", SKY), "F2D2": ("D", RED),
             "F2D2's own velocity, Heun, exact divergence": ("P", PURPLE)}


def truth_errors():
    """Errors of estimates of known log-densities, by evaluations, for each density."""
    errors = table("truth", "Likelihoods in few evaluations", "evaluations", "field")
    figure, grid = chart(6.4, 2, 2, sharex=True, sharey=True)
    for place, (axes, density) in enumerate(zip(grid.flat, errors.columns[2:], strict=True), 2):
        axes.axhspan(0, 10, color=BAND)
        axes.axhline(0, color=INK, linewidth=0.8)
        for estimate, (marker, colour) in ESTIMATES.items():
            rows = [row for row in errors.rows if row[0] == estimate]
            counts, _ = numbers([row[1] for row in rows])
            axes.errorbar(counts, *numbers([row[place] for row in rows]), fmt=f"{marker}-",
                          color=colour, label=estimate)
        axes.set(title=density, xscale="log", ylim=(-100, 10))
        axes.set_yscale("symlog", linthresh=0.1)
    for axes in grid[:, 0]:
        axes.set_ylabel("estimate less truth, nats")
    for axes in grid[-1]:
        axes.set_xlabel("network evaluations")
        number_axis(axes.xaxis, [1, 4, 16, 64, 256])
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


GROWTH = {"Width": "width", "Tokens": "tokens", "Batch": "batch", "Steps": "T"}


def growth():
    """Times of a step by each setting, on logarithmic axes, and of compilation by depth."""
    figure, ((left, right),) = chart(3.6, 1, 2)
    depth = table("growth", "Depth", "predictor layers")
    lines = {"predictor layers": depth} | {
        key: table("growth", section, key) for section, key in GROWTH.items()}
    for (text, source), marker, colour in zip(
            lines.items(), "os^DP", (BLUE, ORANGE, GREEN, RED, PURPLE), strict=True):
        factors, times = np.array(source.keys()), np.array(source.column("ms")[0])
        left.plot(factors / factors[0], times / times[0], f"{marker}-", color=colour, label=text)
    left.plot([1, 16], [1, 16], color=GREY, linestyle="--", label="linear")
    left.set(title="digits: time of a step", xscale="log", yscale="log",
             xlabel="factor of the setting", ylabel="factor of the time")
    number_axis(left.xaxis, [1, 2, 4, 8, 16])
    number_axis(left.yaxis, [1, 2, 4, 8, 16, 32])
    left.legend()
    for column, text, marker, colour in (("compilation, s", "unrolled", "o", BLUE),
                                         ("scanned, compilation, s", "scanned", "s", ORANGE)):
        right.plot(depth.keys(), depth.column(column)[0], f"{marker}-", color=colour, label=text)
    right.set(title="Compilation", xlabel="predictor layers", ylabel="s", ylim=(0, 40),
              xticks=depth.keys())
    right.legend()
    return figure


CHARTS = {  # by the name of the picture
    "digits-trajectories-k": digits_trajectories_k, "guidance": guidance,
    "flow-matching-steps": flow_matching_steps,
    "growth": growth, "pods-chips": pods_chips, "reward-updates": reward_updates,
    "shapes-guidance": shapes_guidance, "truth-errors": truth_errors}


def main():
    """Draws every chart."""
    with style.look():
        for name, draw in CHARTS.items():
            style.save(draw(), style.IMAGES / f"{name}.png")


if __name__ == "__main__":
    main()
