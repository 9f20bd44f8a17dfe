"""Held-out likelihood with standard errors, comparisons, and scores of samples. Every record counts once and is keyed by its index, so the
same checkpoint gives the same figures twice, in any batch size, on any mesh and any number of processes."""

import functools
import importlib.metadata
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from etils import epath

from ntm_jax import files
from ntm_jax.core import denoising, flow_matching, layers, likelihood, trajectory
from ntm_jax.data import pipeline
from ntm_jax.data.sources import Source
from ntm_jax.errors import UserError
from ntm_jax.runtime import checkpoint, distill, plots, processes, quality, samples, sharding, state, truth
from ntm_jax.runtime.config import Config


def _noised(config: Config, root, x, t_0, index):
    """x_0 of continuous data, [B, N, D]: a part of the data, so drawn once a record, whatever the number of trajectories."""
    return trajectory.start(x, t_0, trajectory.example_noise(state.example_keys(root, "evaluate/x_0", index), x.shape[1:]))


@functools.partial(jax.jit, static_argnames=("config", "model", "levels", "trajectories", "steps"))
def _score(params, root, batch, *, config, model, levels, trajectories, steps):
    """likelihood.weigh of a batch."""
    x, y, index = batch["x"], state.condition(model, batch), batch["index"]
    t = state.levels(config, model, steps, jnp.full(len(x), config.trajectory.t_min))
    keys = state.example_keys(root, "evaluate", index)
    start = None if levels else _noised(config, root, x, t[:, 0], index)

    def draw(number):
        noise = trajectory.example_noise(jax.vmap(jax.random.fold_in, (0, None))(keys, number), (t.shape[1], *x.shape[1:]))
        return trajectory.simulate(x, t, noise) if levels else trajectory.extend(start, t, noise[:, 1:])

    return likelihood.weigh(model, params, draw, x, t, steps, y, levels, trajectories)


def score_batch(config: Config, model, params, batch: dict, mesh, levels: int, trajectories: int, steps: int | None = None,
                seed: int | None = None) -> dict:
    """likelihood.weigh of this process's share of a batch of x, its condition, index and mask, of which the last two are kept: global."""
    steps, seed = config.evaluation_steps if steps is None else steps, config.seed if seed is None else seed
    batch = sharding.to_global(batch, mesh)
    kept = {name: batch.pop(name) for name in ("index", "mask") if name in batch}
    with sharding.use(mesh):
        result = _score(params, jax.random.key(seed), batch | {"index": kept["index"]}, config=config, model=state.exact(model),
                        levels=levels, trajectories=trajectories, steps=steps)
    return result | kept


def scores(config: Config, model, params, source: Source, mesh, trajectories: int, steps: int | None = None, progress: bool = False):
    """Every record's scores, {name: [records, ...]}: see likelihood.weigh; they run the transporter in float32."""
    return every_record(config, source, mesh, lambda part: score_batch(
        config, model, params, part, mesh, source.levels, trajectories, steps), progress)


