"""evaluation.json: its figures, computed from scores, and the tables and plots that show them."""

import datetime
import importlib.metadata
import json
import math
import pathlib
import subprocess

import jax
import numpy as np
from etils import epath

from ntm_jax import files
from ntm_jax.data.pipeline import DataSpec
from ntm_jax.data.sources import Source
from ntm_jax.errors import UserError
from ntm_jax.evaluation import image_scores, importance, plots
from ntm_jax.evaluation.scoring import BOUNDS
from ntm_jax.evaluation.statistics import mean_and_stderr
from ntm_jax.runtime import checksums
from ntm_jax.runtime.run import Run

CONTRIBUTIONS = ("prior", "predictor", "log_det", "forward", "reconstruction")


def units(pixel_levels: int) -> dict:
    """{unit of evaluation.json: its size in nats}, the printed one first; bits of pixels only."""
    return ({"bits_per_dim": math.log(2)} if pixel_levels else {}) | {"nats_per_dim": 1.0}


def summarize(table: dict, spec: DataSpec, trajectories: int) -> dict:
    """evaluation.json's likelihood figures from the scores of all records.

    Bounds are upper bounds on -log p: lower is better. `stderr` is over records, their noise
    included. `noise_stderr` is the part of it that other trajectories of the same records would
    change; it is 0 with one trajectory, where it cannot be estimated.
    """
    dimensions = spec.tokens * spec.dim
    counts = importance.reported_counts(trajectories)
    result: dict = {"count": len(table["index"])}
    for unit, size in units(spec.pixel_levels).items():
        scale = 1 / (dimensions * size)
        weighted = mean_and_stderr(-scale * table["importance_weighted"],
                                   scale**2 * table["weighted_variance"])
        by_trajectories = {str(k): mean_and_stderr(-scale * values)
                           for k, values in zip(counts, table["weighted"].T, strict=True)}
        result[unit] = {
            "bound": mean_and_stderr(-scale * table["bound"], scale**2 * table["bound_variance"]),
            "importance_weighted": weighted | {"trajectories": trajectories,
                                               "by_trajectories": by_trajectories}}
    nll = table["nll"] / dimensions
    result["trajectory_nll"] = mean_and_stderr(nll.mean(1)) | {
        "by_level": nll.mean(0, dtype=np.float64).tolist(),
        "stderr_by_level": [mean_and_stderr(v)["stderr"] for v in nll.T]}
    terms = {name: table[name].mean(0, dtype=np.float64) / dimensions
             for name in CONTRIBUTIONS if name in table}
    rate = -terms["predictor"] - terms["log_det"] - terms["forward"][:-1]
    result["contributions"] = {name: value.tolist() for name, value in terms.items()}
    result["rate_by_level"] = rate.tolist()
    result["effective_sample_size"] = mean_and_stderr(table["effective_sample_size"])
    return result


def clean_figures(table: dict, spec: DataSpec, trajectories: int) -> dict:
    """The bounds on the density of an array itself, from scores with `decoded`, and not at t_0."""
    found = summarize(table, spec, trajectories)
    return {"clean_nats_per_dim": found["nats_per_dim"],
            "clean_effective_sample_size": found["effective_sample_size"]}


def provenance(run: Run, source: Source) -> dict:
    """What the figures rest on: data and preparation, levels, checkpoint, settings, packages."""
    config, spec = run.config, run.spec
    packages = ("ntm_jax", "jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {
        "source": source.name, "version": source.version, "split": source.split,
        "pixel_levels": source.pixel_levels,
        "preprocessing": {
            "image_shape": list(spec.image_shape), "image_size": config.data.image_size,
            "patch_size": spec.patch_size,
            "scale": "2 v / (pixel_levels - 1) - 1" if source.pixel_levels else "as stored"},
        "t_min": config.trajectory.t_min, "levels": run.evaluated_levels().tolist(),
        "parameters": "raw" if run.raw else "ema", "checksum": checksums.digest(run.params),
        "config": config.raw,
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "devices": jax.device_count(), "processes": jax.process_count(),
        "commit": _commit(), "date": datetime.datetime.now(datetime.UTC).isoformat("T", "seconds")}


