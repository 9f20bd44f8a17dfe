"""Scores of a run's samples: class accuracy, image scores, the tasks that captions ask for, retrieval; and by guidance, paired.

n images; H, W, C image height, width, channels.
"""

import dataclasses
import math

import numpy as np
import tqdm

from ntm_jax.data.sources import Source
from ntm_jax.errors import UserError
from ntm_jax.runtime import generate, quality
from ntm_jax.runtime.config import Config
from ntm_jax.runtime.quality import mean

RANKS = (1, 5)  # of retrieval
MAX_RECORDS = 20_000  # of the training split, for what samples are compared with: an SVC's time grows with the square of them


def generated(run, progress: bool = False) -> np.ndarray:
    """The images that samples are scored by, config.evaluate.images of them, made as config.sample says: [n, H, W, C], 0..levels-1."""
    batches = tqdm.tqdm(generate.in_batches(run.config.evaluate.images, 500), "samples", unit="batch", leave=False,
                        disable=None if progress else True)
    return np.concatenate([run.sample_at(index) for index in batches])


def classifier(num_classes: int, levels: int, real: np.ndarray, labels: np.ndarray):
    """A function images [n, H, W, C] -> [n]: which ones a support vector classifier, fitted on real images, takes for the class that they
    were asked to be, which is the classes in turn."""
    from sklearn.svm import SVC

    def features(images):
        return np.asarray(images, np.float64).reshape(len(images), -1) / (levels - 1)

    machine = SVC().fit(features(real), labels)
    return lambda images: machine.predict(features(images)) == np.arange(len(images)) % num_classes


def _over_tasks(task, values) -> dict:
    """{task: mean, stderr and count of its values} and the mean over tasks, GenEval's overall; task [n] names, values [n]."""
    found = {name: mean(values[task == name]) | {"count": int(np.sum(task == name))} for name in dict.fromkeys(task.tolist())}
    of_means = math.sqrt(sum(figure["stderr"] ** 2 for figure in found.values()))
    return found | {"overall": {"mean": float(np.mean([f["mean"] for f in found.values()])), "stderr": of_means / len(found)}}


def _guided(run, guidance, **evaluate):
    """The run with another guidance, and other settings of config.evaluate."""
    config = dataclasses.replace(run.config, sample=dataclasses.replace(run.config.sample, guidance=guidance),
                                 evaluate=dataclasses.replace(run.config.evaluate, **evaluate))
    return dataclasses.replace(run, config=config)


def _prompted(run, source: Source, guidance, progress: bool) -> dict:
    """source.tasks of config.evaluate.images samples of the source's captions in turn, at a guidance."""
    images = generated(_guided(run, guidance, split=source.split), progress)
    return source.tasks(images, [source.captions[i % len(source.captions)] for i in range(len(images))])


def _task_figures(rows: dict, first: dict | None) -> dict:
    """Figures of source.tasks' arrays [n], and of what they have over those of the first guidance, paired."""
    others = {name: values[~np.isnan(values)] for name, values in rows.items() if name not in ("task", "right")}
    result = _over_tasks(rows["task"], rows["right"]) | {"shares": {name: mean(values) for name, values in others.items() if len(values)}}
    return result if first is None else result | {"difference": _over_tasks(rows["task"], rows["right"].astype(int) - first["right"])}


def task_scores(run, source: Source, guidance=(), progress: bool = False) -> dict:
    """evaluation.json's `tasks`, of a model of captions whose images can be checked: the share of samples that show what they were asked
    for, of config.evaluate.images prompts of the split, and as many of the source's unseen combinations.

    Returns {task: mean, stderr and count; "overall": mean and stderr of the mean over tasks; "shares": mean and stderr of the scorer's
    further rates; "split"; "unseen": the same of that split}, and how they were made. guidance: scales or schedules; of each the same in
    the list "by_guidance", with "difference", by task, to the first one on the same noise, paired.
    """
    config = run.config
    splits = [source]
    if source.unseen and not source.split.startswith(source.unseen):
        splits.append(config.data.open(source.unseen))
    rows = {scale: [_prompted(run, asked, scale, progress) for asked in splits]
            for scale in dict.fromkeys((config.sample.guidance, *guidance))}

    def figures(scale):
        seen, *unseen = [{"split": asked.split} | _task_figures(rows[scale][i], rows[guidance[0]][i] if guidance else None)
                         for i, asked in enumerate(splits)]
        return {"guidance": scale} | seen | ({"unseen": unseen[0]} if unseen else {})

    result = _made(config) | figures(config.sample.guidance)
    return result | {"by_guidance": [figures(scale) for scale in guidance]} if guidance else result


def asks_tasks(run, source: Source) -> bool:
    """Whether the run's samples can be checked by what the source's captions ask for."""
    return bool(run.model.config.text_width and source.tasks)


def check_guidance(run, source: Source, guidance) -> None:
    """UserError for scales of guidance at which neither tasks nor the class accuracy can be told."""
    scored = asks_tasks(run, source) or (run.model.config.num_classes and run.spec.count <= MAX_RECORDS)
    if guidance and not (scored and run.spec.levels and run.config.evaluate.images):
        raise UserError("--guidance compares class accuracies, and they are told of a model of classes and pixels, of at most "
                        f"{MAX_RECORDS} training images (or tasks, of one of captions and data.source=shapes), with config.evaluate.images "
                        "above 0")
    for scale in guidance:
        generate.check(run.config, None, scale)