def every_record(config: Config, source: Source, mesh, score, progress: bool = False) -> dict:
    """{name: [records, ...]} by index of score, from this process's share of a batch to global arrays, index and mask among them.

    A batch that does not fit in memory is taken in parts; UserError where a single record does not.
    """
    shards, (number, count) = sharding.batch_shards(mesh), sharding.share(mesh)
    batch_size = -(-min(config.evaluate.batch_size, len(source.records)) // shards) * shards
    batches = pipeline.evaluation_batches(source, config.data.patch_size, batch_size, number, count)
    least, share = shards // count, batch_size // count  # of this process: a record a shard, and all
    kept, total = [], -(-len(source.records) // batch_size)
    for batch in tqdm.tqdm(batches, "evaluate", total, unit="batch", leave=False, disable=None if progress else True):
        done = 0
        while done < len(batch["x"]):
            part = {name: values[done : done + share] for name, values in batch.items()}
            try:
                kept.append(sharding.to_host(score(part)))
                done += share
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                if share == least:
                    raise UserError(f"one record a device does not fit in its memory: raise config.mesh.fsdp ({error})") from None
                share = share // least // 2 * least
                warnings.warn(f"config.evaluate.batch_size = {batch_size} does not fit in memory: {share * count} at a time", stacklevel=2)
    table = {name: np.concatenate([k[name] for k in kept]) for name in kept[0]}
    table = {name: values[table["mask"] > 0] for name, values in table.items() if name != "mask"}
    order = np.argsort(table["index"])  # a mesh may hold the processes' shares in any order
    return {name: values[order] for name, values in table.items()}


def _by_record(config: Config, source: Source, mesh, compute) -> dict:
    """{name: [records, ...]} by index of compute(root, batch), jitted, on one device or many."""
    def score(part):
        batch = sharding.to_global(part, mesh)
        kept = {"index": batch["index"], "mask": batch.pop("mask")}
        with sharding.use(mesh):
            return kept | compute(jax.random.key(config.seed), batch)

    found = every_record(config, source, mesh, score)
    return {name: values for name, values in found.items() if name != "index"}


def units(levels: int) -> dict:
    """{unit of evaluation.json: its size in nats}, the one to print first: bits only of discrete pixels."""
    return ({"bits_per_dim": math.log(2)} if levels else {}) | {"nats_per_dim": 1.0}


def summarize(table: dict, model, trajectories: int, levels: int) -> dict:
    """evaluation.json's likelihood figures from the records' scores. Bounds are of log p's negative: lower is better.

    stderr is over examples, their noise included; noise_stderr is the noise's part, of the same records with other trajectories (nothing
    is known of it, and 0 is given, with one trajectory).
    """
    dimensions = model.config.tokens * model.config.dim
    weighted = list(zip(likelihood.marks(trajectories), table["weighted"].T, strict=True))
    result = {"count": len(table["index"])}
    for unit, size in units(levels).items():
        scale = 1 / (dimensions * size)
        result[unit] = {
            "bound": quality.mean(-scale * table["bound"], scale**2 * table["bound_variance"]),
            "importance_weighted": quality.mean(-scale * table["importance_weighted"], scale**2 * table["weighted_variance"]) | {
                "trajectories": trajectories, "by_trajectories": {str(k): quality.mean(-scale * values) for k, values in weighted}}}
    nll = table["nll"] / dimensions
    result["trajectory_nll"] = quality.mean(nll.mean(1)) | {
        "by_level": nll.mean(0, dtype=np.float64).tolist(), "stderr_by_level": [quality.mean(v)["stderr"] for v in nll.T]}
    terms = {name: table[name].mean(0, dtype=np.float64) / dimensions for name in PARTS if name in table}
    result["contributions"] = {name: value.tolist() for name, value in terms.items()}
    result["rate_by_level"] = (-terms["predictor"] - terms["log_det"] - terms["forward"][:-1]).tolist()
    result["effective_sample_size"] = quality.mean(table["effective_sample_size"])
    return result


@functools.partial(jax.jit, static_argnames=("config", "model"))
def _denoising_errors(params, root, batch, *, config, model):
    x, y, keys = batch["x"], state.condition(model, batch), state.example_keys(root, "evaluate", batch["index"])
    t = state.levels(config, model, config.evaluation_steps, jnp.full(len(x), config.trajectory.t_min))
    xs = trajectory.simulate(x, t, trajectory.example_noise(keys, (t.shape[1], *x.shape[1:])))
    found = denoising.denoise_levels(model, params, xs, t, y, config.sample.percentile)
    return {name: jnp.mean(jnp.square(clean - x[:, None]), (2, 3)) for name, clean in found.items()}


def denoising_errors(run, source: Source) -> dict:
    """What score denoising is worth on held-out records noised by the forward process, one trajectory a record: {formula of
    denoising.denoise_levels: mean and stderr by level, clean to noisy, of the squared error to the data a dimension}."""
    compute = functools.partial(_denoising_errors, run.params, config=run.config, model=state.exact(run.model))
    found = _by_record(run.config, source, run.mesh, compute)
    levels = {name: [quality.mean(v) for v in values.T] for name, values in found.items()}
    return {name: {key: [level[key] for level in values] for key in ("mean", "stderr")} for name, values in levels.items()}


@functools.partial(jax.jit, static_argnames=("config", "model", "denoiser"))
def _denoiser_errors(params, denoiser_params, root, batch, *, config, model, denoiser):
    y, keys = state.condition(model, batch), state.example_keys(root, "evaluate", batch["index"])
    return distill.errors(config, state.exact(denoiser), denoiser_params, model, params, keys, batch["x"], y)


def denoiser_errors(run, source: Source) -> dict:
    """Held-out means of distill.errors, of a run with a denoiser, one trajectory a record."""
    denoiser, denoiser_params = run.denoiser
    compute = functools.partial(_denoiser_errors, run.params, denoiser_params, config=run.config, model=run.model, denoiser=denoiser)
    return {name: quality.mean(values) for name, values in _by_record(run.config, source, run.mesh, compute).items()}


@functools.partial(jax.jit, static_argnames=("config", "model", "draws"))
def _velocity_errors(params, root, batch, *, config, model, draws):
    x, y, keys = batch["x"], state.condition(model, batch), state.example_keys(root, "evaluate/velocity", batch["index"])

    def add(total, number):
        own = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
        share = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 0)))(own)
        t = state.levels_at(config, model, (number + share) / draws)
        with layers.precision(model.config.precision):
            return total + flow_matching.velocity_errors(
                model.backbone, flow_matching.backbone_params(params), x, trajectory.example_noise(own, x.shape[1:]), t, y), None

    return {"velocity": jax.lax.scan(add, jnp.zeros(len(x)), jnp.arange(draws))[0] / draws}


