"""The frontier of runs: how good their samples are against how fast they are drawn.

A row is a model with a decoder and a number of steps: an NTM with its own decoder, `score` and, if
it has one, its learned denoiser, at every T that it was trained for; a flow-matching model with
each ODE solver at each of ODE_STEPS. Runs that differ in their seed alone are one model. A run's
folder counts its own denoiser's FLOPs in the rows of that decoder alone.

Every row has equally many samples, the same real images, features and classifier. Standard errors
over samples: of the Frechet distance that of a bootstrap over the generated images in the limit of
many resamples (the infinitesimal jackknife); of precision and accuracy that of a mean over the
generated images, of recall over the real ones, both with the manifold fixed.
"""

import collections
import dataclasses
import itertools
import json
import math
import statistics
import sys
from collections.abc import Sequence

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from ntm_jax import files
from ntm_jax.errors import UserError
from ntm_jax.evaluation import image_scores
from ntm_jax.evaluation.statistics import (
    FeatureStatistics,
    frechet,
    mean_and_stderr,
    precision_recall,
)
from ntm_jax.export import hub
from ntm_jax.export.read import is_export, load_run
from ntm_jax.runtime import checkpoint, config_file, flops, plots
from ntm_jax.runtime.config import AUTO, Config
from ntm_jax.runtime.processes import require_same_everywhere
from ntm_jax.runtime.run import DENOISER, Run, different_data
from ntm_jax.sampling import decoders, generate
from ntm_jax.tools.rates import benchmark
from ntm_jax.training import objectives
from ntm_jax.training.reference_model import ABOVE
from ntm_jax.training.writers.lines import NAME as METRICS

ODE_STEPS = (1, 2, 4, 8, 16, 50)
SCORES = {"frechet": "Fréchet", "precision": "precision", "recall": "recall",
          "class_accuracy": "accuracy"}  # of rows, with the heads of their columns
SAME = ("data.source", "data.split", "data.image_size", "evaluate.split", "sample.autoencoder")
CONTENT = "frontier.json"
MARKERS = "osD^vPX*<>"  # of models


@dataclasses.dataclass(frozen=True)
class Case:
    """A run whose configuration has the decoder and the number of steps of a row.

    workdir: as it was given. model: the same for all seeds of one model. training_flops: None if
    unknown.
    """

    run: Run
    workdir: str
    model: str
    training_flops: float | None

    @property
    def name(self) -> str:
        sample = self.run.config.sample
        return f"{self.workdir}, {sample.decoder}, {sample.steps} steps"

    def images(self, start: int, batch: int) -> np.ndarray:
        """The samples [batch, H, W, C] from an index on, 0..V-1, on the host."""
        return generate.pictures_at(self.run, np.arange(start, start + batch))


def frontier(workdirs: Sequence[str], runs: int, num: int | None = None, batch: int | None = None,
             only: str = "") -> dict:
    """The content of frontier.json: how rows were measured, and `rows`; see the module.

    workdirs: runs, WORKDIR/checkpoints/STEP or exports. runs: rounds, in each of which every row is
    timed once; its rate is their median. num: samples of a row that are scored, the first run's
    config.evaluate.num_samples by default. batch: images sampled at a time, the first run's
    config.sample.num by default. only: selects the rows whose name contains this.

    A row has model (its runs' folders), seeds, decoder, steps, guidance, training_flops (of one
    seed; None if unknown), images_per_second, `timed` (images/s of every run in every round), and
    for each of SCORES mean, stderr over samples and, of several seeds, seed_stderr over seeds.

    Raises UserError where the runs do not compare.
    """
    asked = call(workdirs, runs, num, batch, only)
    require_same_everywhere(asked)
    loaded = [load_run(workdir) for workdir in workdirs]
    first = loaded[0].config
    _check_comparable(loaded)
    num = first.evaluate.num_samples if num is None else num
    if not num:
        raise UserError(f"{workdirs[0]} has config.evaluate.num_samples = 0: give --num, the "
                        "number of samples of a row")
    batch = min(batch or max(first.sample.num, 1), num)
    cases = [case for workdir, run in zip(workdirs, loaded, strict=True)
             for case in _cases(workdir, run) if only in case.name]
    if not cases:
        raise UserError(f"--rows={only} is in no row's name: leave it out to see them all")
    _check_seeds(cases)
    train, held_out = map(first.data.open, (first.data.split, first.evaluate.split))
    features = first.evaluate.features
    if features == "none":
        features = "cnn" if train.num_classes and train.pixel_levels else "pixels"
    settings = first.with_evaluation(num_samples=num, features=features).evaluate
    comparison = image_scores.Comparison(loaded[0], settings, train, held_out)
    right = image_scores.classifier(loaded[0], train)
    scores = []
    for number, case in enumerate(cases, 1):
        scores.append(_scores(case, comparison, right, num, batch))
        _report(f"{number}/{len(cases)} scored: {case.name}: Fréchet distance "
                f"{scores[-1]['frechet']['mean']:.4g}")
    rows = collections.defaultdict(list)
    for case, score, rates in zip(cases, scores, _timed(cases, batch, runs), strict=True):
        sample = case.run.config.sample
        rows[case.model, sample.decoder, sample.steps].append((case, score, rates))
    return {"call": asked, "num": num, "batch": batch, "rounds": runs,
            "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "jax": jax.__version__, "features": comparison.described(),
            "rows": [_row(*zip(*found, strict=True)) for found in rows.values()]}