def _commit() -> str:
    """The git commit of this package's checkout, with "+" where files differ; "" without one."""
    root = pathlib.Path(__file__).parents[2]
    if not (root / ".git").exists():
        return ""
    commands = (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
    try:
        commit, changed = (subprocess.run(
            ["git", "-C", str(root), *command], capture_output=True, text=True, timeout=10,
            check=True).stdout.strip() for command in commands)
    except (OSError, subprocess.SubprocessError):
        return ""
    return commit + ("+" if changed else "")


LOWER = (  # figures of evaluation.json
    "bits_per_dim", "nats_per_dim", "clean_nats_per_dim", "trajectory_nll", "velocity_error",
    "frechet", "denoising", "denoiser")
HIGHER = ("effective_sample_size", "clean_effective_sample_size", "class_accuracy", "precision",
          "recall", "retrieval", "tasks", "reward", "reward_before")


def directions(result: dict) -> dict:
    """{figure of evaluation.json: "lower is better" or "higher is better"}."""
    return {name: f"{word} is better" for word, names in (("lower", LOWER), ("higher", HIGHER))
            for name in names if name in result}


NAMES = {"bits_per_dim": "bits/dim", "nats_per_dim": "nats/dim"}
MUCH_RECONSTRUCTION = 0.5  # share of the bound from which a line points it out
CLASSES_SHOWN = 10  # in the table; evaluation.json has all
FEW_SAMPLES = 1000  # for a Fréchet distance
FEATURE_SCORES = ("frechet", "frechet_held_out", "precision", "recall")
MEASURES = {  # figures of objectives
    "velocity_error": "mean squared error of the velocity",
    "reward": "reward of samples of held-out conditions",
    "reward_before": "reward before post-training",
    "diversity": "mean distance of samples of one condition",
    "diversity_before": "mean distance before post-training",
    "kl": "divergence from the model before, nats a trajectory"}
DENOISED = {"as_it_is": "squared error by level, x_k / (1 - t_k)",
            "own_score": "squared error by level, its own score",
            "trajectory_score": "squared error by level, trajectory score"}


def check_unit(unit: str, run: Run) -> None:
    """Raises UserError for bits per dimension of continuous latents."""
    if unit == "bits_per_dim" and not run.spec.pixel_levels:
        raise UserError(f"bits/dim are of discrete pixels, and {run.config.data.source} is "
                        "continuous: take nats/dim, a bound on the density of the data noised to "
                        f"t_0 = {run.config.trajectory.t_min}, comparable at equal t_0 and scale")


def _bound_rows(figures: dict, name: str, noised: str = "") -> list[tuple]:
    rows = [(f"bound{noised}, {name}", figures["bound"])]
    rows += [(f"importance-weighted bound{noised} ({k} trajectories), {name}", value)
             for k, value in figures["importance_weighted"]["by_trajectories"].items()]
    return rows


def _likelihood_rows(result: dict, unit: str) -> list[tuple]:
    name, noised, rows = NAMES[unit], "", []
    if "clean_nats_per_dim" in result:
        noised, rows = " at t_0", _bound_rows(result["clean_nats_per_dim"], name)
    rows += _bound_rows(result[unit], name, noised)
    rows.append(("effective sample size", result["effective_sample_size"]))
    rows.append(("trajectory NLL, nats/dim", result["trajectory_nll"]))
    if "truth" in result:
        truth = result["truth"]
        rows.append(("true mean log-density of the data noised to t_0, nats", truth["log_density"]))
        rows += [(f"{kind} less the true log-density, nats", truth[key])
                 for key, kind in BOUNDS.items()]
    rows += [(f"mean squared error, {key.replace('_', ' ')}", value)
             for key, value in result.get("denoiser", {}).items()]
    rows += [(MEASURES.get(key, key.replace("_", " ")), result[key])
             for key in result.get("measures", ())]
    if "against" in result:
        other = f"{result['against']['workdir']} at step {result['against']['step']}"
        rows += [(f"{kind}{noised} less that of {other}, {name}", result["against"][unit][key])
                 for key, kind in BOUNDS.items()]
    return rows


def _percent(figure: dict) -> dict:
    return {key: 100 * figure[key] for key in ("mean", "stderr")}


def _sample_rows(result: dict) -> list[tuple]:
    rows = []
    if "class_accuracy" in result:
        accuracy = result["class_accuracy"]
        rows.append((f"class accuracy of {accuracy['images']} samples, %", _percent(accuracy)))
        by_class = list(accuracy.get("by_class", {}).items())
        rows += [(f"class accuracy of {name}, %", 100 * share)
                 for name, share in by_class[:CLASSES_SHOWN]]
    guided = result.get("guidance", ())
    for number, score in enumerate(guided if "class_accuracy" in result else ()):
        rows.append((f"class accuracy of guidance {score['guidance']}, %", _percent(score)))
        if number:
            first = f"less that of guidance {guided[0]['guidance']}"
            rows.append((f"class accuracy of guidance {score['guidance']} {first}, %",
                         _percent(score["difference"])))
    if "features" in result:
        features = result["features"]
        kind = f"{features['name']} features" + (", a proxy" if features["proxy"] else "")
        rows += [(f"{key.replace('_', ' ')} ({kind})", result[key]) for key in FEATURE_SCORES]
        rows += [(f"{key} ({kind}) of guidance {score['guidance']}", score[key])
                 for key in FEATURE_SCORES for score in guided if key in score]
    for k in image_scores.RANKS if "retrieval" in result else ():
        found = result["retrieval"]
        chance = 100 * found["chance"][f"rank_{k}"]
        rows.append((f"own picture among the {k} nearest of {found['candidates']} (a proxy; chance "
                     f"{chance:.2g}), %", _percent(found[f"rank_{k}"])))
    return rows


def table(result: dict, unit: str) -> str:
    """The figures of evaluation.json as a table, likelihoods in one of its units."""
    rows = _likelihood_rows(result, unit) + _sample_rows(result)
    width = max(len(name) for name, _ in rows)
    lines = [f"{result['split']} split, {result['count']} records, step {result['step']}"]
    scored = [result[key] for key in ("class_accuracy", "tasks", "features") if key in result]
    made = scored[0] if scored else {}
    if "candidates" in made:
        judge = made["judge"]
        kept = "best" if made["enough"] is None else f"first with {made['enough']:g} nats, or best,"
        lines.append(f"  samples: the {kept} of {made['candidates']} candidates by the likelihood "
                     f"of {judge['workdir']}, step {judge['step']}")
    for name, value in rows:
        value = value if isinstance(value, dict) else {"mean": value}
        error = f" ± {value['stderr']:.4f}" if "stderr" in value else ""
        lines.append(f"  {name:<{width}}  {value['mean']:8.4f}{error}")
    by_level = (("NLL", result["trajectory_nll"]["by_level"]), ("rate", result["rate_by_level"]))
    for label, values in by_level:
        name = f"{label} by level, clean to noisy, nats/dim"
        lines.append(f"  {name:<{width}}  " + "  ".join(f"{v:.4f}" for v in values))
    for name, errors in result.get("denoising", {}).items():
        by_level = zip(errors["mean"], errors["stderr"], strict=True)
        cells = (f"{mean:.5f} ± {stderr:.5f}" for mean, stderr in by_level)
        lines.append(f"  {DENOISED[name]:<{width}}  " + "  ".join(cells))
    lines.append("  better if lower: bounds, NLL, errors, distances; if higher: effective sample "
                 "size, accuracy, precision, recall")
    return "\n".join(lines)


def summary(result: dict, path) -> str:
    """The main figures of an evaluation in a few lines, and the path of its file, for a run's end.
    """
    unit = next(name for name in NAMES if name in result)
    figures = result.get("clean_nats_per_dim", result[unit])  # of arrays, as run.log_prob
    rows: list[tuple] = [(f"{NAMES[unit]}, an upper bound (lower is better)", figures["bound"])]
    trajectories = figures["importance_weighted"]["trajectories"]
    if trajectories > 1:
        rows.append((f"{NAMES[unit]}, importance-weighted over {trajectories} trajectories",
                     figures["importance_weighted"]))
    rows += [(MEASURES.get(key, key.replace("_", " ")), result[key])
             for key in result.get("measures", ())]
    if "class_accuracy" in result:
        accuracy = result["class_accuracy"]
        rows.append((f"samples recognised as their class, %, of {accuracy['images']:,}",
                     _percent(accuracy)))
    if "tasks" in result:
        tasks_shown = result["tasks"].get("by_guidance", [result["tasks"]])[0]
        rows.append(("samples that show what was asked, %", _percent(tasks_shown["overall"])))
    width = max(len(name) for name, _ in rows)
    lines = [f"step {result['step']}, {result['count']:,} held-out records ({result['split']}):"]
    lines += [f"  {name:<{width}}  {figure['mean']:8.3f} ± {figure['stderr']:.3f}"
              for name, figure in rows]
    return "\n".join([*lines, f"all figures: {path}"])


def advice(result: dict) -> list[str]:
    """Lines on figures that mislead, with what to change; see also contributions in result."""
    lines = []
    nats, t_min = result["nats_per_dim"]["bound"]["mean"], result["provenance"]["t_min"]
    if not math.isfinite(nats):
        lines.append("the likelihood of some records is not a finite number, and figures of it are "
                     "null in the file: --per_example writes that of every record")
    share = -result["contributions"].get("reconstruction", 0.0) / max(nats, 1e-9)
    if share > MUCH_RECONSTRUCTION:
        lines.append(
            f"{100 * share:.0f}% of the bound is reconstruction, the cost of pixel values that the "
            f"noise of t_min = {t_min} hides, whatever the model learns: lower "
            "config.trajectory.t_min and t_min_range in a new run for a better bound; samples as "
            "good then need more steps")
    if "frechet" in result and result["features"]["images"] < FEW_SAMPLES:
        lines.append(
            f"the Fréchet distance is of {result['features']['images']} samples, and few make it "
            f"large: give --images={FEW_SAMPLES} or more, or compare equal numbers only")
    return lines


def write_report(run: Run, result: dict, scored: dict | None, path, per_example: bool = False,
                 unit: str | None = None, brief: bool = False) -> None:
    """Prints the figures, and writes, in the first process, `path` (JSON) and files beside it.

    brief: prints the summary instead of the table. scored: the scores of every record, which only
    per_example needs. The files are a picture of what each level costs (.png); with per_example the
    scores of each record in nats (.parquet); for planar data of known density densities.png; and in
    a comparison with another run losses.png.
    """
    path = epath.Path(path)
    if "truth" in result:
        source = run.config.data.open(result["split"])
        if source.planar_extent:
            from ntm_jax.evaluation import known_density

            known_density.picture(run, source, path.with_name("densities.png"))
    if jax.process_index():
        return
    files.write_json(path, _with_nulls(result))
    plots.levels_plot(result, path.with_suffix(".png"))
    if "against" in result:
        runs = (run.workdir, result["against"]["workdir"])
        metrics = {str(folder): epath.Path(folder) / "metrics.jsonl" for folder in runs}
        plots.losses_plot(metrics, path.with_name("losses.png"))
    if per_example:
        assert scored is not None, "per_example writes the scores of every record: give them"
        write_scores(scored, path.with_suffix(".parquet"))
    shown = unit or next(name for name in NAMES if name in result)
    print(summary(result, path) if brief else table(result, shown), flush=True)
    for line in advice(result):
        print(f"note: {line}", flush=True)
    if "tasks" in result and not brief:
        from ntm_jax.evaluation import tasks

        print(tasks.table(result["tasks"]), flush=True)


def _with_nulls(result: dict) -> dict:
    """The result with null in place of numbers that are not finite, which JSON lacks."""
    return json.loads(json.dumps(result), parse_constant=lambda _: None)


def write_scores(scored: dict, path) -> None:
    """Writes scores as parquet, a row for each record; scores by level have a column a level."""
    import pyarrow
    import pyarrow.parquet

    columns = {"index": scored["index"]}
    for name, values in scored.items():
        if name == "weighted":
            continue
        by_level = {f"{name}_{k}": v for k, v in enumerate(values.T)} if values.ndim > 1 else {}
        columns |= by_level or {name: values}
    with files.aside(path) as file:
        pyarrow.parquet.write_table(pyarrow.table(columns), file)