def velocity_errors(config: Config, model, params, source: Source, mesh, draws: int) -> dict:
    """Held-out mean squared error of a flow-matching model's velocity a dimension, over `draws` levels a record, spread evenly."""
    compute = functools.partial(_velocity_errors, params, config=config, model=state.exact(model), draws=draws)
    return quality.mean(_by_record(config, source, mesh, compute)["velocity"])


KINDS = {"bound": "bound", "importance_weighted": "importance-weighted bound"}
PARTS = ("prior", "predictor", "log_det", "forward", "reconstruction")  # of likelihood.contributions


def compare(table: dict, other: dict, dimensions: int, levels: int) -> dict:
    """The bounds of one run less those of another on the same records, with the paired standard error: negative is better."""
    return {unit: {name: quality.mean((other[name].astype(np.float64) - table[name]) / (dimensions * size))
                   for name in KINDS} for unit, size in units(levels).items()}


def known(run, source: Source, scored: dict) -> dict:
    """For data whose density is known: its mean log at the records' own x_0, and what each bound on it lacks, in nats of an example."""
    config = run.config
    batch = next(pipeline.evaluation_batches(source, config.data.patch_size, len(source.records), 0, 1))
    x_0 = _noised(config, jax.random.key(config.seed), batch["x"], jnp.full(len(batch["x"]), config.trajectory.t_min), batch["index"])
    true = source.log_density(np.asarray(x_0, np.float64).reshape(len(x_0), -1), config.trajectory.t_min)
    return {"log_density": quality.mean(true)} | {name: quality.mean(scored[name] - true) for name in KINDS}


def evaluate(run, *, split: str | None = None, trajectories: int | None = None, against=None, features: str | None = None,
             inception_weights: str | None = None, guidance=(), progress: bool = False) -> tuple[dict, dict]:
    """(all of evaluation.json, the scores of every record) of a run, a load.Run: likelihood, samples' scores, provenance.

    against: another Run, scored on the same records; guidance: see image_scores. UserError where the split is of another shape than the
    training split, or the figures of the two would not compare.
    """
    config, model = run.config, run.model
    split, trajectories = split or config.evaluate.split, trajectories or config.evaluate.trajectories
    source = config.data.open(split)
    spec = pipeline.spec(source, config.data.patch_size)
    if spec.tokens != model.config.tokens or spec.dim != model.config.dim:
        raise UserError(f"split {split} of {config.data.source} has images of shape {spec.image_shape}, not the training split's shape")
    if against:
        _check_comparable(run, against)
    samples.check_guidance(run, source, guidance)
    processes.agree({"--step": run.step, "--split": split, "--trajectories": trajectories, "--features": features, "--guidance": guidance,
                     "--against": [against.workdir, against.step] if against else None})
    train = config.data.open(config.data.split)
    features = features or config.evaluate.features
    images = config.evaluate.images and train.levels
    # It may refuse, so it comes first.
    extractor = quality.extractor(features, train, inception_weights) if images and features != "none" else None
    table = scores(config, model, run.params, source, run.mesh, trajectories, progress=progress)
    result = {"step": run.step, "split": split} | summarize(table, model, trajectories, source.levels)
    if config.sample.decoder == "score":
        result["denoising"] = denoising_errors(run, source)
    if run.denoiser:
        result["denoiser"] = denoiser_errors(run, source)
    if config.train.objective == "flow_matching":
        result["velocity_error"] = velocity_errors(config, model, run.params, source, run.mesh, trajectories)
    if source.log_density:
        result["truth"] = known(run, source, table)
    if against:
        other = scores(against.config, against.model, against.params, source, against.mesh, trajectories, progress=progress)
        result["against"] = {"workdir": against.workdir, "step": against.step, "raw": against.raw} | compare(
            table, other, spec.tokens * spec.dim, source.levels)
    if images and (extractor or model.config.num_classes):
        result |= samples.image_scores(run, train, source, extractor, guidance, progress)
    if images and samples.asks_tasks(run, source):
        result["tasks"] = samples.task_scores(run, source, guidance, progress)
    result["provenance"] = provenance(run, source)
    return result, table


