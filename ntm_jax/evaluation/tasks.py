"""Figures of how often images show what their captions describe, by task."""

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