def call(workdirs: Sequence[str], runs: int, num: int | None, batch: int | None,
         only: str) -> dict:
    """The flags of a frontier, which may replace the files of the same call only."""
    return {"--frontier": list(workdirs), "--runs": runs, "--num": num, "--batch": batch,
            "--rows": only}


def _report(line: str) -> None:
    if jax.process_index() == 0:
        print(line, file=sys.stderr, flush=True)


def _check_comparable(runs: list[Run]) -> None:
    """Raises UserError where runs have no images, or are not of one data set."""
    first = runs[0]
    if not generate.picture_levels(first):
        raise UserError(f"{first.workdir} has no images to score: expected runs of pixels, or of "
                        "latents with config.sample.autoencoder")
    for other in runs[1:]:
        pairs = [(f"config.{key}", *(_setting(run.config, key) for run in (first, other)))
                 for key in SAME]
        if first.spec.version and other.spec.version:  # of earlier versions it is not known
            pairs += [("data of version", first.spec.version, other.spec.version)]
        found = next((pair for pair in pairs if pair[1] != pair[2]), different_data(first, other))
        if found:
            raise UserError(f"--frontier compares runs of one data set, and {other.workdir} has "
                            f"{found[0]} {found[2]}, where {first.workdir} has {found[1]}: give "
                            "runs of the same data")


def _setting(config: Config, key: str):
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def _check_seeds(cases: list[Case]) -> None:
    """Raises UserError where two folders hold the same seed of one model."""
    seen: dict = {}
    for case in cases:
        run, sample = case.run, case.run.config.sample
        key = case.model, run.config.seed, sample.decoder, sample.steps
        if key in seen:
            raise UserError(f"{seen[key]} and {case.workdir} hold one model with one seed, "
                            f"{run.config.seed}: give each run once")
        seen[key] = case.workdir


def _cases(workdir: str, run: Run) -> list[Case]:
    """The cases of a run, by the kind of its model; see the module."""
    config = run.config
    solvers = [name for name in decoders.DECODERS.names if decoders.find(name).solves_ode]
    own, steps = config.sample.decoder, config.trajectory.steps
    without = config.with_sampling(decoder=AUTO).without_auto().sample.decoder
    names = [*dict.fromkeys([own, without, "score", *["denoiser"] * bool(run.denoiser)])]
    if own in solvers or objectives.find(config.train.objective).trains == "velocity":
        names, steps = solvers, ODE_STEPS
    made_from = {needed: history(workdir, needed and bool(run.denoiser))
                 for needed in (False, True)}
    model = files.digest([settings for settings, _ in made_from[True]])
    found = []
    for count, name in itertools.product(steps, names):
        sample = generate.override(config, decoder=name, steps=count)
        costs = [cost for _, cost in made_from[decoders.find(name).needs_denoiser]]
        found.append(Case(
            dataclasses.replace(run, config=dataclasses.replace(config, sample=sample)),
            workdir, model, _total(costs)))
    return found


def _total(costs: Sequence[float | None]) -> float | None:
    known = [cost for cost in costs if cost is not None]
    return sum(known) if len(known) == len(costs) else None


