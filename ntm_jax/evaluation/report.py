"""evaluation.json: its figures, computed from scores, and the table that shows them."""

import datetime
import importlib.metadata
import itertools
import json
import math
import pathlib
import subprocess
from collections.abc import Iterator

import jax
import numpy as np
from etils import epath

from ntm_jax import files
from ntm_jax.data.pipeline import DataSpec
from ntm_jax.data.sources import Source
from ntm_jax.errors import UserError
from ntm_jax.evaluation import importance
from ntm_jax.evaluation.statistics import mean_and_stderr
from ntm_jax.registry import load
from ntm_jax.runtime import checksums
from ntm_jax.runtime.plots import figure, save_figure
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
    command = ["git", "-C", str(root), "describe", "--always", "--exclude=*", "--abbrev=40",
               "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:  # there is no git
        return ""


LOWER = (  # figures of evaluation.json
    "bits_per_dim", "nats_per_dim", "clean_nats_per_dim", "trajectory_nll", "velocity_error",
    "frechet", "kid", "denoising", "denoiser")
HIGHER = ("effective_sample_size", "clean_effective_sample_size", "class_accuracy", "precision",
          "recall", "retrieval", "tasks", "reward", "reward_before")


def directions(result: dict) -> dict:
    """{figure of evaluation.json: "lower is better" or "higher is better"}."""
    return {name: f"{'lower' if name in LOWER else 'higher'} is better"
            for name in LOWER + HIGHER if name in result}


NAMES = {"bits_per_dim": "bits/dim", "nats_per_dim": "nats/dim"}
# Pictures of figures: functions of a run, its evaluation.json and a folder.
PICTURES = {"truth": "ntm_jax.projects.densities.known_density:picture"}
HIDDEN = {"mean", "stderr", "noise_stderr", "stderr_by_level", "provenance"}  # of the table
MUCH_RECONSTRUCTION = 0.5  # share of the bound from which a line points it out
HIGH_T_MIN = 0.1  # below it the line would cost samples in few steps more than it gains
FEW_SAMPLES = 1000  # for a Fréchet distance


def check_unit(unit: str, run: Run) -> None:
    """Raises UserError for bits per dimension of continuous latents."""
    if unit == "bits_per_dim" and not run.spec.pixel_levels:
        raise UserError(f"bits/dim are of discrete pixels, and {run.config.data.source} is "
                        "continuous: take nats/dim, a bound on the density of the data noised to "
                        f"t_0 = {run.config.trajectory.t_min}, comparable at equal t_0 and scale")


def table(result: dict, unit: str) -> str:
    """All figures of evaluation.json under their keys, likelihoods in one of its units."""
    rows = list(_rows(result, "", HIDDEN | NAMES.keys() - {unit}))
    width = max(len(name) for name, _ in rows)
    compared = [f"  samples are compared by {found['name']} features{', a proxy' * found['proxy']}"
                for found in [result.get("features")] if found]
    return "\n".join([
        f"{result['split']} split, {result['count']} records, step {result['step']}", *compared,
        *(f"  {name:<{width}}  {shown}" for name, shown in rows)])


def _rows(part, name: str, hidden) -> Iterator[tuple[str, str]]:
    """(keys joined by dots, numbers) of each figure in a part of evaluation.json."""
    if isinstance(part, dict):
        if "mean" in part:
            pairs = np.transpose([part["mean"], part["stderr"]]).reshape(-1, 2)
            yield name, "  ".join(f"{mean:8.4f} ± {stderr:.4f}" for mean, stderr in pairs)
        for key in part:
            if f"{key}_stderr" in part:
                yield from _rows({"mean": part[key], "stderr": part[f"{key}_stderr"]},
                                 f"{name}.{key}".lstrip("."), hidden)
            elif key not in hidden and not key.endswith("_stderr"):
                yield from _rows(part[key], f"{name}.{key}".lstrip("."), hidden)
    elif isinstance(part, list | tuple) and part and isinstance(part[0], dict):
        for number, each in enumerate(part):
            yield from _rows(each, f"{name}[{number}]", hidden)
    elif isinstance(part, list | tuple | float):
        numbers = [number for number in np.ravel(part) if isinstance(number, float)]
        if numbers:
            yield name, "  ".join(f"{number:8.4f}" for number in numbers)


def summary(result: dict, path) -> str:
    """The main figures of an evaluation in a few lines, and the path of its file, for a run's end.
    """
    unit = next(name for name in NAMES if name in result)
    figures = result.get("clean_nats_per_dim", result[unit])  # of arrays, as run.log_prob
    rows = [(f"{NAMES[unit]}, an upper bound (lower is better)", figures["bound"])]
    trajectories = figures["importance_weighted"]["trajectories"]
    if trajectories > 1:
        rows.append((f"{NAMES[unit]}, importance-weighted over {trajectories} trajectories",
                     figures["importance_weighted"]))
    rows += [(key.replace("_", " "), result[key]) for key in result.get("measures", ())]
    shares = {}
    if "class_accuracy" in result:
        accuracy = result["class_accuracy"]
        shares[f"samples recognised as their class, %, of {accuracy['images']:,}"] = accuracy
    if "tasks" in result:
        shares["samples that show what was asked, %"] = result["tasks"]["overall"]
    rows += [(name, {key: 100 * share[key] for key in ("mean", "stderr")})
             for name, share in shares.items()]
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
    binned = result["provenance"]["config"]["model"]["pixel_likelihood"] == "binned"
    if binned and share > MUCH_RECONSTRUCTION and t_min > HIGH_T_MIN:
        lines.append(
            f"{100 * share:.0f}% of the bound is reconstruction, the cost of pixel values that the "
            f"noise of t_min = {t_min} hides: --pixel_likelihood=network names them in fewer bits, "
            "and in a new run config.model.pixel_likelihood, or a lower config.trajectory.t_min "
            "and t_min_range, of which 0.04 to 0.07 suit most images")
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
    scores of each record in nats (.parquet); and the PICTURES of figures.
    """
    path = epath.Path(path)
    for name, place in PICTURES.items():
        if name in result:
            load(place)(run, result, path.parent)
    if jax.process_index():
        return
    # JSON lacks numbers that are not finite: null takes their place.
    files.write_json(path, json.loads(json.dumps(result), parse_constant=lambda _: None))
    levels_plot(result, path.with_suffix(".png"))
    if per_example:
        assert scored is not None, "per_example writes the scores of every record: give them"
        write_scores(scored, path.with_suffix(".parquet"))
    shown = unit or next(name for name in NAMES if name in result)
    print(summary(result, path) if brief else table(result, shown), flush=True)
    for line in advice(result):
        print(f"note: {line}", flush=True)


def levels_plot(result: dict, out_png) -> None:
    """Draws the NLL and the bound's contributions by noise level, in nats per dimension.

    result: an evaluation.json. A transition's rate is its share of the bound: the sum of the
    predictor's, the transporter's log-det's and the forward process's contributions.
    """
    nll, terms, rate = result["trajectory_nll"], result["contributions"], result["rate_by_level"]
    plot, axes = figure(11, 4, 1, 2)
    left, right = axes[0]
    names = [f"{s:.2g} from {t:.2g}" for s, t in itertools.pairwise(result["provenance"]["levels"])]
    left.bar(names, nll["by_level"], yerr=nll["stderr_by_level"], color="tab:blue")
    left.set(title="trajectory NLL by transition of the noise level t", ylabel="nats per dimension")
    parts = {name: np.negative(terms[name][: len(rate)])
             for name in ("predictor", "log_det", "forward")}
    for i, (name, values) in enumerate(parts.items()):
        right.bar(np.arange(len(rate)) + (i - 1) * 0.25, values, 0.25, label=name.replace("_", "-"),
                  alpha=0.6)
    right.plot(np.arange(len(rate)), rate, "ko-", label="rate: their sum")
    right.set_xticks(np.arange(len(rate)), names)
    right.set(title="contributions to the bound on -log p", ylabel="nats per dimension")
    right.axhline(0, color="black", linewidth=0.5)
    plot.legend(loc="outside lower right", ncols=5)
    save_figure(plot, out_png)


def write_scores(scored: dict, path) -> None:
    """Writes scores as parquet, a row for each record; scores by level have a column a level."""
    import pyarrow
    import pyarrow.parquet

    columns = {"index": scored["index"]}
    for name, values in scored.items():
        if name == "weighted":
            continue
        columns |= {name: values} if values.ndim == 1 else {
            f"{name}_{k}": level for k, level in enumerate(values.T)}
    with files.atomic_writer(path) as file:
        pyarrow.parquet.write_table(pyarrow.table(columns), file)