def _check_comparable(run, other) -> None:
    """UserError where the figures of two runs on the same records would not compare."""
    for key, mine, theirs in (("data.source", run.config.data.source, other.config.data.source),
                              ("data.image_size", run.config.data.image_size, other.config.data.image_size),
                              *([] if run.spec.levels else [
                                  ("trajectory.t_min", run.config.trajectory.t_min, other.config.trajectory.t_min)])):
        if mine != theirs:
            raise UserError(f"--against={other.workdir} has {key} = {theirs}, and this run has {mine}: their figures do not compare; give "
                            f"a run with the same {key}")


def provenance(run, source: Source) -> dict:
    """What the figures rest on: the data and how they were prepared, the noise levels, the checkpoint, the configuration, the packages."""
    config, spec = run.config, run.spec
    packages = ("ntm_jax", "jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {
        "source": source.name, "version": source.version, "split": source.split, "pixel_levels": source.levels,
        "preprocessing": {"image_shape": list(spec.image_shape), "image_size": config.data.image_size, "patch_size": spec.patch_size,
                          "scale": "2 v / (pixel_levels - 1) - 1" if source.levels else "as stored"},
        "t_min": config.trajectory.t_min,
        "levels": state.evaluated_levels(config, run.model).tolist(),
        "parameters": "raw" if run.raw else "ema", "checksum": checkpoint.digest(run.params),
        "config": config.raw, "packages": {name: importlib.metadata.version(name) for name in packages}, "devices": jax.device_count(),
        "processes": jax.process_count()}


IMAGE_SCORES = ("frechet", "frechet_held_out", "precision", "recall")
NAMES = {"bits_per_dim": "bits/dim", "nats_per_dim": "nats/dim"}
DENOISED = {"as_it_is": "squared error by level, x_k / (1 - t_k)", "own_score": "squared error by level, its own score",
            "trajectory_score": "squared error by level, trajectory score"}


def check_unit(unit: str, run) -> None:
    """UserError for bits per dimension of continuous latents."""
    if unit == "bits_per_dim" and not run.spec.levels:
        raise UserError(f"bits/dim are of discrete pixels, and {run.config.data.source} is continuous: take nats/dim, a bound on the "
                        f"density of the data noised to t_0 = {run.config.trajectory.t_min}, comparable at equal t_0 and scale")


