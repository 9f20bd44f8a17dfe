"""The whole evaluation of a run: held-out likelihood, comparisons, and scores of its samples."""

import dataclasses
import warnings
from collections.abc import Callable

import numpy as np

from ntm_jax.data import pipeline
from ntm_jax.data.sources import Source
from ntm_jax.errors import UserError
from ntm_jax.evaluation import image_scores, measures, reference, scoring, statistics
from ntm_jax.evaluation.report import directions, provenance, summarize, units
from ntm_jax.registry import load
from ntm_jax.runtime.processes import require_same_everywhere
from ntm_jax.runtime.run import Run
from ntm_jax.sampling import decoders, generate


@dataclasses.dataclass(frozen=True)
class EvaluationOptions:
    """What an evaluation looks at; None stands for the configuration's setting."""

    split: str | None = None
    trajectories: int | None = None  # for each record
    features: str | None = None  # none, pixels, cnn, inception: what samples are compared by
    inception_weights: str | None = None  # a file of torch-fidelity's
    reference: str | None = None  # a file of statistics, in place of the training images
    write_reference: str | None = None  # a new file, for those of the training images
    guidance: tuple = ()  # scales or schedules at which samples are scored too; see image_scores


def evaluate(run: Run, options: EvaluationOptions | None = None, *, against: Run | None = None,
             measure: Callable[[Run, Source, int], dict] | None = None,
             comparison: image_scores.Comparison | None = None,
             progress: bool = False) -> tuple[dict, dict]:
    """Evaluates a run -> (the content of evaluation.json, the scores of every record).

    against: another run, scored on the same records. measure: the objective's own held-out figures;
    see training.objectives.Objective. comparison: the real images that training compared samples
    with, where it did.

    Raises UserError where the figures of the two runs do not compare.
    """
    config = run.config
    options = options or EvaluationOptions()
    asked = {name: getattr(options, name) for name in (
        "split", "trajectories", "features", "inception_weights", "reference")}
    settings = config.with_evaluation(
        **{name: value for name, value in asked.items() if value is not None}).evaluate
    split, trajectories = settings.split, settings.trajectories
    if against:
        _check_comparable(run, against)
    source, train = config.data.open(split), config.data.open(config.data.split)
    scores_images = config.evaluate.num_samples and generate.picture_levels(run)
    features = options.features not in (None, "none")
    for name, given in (("features", features), ("guidance", options.guidance),
                        ("candidates", run.selection), ("reference", options.reference),
                        ("write_reference", options.write_reference)):
        if given and not scores_images:
            raise UserError(f"--{name} is about samples, and none are scored: give --images and a "
                            "model of pixels, or of latents with config.sample.autoencoder, or "
                            f"leave --{name} out")
        if given and name.endswith("reference") and settings.features == "none":
            raise UserError(f"--{name} is of features, and none are compared: give --features=cnn "
                            "or another")
    if options.write_reference:
        if settings.reference:
            raise UserError("--write_reference writes statistics of the training images, and "
                            f"--reference={settings.reference} takes their place: give one of them")
        reference.check_new(options.write_reference)
    image_scores.check_guidance(run, source, options.guidance)
    require_same_everywhere(
        {f"--{name}": value for name, value in dataclasses.asdict(settings).items()} |
        {"--step": run.step, "--steps": config.sample.steps, "--guidance": options.guidance,
         "--candidates": image_scores.selected(run),
         "--against": [against.workdir, against.step] if against else None})
    changed = pipeline.changed_data(source.name, run.spec.version, source.version)
    if changed:
        warnings.warn(changed, stacklevel=2)
    comparison = comparison or image_scores.compare_with(run, settings, train, source, progress)
    if comparison and options.write_reference:
        reference.write(options.write_reference, comparison.real, comparison.extractor)
    table = scoring.score_records(run, source, trajectories, progress)
    result = {"step": run.step, "split": split}
    result |= summarize(table, run.spec, trajectories)
    if run.spec.columns:
        decoded = scoring.score_records(run, source, trajectories, progress, decoded=True)
        clean = summarize(decoded, run.spec, trajectories)
        result |= {f"clean_{name}": clean[name] for name in ("nats_per_dim",
                                                             "effective_sample_size")}
    if decoders.find(config.sample.decoder).needs_levels:
        result["denoising"] = measures.denoising_errors(run, source)
    if run.denoiser:
        result["denoiser"] = measures.denoiser_errors(run, source)
    if measure:
        figures = measure(run, source, trajectories)
        result |= figures | {"measures": list(figures)}
    if against:
        own = against.config.data.open(split)  # its conditions and tokens may be others
        other = scoring.score_records(against, own, trajectories, progress)
        result["against"] = {"workdir": against.workdir, "step": against.step, "raw": against.raw
                             } | compare(table, other, run.spec)
    if scores_images:
        result |= image_scores.image_scores(run, train, source, comparison, options.guidance,
                                            progress)
    for name, place in source.measures.items():
        figures = load(place)(run, source, table, options.guidance, progress)
        result |= {name: figures} if figures else {}
    result["directions"] = directions(result)
    result["provenance"] = provenance(run, source)
    return result, table


def compare(table: dict, other: dict, spec: pipeline.DataSpec) -> dict:
    """The bounds of one run minus those of another on the same records; negative is better.

    Standard errors are paired.
    """
    dimensions = spec.tokens * spec.dim
    differences = {name: other[name].astype(np.float64) - table[name] for name in scoring.BOUNDS}
    return {unit: {name: statistics.mean_and_stderr(values / (dimensions * size))
                   for name, values in differences.items()}
            for unit, size in units(spec.pixel_levels).items()}


def _check_comparable(run: Run, other: Run) -> None:
    """Raises UserError where the figures of two runs on the same records do not compare."""
    for section, key in (("data", "source"), ("data", "image_size"), ("trajectory", "t_min")):
        mine, theirs = (getattr(getattr(r.config, section), key) for r in (run, other))
        if mine != theirs and not (key == "t_min" and run.spec.pixel_levels):
            raise UserError(f"--against={other.workdir} has {section}.{key} = {theirs}, and this "
                            f"run has {mine}: their figures do not compare; give a run with the "
                            f"same {section}.{key}")
