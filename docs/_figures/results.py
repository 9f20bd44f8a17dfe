"""Draws the charts of the results pages from the tables of the same pages, into docs/images/.

    python docs/_figures/results.py

No number is written here: a chart follows its table. tests/test_docs_figures.py finds pictures that
are older than their tables.
"""

import dataclasses
import itertools
import pathlib
import re

import style
from matplotlib.ticker import NullLocator, ScalarFormatter
from style import BAND, BLUE, GREEN, GREY, INK, ORANGE, PURPLE, RED, SKY, chart

PAGES = pathlib.Path(__file__).parents[1] / "results"
NUMBER = r"[-+]?\d[\d,]*(?:\.\d+)?"
CELL = re.compile(rf"({NUMBER})(?: ± ({NUMBER}))?(?: %)?")


def number(cell: str) -> tuple[float, float]:
    """(value, error) of a cell: '2.04 ± 0.02', '98.1 ± 0.2 %' or '1,407'.

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


CHARTS = {  # by the name of the picture
    "digits-trajectories-k": digits_trajectories_k, "guidance": guidance,
    "flow-matching-steps": flow_matching_steps, "shapes-guidance": shapes_guidance}


def main():
    """Draws every chart."""
    with style.look():
        for name, draw in CHARTS.items():
            style.save(draw(), style.IMAGES / f"{name}.png")


if __name__ == "__main__":
    main()