def table(result: dict, unit: str) -> str:
    """The figures as a person reads them, likelihoods in a unit of evaluation.json."""
    bound, weighted, name = result[unit]["bound"], result[unit]["importance_weighted"], NAMES[unit]
    rows = [(f"bound, {name}", bound)]
    rows += [(f"importance-weighted bound ({k} trajectories), {name}", v) for k, v in weighted["by_trajectories"].items()]
    rows.append(("effective sample size", result["effective_sample_size"]))
    rows.append(("trajectory NLL, nats/dim", result["trajectory_nll"]))
    if "truth" in result:
        rows.append(("true mean log-density of the data noised to t_0, nats", result["truth"]["log_density"]))
        rows += [(f"{kind} less the true log-density, nats", result["truth"][key]) for key, kind in KINDS.items()]
    if "denoiser" in result:
        rows += [(f"mean squared error, {key.replace('_', ' ')}", value) for key, value in result["denoiser"].items()]
    if "velocity_error" in result:
        rows.append(("mean squared error of the velocity", result["velocity_error"]))
    if "against" in result:
        other = f"{result['against']['workdir']} at step {result['against']['step']}"
        rows += [(f"{kind} less that of {other}, {name}", result["against"][unit][key]) for key, kind in KINDS.items()]
    if "class_accuracy" in result:
        percent = {k: 100 * result["class_accuracy"][k] for k in ("mean", "stderr")}
        rows.append((f"class accuracy of {result['class_accuracy']['images']} samples, %", percent))
    for number, score in enumerate(result.get("guidance", ())):
        differs = [(f" less that of guidance {result['guidance'][0]['guidance']}", score["difference"])] if number else []
        for name, value in (("", score), *differs):
            percent = {k: 100 * value[k] for k in ("mean", "stderr")}
            rows.append((f"class accuracy of guidance {score['guidance']}{name}, %", percent))
    if "features" in result:
        kind = f"{result['features']['name']} features" + (", a proxy" if result["features"]["proxy"] else "")
        rows += [(f"{key.replace('_', ' ')} ({kind})", result[key]) for key in IMAGE_SCORES]
        rows += [(f"{key} ({kind}) of guidance {score['guidance']}", score[key])
                 for key in IMAGE_SCORES for score in result.get("guidance", ()) if key in score]
    for k in samples.RANKS if "retrieval" in result else ():
        found = result["retrieval"]
        percent = {key: 100 * found[f"rank_{k}"][key] for key in ("mean", "stderr")}
        chance = 100 * found["chance"][f"rank_{k}"]
        rows.append((f"own picture among the {k} nearest of {found['candidates']} (a proxy; chance {chance:.2g}), %", percent))
    width = max(len(name) for name, _ in rows)
    lines = [f"{result['split']} split, {result['count']} records, step {result['step']}"]
    for name, value in rows:
        value = value if isinstance(value, dict) else {"mean": value}
        lines.append(f"  {name:<{width}}  {value['mean']:8.4f}" + (f" ± {value['stderr']:.4f}" if "stderr" in value else ""))
    for label, key in (("NLL", result["trajectory_nll"]["by_level"]), ("rate", result["rate_by_level"])):
        lines.append(f"  {label + ' by level, clean to noisy, nats/dim':<{width}}  " + "  ".join(f"{v:.4f}" for v in key))
    for name, value in result.get("denoising", {}).items():
        lines.append(f"  {DENOISED[name]:<{width}}  " + "  ".join(f"{m:.5f} ± {e:.5f}" for m, e in zip(*value.values(), strict=True)))
    return "\n".join(lines)


def report(run, result: dict, scored: dict, path, per_example: bool = False, unit: str | None = None) -> None:
    """Prints the figures and writes, in the first process, path (JSON), beside it a picture of what each level costs (.png), with
    per_example the scores of each record (.parquet, nats), for data of known density densities.png, and beside another run losses.png."""
    path = epath.Path(path)
    if "truth" in result:
        source = run.config.data.open(result["split"])
        truth.picture(run, source, path.with_name("densities.png"))
    if jax.process_index():
        return
    files.write_json(path, result, sealed=True)
    plots.levels_plot(result, path.with_suffix(".png"))
    if "against" in result:
        runs = (run.workdir, result["against"]["workdir"])
        plots.losses_plot({str(folder): epath.Path(folder) / "metrics.jsonl" for folder in runs}, path.with_name("losses.png"))
    if per_example:
        write_scores(scored, path.with_suffix(".parquet"))
    print(table(result, unit or next(name for name in NAMES if name in result)), flush=True)
    if "tasks" in result:
        print(samples.task_table(result["tasks"]), flush=True)


def write_scores(scored: dict, path) -> None:
    """Writes the records' scores as parquet: a row a record, a column a score, those by level with the level after their name."""
    import pyarrow
    import pyarrow.parquet

    columns = {"index": scored["index"]}
    for name, values in scored.items():
        if name == "weighted":
            continue
        columns |= {name: values} if values.ndim == 1 else {f"{name}_{k}": v for k, v in enumerate(values.T)}
    with files.aside(path) as file:
        pyarrow.parquet.write_table(pyarrow.table(columns), file)
