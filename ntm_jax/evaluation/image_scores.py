"""Scores of a run's samples beside real images: class accuracy, feature scores, retrieval.

Symbols: n images; H, W, C image height, width, channels; V pixel levels.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ntm_jax.data.sources import Source
from ntm_jax.errors import UserError
from ntm_jax.evaluation import features, reference, statistics
from ntm_jax.evaluation.statistics import FeatureStatistics, mean_and_stderr
from ntm_jax.progress import track
from ntm_jax.runtime.config import Evaluate
from ntm_jax.runtime.run import Run
from ntm_jax.sampling import generate

RANKS = (1, 5)  # of retrieval
MAX_RECORDS = 20_000  # of a split, but for FID: an SVC's time grows with the square of their number
MAX_CANDIDATES = 10_000  # pictures that retrieval chooses from


def generated(run: Run, progress: bool = False,
              batch: int = generate.BATCH) -> Iterator[np.ndarray]:
    """Yields the samples that are scored, config.evaluate.num_samples of them, in order.

    They are batches of pictures [b, H, W, C], 0..V-1.
    """
    for index in track(generate.in_batches(run.config.evaluate.num_samples, batch), "samples",
                       "batches", show=progress):
        yield generate.pictures_at(run, index)


def recorded(run: Run, source: Source, most: int | None = None, progress: bool = False,
             batch: int = generate.BATCH) -> Iterator[np.ndarray]:
    """Yields the pictures of a split as `generated` does; `most`, evenly spread, of more records.
    """
    count = len(source.records)
    chosen = source.evenly_spread(count if most is None else most)
    with ThreadPoolExecutor() as pool:
        for places in track(generate.in_batches(len(chosen), batch), source.split, "batches",
                            show=progress):
            records = list(pool.map(source.records.__getitem__, chosen[places].tolist()))
            yield generate.as_pictures(run, np.stack([r["image"] for r in records]))


class Comparison:
    """What samples are compared with by features: real images, or a file of their statistics.

    Features of real images are computed when they are first needed, and then kept. Raises UserError
    for features that do not fit the data.
    """

    def __init__(self, run: Run, settings: Evaluate, train: Source, held_out: Source,
                 progress: bool = False):
        self._run, self._settings, self._progress = run, settings, progress
        self._train, self._held_out = train, held_out
        real, made = min(len(train.records), len(held_out.records)), settings.num_samples
        if min(real, made) < 5:
            raise UserError(f"{real} images are compared with {made}, and image scores need 5 of "
                            "each: raise config.evaluate.num_samples, or take larger splits")
        if settings.features == "cnn":
            features.check_classes(train)
        else:
            self.extractor  # noqa: B018  now, since its weights may be refused
        if settings.reference:
            self.real  # noqa: B018

    @functools.cached_property
    def extractor(self) -> features.Extractor:
        """The features that are compared."""
        settings = self._settings
        return features.make_extractor(
            settings.features, self._train, generate.picture_levels(self._run),
            settings.inception_weights, self._run.mesh)

    @functools.cached_property
    def real(self) -> FeatureStatistics:
        """The features of the training images, or those of the file of reference statistics."""
        if not self._settings.reference:
            return self._of(self._train)
        (picture,) = recorded(self._run, self._held_out, 1)
        return reference.read(self._settings.reference, self.extractor, picture,
                              generate.picture_levels(self._run))

    @functools.cached_property
    def frechet_held_out(self) -> dict[str, float]:
        """The Frechet distance of the held-out images."""
        return statistics.frechet(self.real, self._of(self._held_out))

    def _of(self, source: Source) -> FeatureStatistics:
        most = min(len(source.records), MAX_RECORDS) if self.extractor.proxy else len(
            source.records)
        found = FeatureStatistics(most)
        for images in recorded(self._run, source, most, self._progress, self.batch):
            found.add(self.extractor(images))
        return found

    @property
    def batch(self) -> int:
        """The number of images that are sampled or read at once."""
        return max(generate.BATCH, self.extractor.batch)

    def described(self) -> dict:
        """evaluation.json's description of what is compared."""
        extractor, settings = self.extractor, self._settings
        real = {"reference": settings.reference} if settings.reference else {
            "real_images": self.real.count, "real_split": self._train.split}
        return {"name": extractor.name, "proxy": extractor.proxy, "digest": extractor.digest} | real


def compare_with(run: Run, settings: Evaluate, train: Source, held_out: Source,
                 progress: bool = False) -> Comparison | None:
    """The Comparison that settings ask for; None without samples or features.

    settings: config.evaluate. Raises UserError like Comparison.
    """
    if not settings.num_samples or settings.features == "none" or not generate.picture_levels(run):
        return None
    return Comparison(run, settings, train, held_out, progress)


def guided(run: Run, guidance, **evaluate) -> Run:
    """The run with another guidance, and other settings of config.evaluate."""
    config = run.config.with_sampling(guidance=guidance).with_evaluation(**evaluate)
    return dataclasses.replace(run, config=config)


