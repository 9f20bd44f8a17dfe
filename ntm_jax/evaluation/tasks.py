"""Figures and table of how often images show what their captions describe, by task."""

import math

import numpy as np

from ntm_jax.evaluation.statistics import mean_and_stderr


def _over_tasks(task, values) -> dict:
    """{task: mean, stderr and count} of values [n] by their task's name [n], and their mean.

    The mean over tasks, "overall", is GenEval's overall score.
    """
    found = {name: mean_and_stderr(values[task == name]) | {"count": int(np.sum(task == name))}
             for name in dict.fromkeys(task.tolist())}
    stderr = math.sqrt(sum(figure["stderr"] ** 2 for figure in found.values())) / len(found)
    mean = float(np.mean([figure["mean"] for figure in found.values()]))
    return found | {"overall": {"mean": mean, "stderr": stderr}}


def figures(rows: dict, first: dict | None) -> dict:
    """Figures of a source's tasks, arrays [n], and their paired difference to those of `first`."""
    others = {name: values[~np.isnan(values)] for name, values in rows.items()
              if name not in ("task", "right", "traits")}
    result = _over_tasks(rows["task"], rows["right"])
    result["shares"] = {name: mean_and_stderr(values)
                        for name, values in others.items() if len(values)}
    if first is None:
        return result
    change = rows["right"].astype(int) - first["right"]
    return result | {"difference": _over_tasks(rows["task"], change)}


def table(tasks: dict) -> str:
    """evaluation.json's `tasks` in percent: a table a split, tasks by rows, guidance by columns."""
    guided = tasks.get("by_guidance", [tasks])
    lines, head = [], [f"guidance {at['guidance']}" for at in guided]
    for parts in (guided, [at["unseen"] for at in guided if "unseen" in at]):
        if parts:
            lines += _lines(parts, head)
    return "\n".join(lines)


def _lines(parts: list[dict], head: list[str]) -> list[str]:
    """The table of one split; parts: its figures for each guidance."""
    names = [name for name, figure in parts[0].items()
             if isinstance(figure, dict) and "count" in figure]
    rows = [(f"samples of {parts[0]['split']} that show what was asked, %", head)]
    rows += [(name, [_percent(part[name]) for part in parts]) for name in (*names, "overall")]
    if len(parts) > 1:
        changes = [_percent(part["difference"]["overall"]) for part in parts[1:]]
        rows.append((f"overall less that of {head[0]}", ["", *changes]))
    rows += [(f"share: {name}", [_percent(part["shares"].get(name)) for part in parts])
             for name in parts[0]["shares"]]
    columns = zip(*([name, *cells] for name, cells in rows), strict=True)
    first, *widths = [max(map(len, column)) for column in columns]
    return [f"  {name:<{first}}  " + "  ".join(
        f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        for name, cells in rows]


def _percent(figure: dict | None) -> str:
    return f"{100 * figure['mean']:.1f} ± {100 * figure['stderr']:.1f}" if figure else "-"
