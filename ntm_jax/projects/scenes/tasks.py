"""Figures of how often images show what their captions describe, by task."""

import itertools
import math

import numpy as np

from ntm_jax.data.sources import Source
from ntm_jax.evaluation import image_scores
from ntm_jax.evaluation.statistics import mean_and_stderr
from ntm_jax.runtime.run import Run


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
    """The figures of evaluation.json for one guidance.

    rows, first: what Source.tasks returns for this guidance and for the one that it is compared
    with, {name: [n]}; with `first` the paired difference is added.
    """
    others = {name: values[~np.isnan(values)] for name, values in rows.items()
              if name not in ("task", "right", "traits")}
    result = _over_tasks(rows["task"], rows["right"])
    result["shares"] = {name: mean_and_stderr(values)
                        for name, values in others.items() if len(values)}
    if first is None:
        return result
    change = rows["right"].astype(int) - first["right"]
    return result | {"difference": _over_tasks(rows["task"], change)}


def task_scores(run: Run, source: Source, scored: dict, guidance=(),
                progress: bool = False) -> dict:
    """evaluation.json's `tasks`: the share of samples that show what their captions ask for.

    For config.evaluate.num_samples prompts of the split, and as many of the source's unseen
    combinations. {} without samples, and for a model without captions.

    Returns {task: mean, stderr and count; "overall": mean over tasks with its stderr; "shares":
    mean and stderr of further rates; "split"; "unseen": the same for that split}, and how the
    samples were made. guidance: scales or schedules, for each of which the list "by_guidance" holds
    the same, with "difference", by task, to the first one on the same noise, paired.
    """
    config = run.config
    if not (config.evaluate.num_samples and image_scores.has_tasks(run, source)):
        return {}
    splits = [source]
    if source.unseen and not source.split.startswith(source.unseen):
        splits.append(config.data.open(source.unseen))

    def checked(scale, asked):
        own = image_scores.guided(run, scale, split=asked.split)
        captions, parts = itertools.cycle(asked.captions), []
        for images in image_scores.generated(own, progress):
            parts.append(asked.tasks(images, list(itertools.islice(captions, len(images)))))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    rows = {scale: [checked(scale, asked) for asked in splits]
            for scale in dict.fromkeys((config.sample.guidance, *guidance))}

    def compared(scale):
        first = rows[guidance[0]] if guidance else [None] * len(splits)
        seen, *unseen = [{"split": asked.split} | figures(found, other)
                         for asked, found, other in zip(splits, rows[scale], first, strict=True)]
        return {"guidance": scale} | seen | ({"unseen": unseen[0]} if unseen else {})

    result = image_scores.settings(run) | compared(config.sample.guidance)
    return result | {"by_guidance": [compared(scale) for scale in guidance]} if guidance else result