def history(workdir: str, denoiser: bool = True) -> list[tuple[dict, float | None]]:
    """(settings without the seed, FLOPs of training) of a run and all runs that it was made from.

    They are a denoiser's teacher, which alone is listed where denoiser is False, and the run that
    init_from names. FLOPs are None for what is no run's folder, such as an export.
    """
    unknown: list = [({"address": workdir}, None)]
    if hub.is_address(workdir):
        return unknown
    folder, step = checkpoint.locate(files.expanded(workdir))
    if is_export(folder) or not (folder / config_file.CONFIG).exists():
        return unknown
    config, _ = config_file.load(str(folder))
    if denoiser and config.train.distil_steps:
        return history(f"{folder}/{DENOISER}")
    teacher = str(folder.parent) if config.teacher == ABOVE else config.teacher
    if teacher and not denoiser:
        return history(teacher, False)
    settings = config.raw | {"seed": 0, "init_from": "", "teacher": "", "step": step}
    found: list = [(settings, training_flops(str(folder), config.data.batch_size, step))]
    if teacher:
        found += history(teacher, False)
    if config.init_from:
        found += history(config.init_from, bool(teacher))
    return found


def training_flops(workdir: str, batch_size: int, step: int | None = None) -> float | None:
    """The model's FLOPs in a run's steps, up to `step` or the last, by its metrics.jsonl.

    They are those that training counts of a step; see training.resources.flops_of_step. Held-out
    evaluations, rollouts of post-training and the fit of p(x | x_0) are left out. None where the
    run did not log them.
    """
    last = checkpoint.latest_step(workdir) if step is None else step
    total, done, of_step = 0.0, 0, None
    for line in files.read_lines(epath.Path(workdir) / METRICS):
        rate, speed = line.get("flops_per_second"), line.get("examples_per_second")
        if not rate or not speed:
            continue
        of_step = rate * batch_size / speed
        end = min(line["step"], last or line["step"])
        total, done = total + of_step * max(end - done, 0), max(end, done)
    if of_step is None:
        return None
    return total + of_step * max((last or done) - done, 0)


def _scores(case: Case, comparison: image_scores.Comparison, right, num: int, batch: int) -> dict:
    """{name of SCORES: {"mean", "stderr"}} of `num` samples."""
    made, hits = FeatureStatistics(num), []
    for start in range(0, num, batch):
        images = case.images(start, batch)[: num - start]
        made.add(comparison.extractor(images))
        if right:
            hits.append(right(images, start))
    real = comparison.real
    found = {"frechet": frechet(real, made)}
    if len(real.kept):
        pair = precision_recall(real.kept, made.kept)
        found |= zip(("precision", "recall"), pair, strict=True)
    return found | ({"class_accuracy": mean_and_stderr(np.concatenate(hits))} if right else {})


def _timed(cases: list[Case], batch: int, runs: int) -> list[list[float]]:
    """Images/s of each case in each round; a round times all cases in turn."""
    calls, rates = [], [[] for _ in cases]
    for case in cases:  # compiled by the scores
        needed = math.ceil(benchmark.SECONDS / flops.seconds(lambda c=case: c.images(0, batch), 1))
        # Process 0 decides, as each call is one of all processes.
        calls.append(int(multihost_utils.broadcast_one_to_all(needed)))
    for number in range(1, runs + 1):
        for case, count, found in zip(cases, calls, rates, strict=True):
            seconds = flops.seconds(lambda c=case: c.images(0, batch), count)
            found.append(count * batch / seconds)
        _report(f"round {number}/{runs} timed")
    return rates


def _row(cases: Sequence[Case], scores: Sequence[dict], timed: Sequence[list[float]]) -> dict:
    """The row of a model's runs, one for each seed; see frontier."""
    sample, total = cases[0].run.config.sample, _total([case.training_flops for case in cases])
    row = {"model": [case.workdir for case in cases],
           "seeds": [case.run.config.seed for case in cases],
           "decoder": sample.decoder, "steps": sample.steps, "guidance": sample.guidance,
           "training_flops": None if total is None else total / len(cases),
           "images_per_second": statistics.median(rate for rates in timed for rate in rates),
           "timed": list(timed)}
    for name in scores[0]:
        over_seeds = mean_and_stderr([found[name]["mean"] for found in scores])
        over_samples = math.hypot(*(found[name]["stderr"] for found in scores)) / len(scores)
        row[name] = {"mean": over_seeds["mean"], "stderr": over_samples}
        if len(scores) > 1:
            row[name]["seed_stderr"] = over_seeds["stderr"]
    return row


