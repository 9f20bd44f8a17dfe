"""Scores of a run's samples beside real images: class accuracy, feature scores, retrieval.

Symbols: n images; H, W, C image height, width, channels; V pixel levels.
"""

import dataclasses

import numpy as np

from ntm_jax.data.sources import Source
from ntm_jax.errors import UserError
from ntm_jax.evaluation import statistics
from ntm_jax.evaluation.statistics import mean_and_stderr
from ntm_jax.progress import track
from ntm_jax.runtime.run import Run
from ntm_jax.sampling import generate

RANKS = (1, 5)  # of retrieval
MAX_RECORDS = 20_000  # of a split: an SVC's time grows with the square of their number
MAX_CANDIDATES = 10_000  # pictures that retrieval chooses from


def generated(run: Run, progress: bool = False) -> np.ndarray:
    """The samples that are scored, config.evaluate.num_samples of them: [n, H, W, C], 0..V-1."""
    batches = track(generate.in_batches(run.config.evaluate.num_samples, generate.BATCH), "samples",
                    "batches", show=progress)
    return np.concatenate([generate.sample_at(run, index) for index in batches])


def guided(run: Run, guidance, **evaluate) -> Run:
    """The run with another guidance, and other settings of config.evaluate."""
    config = run.config.with_sampling(guidance=guidance).with_evaluation(**evaluate)
    return dataclasses.replace(run, config=config)


def classifier(num_classes: int, pixel_levels: int, real: np.ndarray, labels: np.ndarray):
    """Trains a support vector classifier -> a function of images [n, H, W, C] -> bool [n].

    It is True where the classifier predicts the requested class, index % num_classes.
    """
    from sklearn.svm import SVC  # imported here: it takes a second of every program's start

    def features(images):
        return np.asarray(images, np.float64).reshape(len(images), -1) / (pixel_levels - 1)

    machine = SVC().fit(features(real), labels)
    return lambda images: machine.predict(features(images)) == np.arange(len(images)) % num_classes


def has_tasks(run: Run, source: Source) -> bool:
    """Whether the source can check samples against its captions."""
    return bool(run.condition.captioned and source.tasks)


def check_guidance(run: Run, source: Source, guidance) -> None:
    """Raises UserError for scales of guidance where no score would compare them."""
    classes = run.condition.classes and run.spec.count <= MAX_RECORDS
    if guidance and not (has_tasks(run, source) or classes):
        raise UserError("--guidance compares class accuracies of a model of classes with at most "
                        f"{MAX_RECORDS} training images, or tasks of a model of captions whose "
                        "source checks images: neither applies here; leave --guidance out")
    for scale in guidance:
        generate.override(run.config, guidance=scale)


def settings(run: Run) -> dict:
    """How the scored samples were made."""
    sample = run.config.sample
    return {"images": run.config.evaluate.num_samples, "decoder": sample.decoder,
            "guidance": sample.guidance, "steps": sample.steps} | selected(run)


def selected(run: Run) -> dict:
    """How samples are selected: candidates, stop_nats and judge; {} where they are not."""
    if not run.selection:
        return {}
    judge = run.selection.judge
    return {"candidates": run.selection.candidates, "enough": run.selection.stop_nats,
            "judge": {"workdir": judge.workdir, "step": judge.step}}


def image_scores(run: Run, train: Source, held_out: Source, extractor, guidance=(),
                 progress: bool = False) -> dict:
    """evaluation.json's figures of samples, compared with the training images.

    Of a split with more than MAX_RECORDS records, so many evenly spread ones are compared.
    class_accuracy, where the split is no larger and has images of several classes; with an
    extractor (features.Extractor) also frechet, precision and recall, with NAME_stderr of each, and
    for captioned pictures retrieval. frechet_held_out is the distance of the held-out images: about
    what a perfect model reaches with as many samples as there are of them. guidance: scales or
    schedules, for each of which `guidance` lists class accuracy, its paired difference to the first
    one's on the same noise, and the feature scores, of which a model has those that it has without
    guidance.
    """
    config = run.config
    records = [train.records[i] for i in train.evenly_spread(MAX_RECORDS)]
    real, made, result = np.stack([r["image"] for r in records]), settings(run), {}
    scales = dict.fromkeys((config.sample.guidance, *guidance))
    images = {scale: generated(guided(run, scale, split=held_out.split), progress)
              for scale in scales}
    if guidance:
        result["guidance"] = [{"guidance": scale} for scale in guidance]
    labels = np.array([r["label"] for r in records])
    known = labels >= 0
    learnable = len(train.records) <= MAX_RECORDS and len(set(labels[known])) > 1
    classes = run.condition.classes
    if classes and learnable:
        right = classifier(classes, train.pixel_levels, real[known], labels[known])
        hits = {scale: right(sampled) for scale, sampled in images.items()}
        own = hits[config.sample.guidance]
        result["class_accuracy"] = mean_and_stderr(own) | made
        if run.spec.class_names:
            result["class_accuracy"]["by_class"] = {
                name: float(own[label :: len(run.spec.class_names)].mean())
                for label, name in enumerate(run.spec.class_names) if label < len(own)}
        for figure in result.get("guidance", ()):
            found, first = hits[figure["guidance"]], hits[guidance[0]]
            figure |= mean_and_stderr(found)
            figure["difference"] = mean_and_stderr(found.astype(int) - first)
    if extractor:
        wanted = extractor(real)
        unseen = extractor(np.stack([held_out.records[i]["image"]
                                     for i in held_out.evenly_spread(MAX_RECORDS)]))
        scores = {scale: statistics.feature_scores(wanted, extractor(sampled))
                  for scale, sampled in images.items()}
        result |= scores[config.sample.guidance]
        result |= statistics.with_stderr({"frechet_held_out": statistics.frechet(wanted, unseen)})
        for figure in result.get("guidance", ()):
            figure |= scores[figure["guidance"]]
        result["features"] = made | {
            "name": extractor.name, "proxy": extractor.proxy, "digest": extractor.digest,
            "real_images": len(real), "real_split": train.split}
        if train.captions is not None and run.condition.captioned:
            result |= retrieval(held_out, real, images[config.sample.guidance])
    return result


def retrieval(held_out: Source, real, images) -> dict:
    """evaluation.json's retrieval: how often a held-out caption's own picture is near its sample.

    It is counted as found where it is the nearest, or among the five nearest, of all pictures: real
    [n, H, W, C] and held-out ones. Returns {} where there are too many. images [m, ...]: samples of
    the held-out captions in turn, as Run.default_condition orders them; the
    first of each counts.
    """
    records = held_out.records
    count, captions = len(real) + len(records), min(len(images), len(records))
    if count > MAX_CANDIDATES:
        return {}
    unseen = np.stack([records[i]["image"] for i in range(len(records))])
    own = len(real) + np.arange(captions)
    pictures = np.concatenate([real, unseen])
    ranks = statistics.retrieved(pictures, images[:captions], own, held_out.pixel_levels)
    return {"retrieval": {f"rank_{k}": mean_and_stderr(ranks <= k) for k in RANKS} | {
        "chance": {f"rank_{k}": k / count for k in RANKS}, "candidates": count,
        "captions": captions, "features": statistics.THUMBNAILS, "proxy": True}}