def classifier(run: Run, train: Source) -> Callable[[np.ndarray, int], np.ndarray] | None:
    """Trains a support vector classifier -> a function of samples [n, H, W, C] -> bool [n].

    It is True where the classifier predicts the requested class, index % num_classes; its second
    argument is the first sample's index. None where there are no classes to be learned, or more
    than MAX_RECORDS records.
    """
    classes = run.condition.classes
    if not (classes and train.pixel_levels) or len(train.records) > MAX_RECORDS:
        return None
    records = [train.records[i] for i in range(len(train.records))]
    records = [record for record in records if record["label"] >= 0]
    labels = [record["label"] for record in records]
    if len(set(labels)) < 2:
        return None
    from sklearn.svm import SVC  # imported here: it takes a second of every program's start

    def flat(images):
        return np.asarray(images, np.float64).reshape(len(images), -1) / (train.pixel_levels - 1)

    machine = SVC().fit(flat([record["image"] for record in records]), labels)
    return lambda images, first: machine.predict(flat(images)) == (
        np.arange(first, first + len(images)) % classes)


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


def feature_scores(run: Run, comparison: Comparison, progress: bool = False) -> dict[str, float]:
    """The scores by features of a run's samples; see image_scores."""
    return statistics.feature_scores(comparison.real, _scored(run, comparison, progress).features)


@dataclasses.dataclass(frozen=True)
class _Scored:
    """Of all samples whether the class is right, [n], and features; and the first pictures."""

    hits: np.ndarray
    features: FeatureStatistics
    first: np.ndarray


def _scored(run: Run, comparison: Comparison | None, progress: bool, right=None,
            keep: int = 0) -> _Scored:
    """One pass over the samples, of which only the first `keep` pictures stay in memory."""
    hits, first, seen = [np.zeros(0, bool)], [], 0
    found = FeatureStatistics(run.config.evaluate.num_samples)
    for images in generated(run, progress, comparison.batch if comparison else generate.BATCH):
        if right:
            hits.append(right(images, seen))
        if comparison:
            found.add(comparison.extractor(images))
        first.append(images[: max(keep - seen, 0)])
        seen += len(images)
    return _Scored(np.concatenate(hits), found, np.concatenate(first))


def image_scores(run: Run, train: Source, held_out: Source, comparison: Comparison | None,
                 guidance=(), progress: bool = False) -> dict:
    """evaluation.json's figures of samples, compared with the training images.

    class_accuracy, where the split has no more than MAX_RECORDS records, of several classes; with a
    comparison also frechet, kid, precision and recall, with NAME_stderr of each, and for captioned
    pictures retrieval. frechet_held_out is the distance of the held-out images: about what a
    perfect model reaches with as many samples as there are of them. guidance: scales or
    schedules, for each of which `guidance` lists class accuracy, its paired difference to the first
    one's on the same noise, and the feature scores, of which a model has those that it has without
    guidance. {} without classes and comparison.
    """
    config, made, result = run.config, settings(run), {}
    right = classifier(run, train)
    if not (right or comparison):
        return {}
    retrieves = (comparison and train.captions is not None and run.condition.captioned
                 and len(train.records) + len(held_out.records) <= MAX_CANDIDATES)
    scored = {scale: _scored(guided(run, scale, split=held_out.split), comparison, progress, right,
                             len(held_out.records) if retrieves else 0)
              for scale in dict.fromkeys((config.sample.guidance, *guidance))}
    own = scored[config.sample.guidance]
    if guidance:
        result["guidance"] = [{"guidance": scale} for scale in guidance]
    if right:
        result["class_accuracy"] = mean_and_stderr(own.hits) | made
        if run.spec.class_names:
            result["class_accuracy"]["by_class"] = {
                name: float(own.hits[label :: len(run.spec.class_names)].mean())
                for label, name in enumerate(run.spec.class_names) if label < len(own.hits)}
        for figure in result.get("guidance", ()):
            found, first = (scored[scale].hits for scale in (figure["guidance"], guidance[0]))
            figure |= mean_and_stderr(found)
            figure["difference"] = mean_and_stderr(found.astype(int) - first)
    if comparison:
        scores = {scale: statistics.feature_scores(comparison.real, each.features)
                  for scale, each in scored.items()}
        result |= scores[config.sample.guidance]
        result |= statistics.with_stderr({"frechet_held_out": comparison.frechet_held_out})
        for figure in result.get("guidance", ()):
            figure |= scores[figure["guidance"]]
        result["features"] = made | comparison.described()
    if retrieves:
        result |= retrieval(run, train, held_out, own.first)
    return result


def retrieval(run: Run, train: Source, held_out: Source, images) -> dict:
    """evaluation.json's retrieval: how often a held-out caption's own picture is near its sample.

    It is counted as found where it is the nearest, or among the five nearest, of all pictures, of
    training and held out. images [m, H, W, C]: samples of the held-out captions in turn, as
    Run.default_condition orders them; the first of each counts.
    """
    pictures = np.concatenate([*recorded(run, train), *recorded(run, held_out)])
    count, captions = len(pictures), min(len(images), len(held_out.records))
    own = len(train.records) + np.arange(captions)
    ranks = statistics.retrieved(pictures, images, own, generate.picture_levels(run))
    return {"retrieval": {f"rank_{k}": mean_and_stderr(ranks <= k) for k in RANKS} | {
        "chance": {f"rank_{k}": k / count for k in RANKS}, "candidates": count,
        "captions": captions, "features": statistics.THUMBNAILS, "proxy": True}}