def table(result: dict) -> str:
    """The rows as a Markdown table, below a line on how they were measured."""
    rows, features = result["rows"], result["features"]
    columns = {name: head for name, head in SCORES.items() if name in rows[0]}
    head = ("model", "decoder", "steps", "images/s", *columns.values(), "training FLOPs")
    cells = [head, ("---", "---", *["---:"] * (len(head) - 2))]
    for row in rows:
        cost = row["training_flops"]
        cells.append((_name(row), row["decoder"], str(row["steps"]),
                      f"{row['images_per_second']:,.4g}", *(_figure(row[name]) for name in columns),
                      "unknown" if cost is None else f"{cost:.3g}"))
    about = (
        f"{result['device']}, jax {result['jax']}; images/s: median of {result['rounds']} rounds "
        f"over all rows, {result['batch']} images at a time; {result['num']:,} samples a row; "
        f"{features['name']} features{', a proxy' * features['proxy']}; ±: standard error over "
        "samples (of recall: over real images)")
    if any(len(row["seeds"]) > 1 for row in rows):
        about += ", then over seeds"
    return "\n".join([about, "", *(f"| {' | '.join(line)} |" for line in cells)])


def _name(row: dict) -> str:
    return ", ".join(row["model"])


def _figure(found: dict) -> str:
    errors = [found[key] for key in ("stderr", "seed_stderr") if key in found]
    return " ± ".join([f"{found['mean']:.4g}", *(f"{error:.2g}" for error in errors)])


def check_out(out: str, asked: dict) -> None:
    """Raises UserError where the folder holds the frontier of another call."""
    path = epath.Path(files.expanded(out)) / CONTENT
    there = files.read_json(path, "remove it").get("call") if path.exists() else asked
    if there != files.to_json(asked):
        raise UserError(f"{out} holds the frontier of another call: give another --out (nothing "
                        "was overwritten)")


def write(result: dict, out: str) -> None:
    """Writes frontier.png, frontier.md and, last, frontier.json in a folder, in process 0.

    Raises UserError like check_out.
    """
    if jax.process_index():
        return
    check_out(out, result["call"])
    folder = epath.Path(files.expanded(out))
    folder.mkdir(parents=True, exist_ok=True)
    chart(result, folder / "frontier.png")
    files.write(folder / "frontier.md", table(result) + "\n")
    # JSON lacks numbers that are not finite: null takes their place.
    finite = json.loads(json.dumps(result), parse_constant=lambda _: None)
    files.write_json(folder / CONTENT, finite)


def chart(result: dict, out_png) -> None:
    """Draws images/s against the Frechet distance: a marker a model, a line a decoder.

    Bars are standard errors over samples, or over seeds where there are several. Points that are
    not finite are left out.
    """
    lines = collections.defaultdict(list)
    for row in result["rows"]:
        score = row["frechet"]
        point = (row["images_per_second"], score["mean"],
                 score.get("seed_stderr", score["stderr"]), row["steps"])
        if all(map(math.isfinite, point)):
            lines[_name(row), row["decoder"]].append(point)
    plot, ((axes,),) = plots.figure(8, 5)
    models = list(dict.fromkeys(model for model, _ in lines))
    labels, fonts = plots.drawable([", ".join(key) for key in lines])
    for (model, _), label, points in zip(lines, labels, lines.values(), strict=True):
        rate, score, error, steps = zip(*points, strict=True)
        axes.errorbar(rate, score, error, marker=MARKERS[models.index(model) % len(MARKERS)],
                      markersize=5, linewidth=0.8, capsize=2, label=label)
        for x, y, text in zip(rate, score, steps, strict=True):
            axes.annotate(str(text), (x, y), (4, 4), textcoords="offset points", fontsize=7)
    axes.set(xscale="log", xlabel="images/s", title="numbers beside points: steps",
             ylabel=f"Fréchet distance of {result['features']['name']} features")
    if lines:
        axes.legend(prop={"family": fonts, "size": 7})
    plots.save_figure(plot, out_png)