def _made(config: Config) -> dict:
    """How the samples that are scored were made."""
    return {"images": config.evaluate.images} | {name: getattr(config.sample, name) for name in ("decoder", "guidance", "steps")}


def image_scores(run, train: Source, held_out: Source, extractor, guidance=(), progress: bool = False) -> dict:
    """evaluation.json's figures of samples, beside the training images: class_accuracy, and frechet, precision and recall on features; of
    captioned pictures also retrieval.

    guidance: scales or schedules; of each the class accuracy, by how much it differs from the first one's on the same noise, paired, and
    the image scores.
    extractor: quality.Extractor or None. frechet_held_out is the same distance of the held-out images: what a perfect model would come
    near with as many samples as there are of these; more come nearer.
    """
    config = run.config
    records = [train.records[i] for i in range(min(len(train.records), MAX_RECORDS))]
    real, made, result = np.stack([r["image"] for r in records]), _made(config), {}
    images = {scale: generated(_guided(run, scale), progress) for scale in dict.fromkeys((config.sample.guidance, *guidance))}
    if run.model.config.num_classes and len(train.records) <= MAX_RECORDS:
        right = classifier(run.model.config.num_classes, train.levels, real, np.array([r["label"] for r in records]))
        hits = {scale: right(made_at) for scale, made_at in images.items()}
        result["class_accuracy"] = mean(hits[config.sample.guidance]) | made
        if guidance:
            result["guidance"] = [{"guidance": scale} | mean(hits[scale]) | {
                "difference": mean(hits[scale].astype(int) - hits[guidance[0]])} for scale in guidance]
    if extractor:
        unseen = np.stack([held_out.records[i]["image"] for i in range(min(len(held_out.records), MAX_RECORDS))])
        wanted = extractor(real)
        scores = {scale: quality.scores(wanted, extractor(made_at)) for scale, made_at in images.items()}
        result |= scores[config.sample.guidance] | {"frechet_held_out": quality.frechet(wanted, extractor(unseen))}
        for figure in result.get("guidance", ()):
            figure |= scores[figure["guidance"]]
        result["features"] = made | {"name": extractor.name, "proxy": extractor.proxy, "digest": extractor.digest,
                                     "real_images": len(real), "real_split": train.split}
        if train.captions is not None and run.model.config.text_width:
            result |= retrieval(config, real, images[config.sample.guidance], train.levels)
    return result


MAX_CANDIDATES = 10_000  # pictures to choose from


def retrieval(config: Config, real, images, levels: int) -> dict:
    """evaluation.json's retrieval: how often the picture of a held-out caption is the nearest, or among the 5 nearest, to the image made of
    the caption, among all pictures real [n, H, W, C] and held-out ones; {} where they are too many. images [m, ...]: of those captions in
    turn, as generate.conditions tells them, of which the first of each counts."""
    records = config.data.open(config.evaluate.split).records
    count, captions = len(real) + len(records), min(len(images), len(records))
    if count > MAX_CANDIDATES:
        return {}
    pictures = np.concatenate([real, np.stack([records[i]["image"] for i in range(len(records))])])
    ranks = quality.retrieved(pictures, images[:captions], len(real) + np.arange(captions), levels)
    return {"retrieval": {f"rank_{k}": mean(ranks <= k) for k in RANKS} | {
        "chance": {f"rank_{k}": k / count for k in RANKS}, "candidates": count, "captions": captions, "features": quality.THUMBNAILS,
        "proxy": True}}


def task_table(tasks: dict) -> str:
    """evaluation.json's `tasks` as a person reads them, in percent: for either split a table with a row a task and a column a guidance."""
    guided = tasks.get("by_guidance", [tasks])
    lines, head = [], [f"guidance {at['guidance']}" for at in guided]
    for parts in (guided, [at["unseen"] for at in guided if "unseen" in at]):
        if not parts:
            continue
        names = [name for name, figure in parts[0].items() if isinstance(figure, dict) and "count" in figure]
        rows = [(f"samples of {parts[0]['split']} that show what was asked, %", head)]
        rows += [(name, [_percent(part[name]) for part in parts]) for name in (*names, "overall")]
        if len(parts) > 1:
            rows.append((f"overall less that of {head[0]}", ["", *(_percent(part["difference"]["overall"]) for part in parts[1:])]))
        rows += [(f"share: {name}", [_percent(part["shares"].get(name)) for part in parts]) for name in parts[0]["shares"]]
        widths = [max(map(len, column)) for column in zip(*([name, *cells] for name, cells in rows), strict=True)]
        for name, cells in rows:
            padded = (f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
            lines.append(f"  {name:<{widths[0]}}  " + "  ".join(padded))
    return "\n".join(lines)


def _percent(figure: dict | None) -> str:
    return f"{100 * figure['mean']:.1f} ± {100 * figure['stderr']:.1f}" if figure else "-"
