"""Held-out likelihood with standard errors, and class accuracy of samples. Every record counts once and is keyed by its index, so the same
checkpoint gives the same figures twice, in any batch size, on any mesh and any number of processes."""

import functools
import importlib.metadata
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from etils import epath

from ntm_jax.core import likelihood, trajectory
from ntm_jax.data import pipeline, sources
from ntm_jax.data.sources import Source
from ntm_jax.errors import UserError
from ntm_jax.runtime import generate, processes, sharding, state
from ntm_jax.runtime.config import Config


@functools.partial(jax.jit, static_argnames=("config", "model", "levels", "trajectories", "steps"))
def _score(params, root, batch, *, config, model, levels, trajectories, steps):
    """Scores [B] of a batch in nats: bound, importance-weighted bound, effective sample size, NLL by level [B, T], each term's share."""
    x, y, index = batch["x"], state.condition(model, batch), batch["index"]
    t = state.levels(config, model, steps, jnp.full(len(x), config.trajectory.t_min))
    keys = state.example_keys(root, "evaluate", index)
    shape = (t.shape[1], *x.shape[1:])

    def add(carry, draw):
        importance, sums = carry
        noise = trajectory.example_noise(jax.vmap(jax.random.fold_in, (0, None))(keys, draw), shape)
        if not levels:  # x_0, part of the data, is drawn once
            first = trajectory.example_noise(jax.vmap(jax.random.fold_in, (0, None))(keys, trajectories), shape[1:])
            noise = noise.at[:, 0].set(first)
        xs = trajectory.simulate(x, t, noise)
        terms = model.apply(params, xs, t, jnp.full(len(x), steps), y)
        parts = likelihood.contributions(terms, xs, x, t, levels)
        sums = jax.tree.map(jnp.add, sums, {"nll": terms.nll} | parts)
        return (importance.add(sum(parts.values())), sums), None

    zeros = {"nll": jnp.zeros((len(x), steps))} | dict.fromkeys(("prior", "predictor", "log_det", "forward"), jnp.zeros(len(x)))
    zeros |= {"reconstruction": jnp.zeros(len(x))} if levels else {}
    (importance, sums), _ = jax.lax.scan(add, (likelihood.Importance.empty(len(x)), zeros), jnp.arange(trajectories))
    return {"bound": importance.bound, "importance_weighted": importance.importance_weighted,
            "effective_sample_size": importance.effective_sample_size} | jax.tree.map(lambda s: s / trajectories, sums)


def score_batch(config: Config, model, params, batch: dict, mesh, levels: int, trajectories: int, steps: int | None = None,
                seed: int | None = None) -> dict:
    """Scores [B] in nats of this process's share of a batch of x, its condition, index and mask, of which the last two are kept: global."""
    steps, seed = config.sample.steps if steps is None else steps, config.seed if seed is None else seed
    batch = sharding.to_global(batch, mesh)
    kept = {name: batch.pop(name) for name in ("index", "mask") if name in batch}
    with sharding.use(mesh):
        result = _score(params, jax.random.key(seed), batch | {"index": kept["index"]}, config=config, model=state.exact(model),
                        levels=levels, trajectories=trajectories, steps=steps)
    return result | kept


def scores(config: Config, model, params, source: Source, mesh, trajectories: int, steps: int | None = None, progress: bool = False):
    """Every record's scores in nats, {name: [records]}, with the record indices; likelihoods run the transporter in float32."""
    shards = sharding.batch_shards(mesh)
    batch_size = -(-min(config.evaluate.batch_size, len(source.records)) // shards) * shards
    batches = pipeline.evaluation_batches(source, config.data.patch_size, batch_size, *sharding.share(mesh))
    kept = []
    total = -(-len(source.records) // batch_size)
    for batch in tqdm.tqdm(batches, "evaluate", total, unit="batch", leave=False, disable=None if progress else True):
        result = score_batch(config, model, params, batch, mesh, source.levels, trajectories, steps)
        kept.append(sharding.to_host(result))
    table = {name: np.concatenate([k[name] for k in kept]) for name in kept[0]}
    table = {name: values[table["mask"] > 0] for name, values in table.items() if name != "mask"}
    order = np.argsort(table["index"])  # a mesh may hold the processes' shares in any order
    return {name: values[order] for name, values in table.items()}


def _mean(values) -> dict:
    """Mean over examples and its standard error, in float64."""
    values = np.asarray(values, np.float64)
    return {"mean": values.mean().item(), "stderr": (values.std(ddof=1) / math.sqrt(len(values))).item() if len(values) > 1 else 0.0}


def summarize(table: dict, model, trajectories: int, levels: int) -> dict:
    """evaluation.json's likelihood figures from the records' scores. Bounds are of log p's negative: lower is better."""
    dimensions = model.config.tokens * model.config.dim
    bounds = {name: -table[name] / dimensions for name in ("bound", "importance_weighted")}
    nll = table["nll"] / dimensions
    result = {"count": len(table["index"])}
    for unit, scale in (("bits_per_dim", 1 / math.log(2)), ("nats_per_dim", 1.0)):
        if unit == "nats_per_dim" or levels:
            result[unit] = {name: _mean(scale * values) for name, values in bounds.items()}
            result[unit]["importance_weighted"]["trajectories"] = trajectories
    result["trajectory_nll"] = _mean(nll.mean(1)) | {"by_level": nll.mean(0, dtype=np.float64).tolist()}
    terms = ("prior", "predictor", "log_det", "forward", "reconstruction")
    result["terms"] = {name: (table[name].mean(dtype=np.float64) / dimensions).item() for name in terms if name in table}
    result["effective_sample_size"] = _mean(table["effective_sample_size"])
    return result


MAX_CLASSIFIER_RECORDS = 20_000  # an SVC's time grows with the square of them


def class_accuracy(config: Config, model, params, spec, mesh, real: Source, progress: bool = False) -> dict | None:
    """How many of config.evaluate.images samples a support vector classifier, fitted on the real training split, takes for their class.

    The samples are made as config.sample says. None where the model has no classes or the training split is too large for an SVC.
    """
    if not (model.config.num_classes and config.evaluate.images and len(real.records) <= MAX_CLASSIFIER_RECORDS):
        return None
    from sklearn.svm import SVC

    def features(images):
        return np.asarray(images, np.float64).reshape(len(images), -1) / (spec.levels - 1)

    records = [real.records[i] for i in range(len(real.records))]
    classifier = SVC().fit(features([r["image"] for r in records]), [r["label"] for r in records])
    hits = []
    indices = generate.in_batches(config.evaluate.images, 500)
    for index in tqdm.tqdm(indices, "samples", unit="batch", leave=False, disable=None if progress else True):
        images = generate.generate(config, model, params, spec, mesh, index)
        hits.append(classifier.predict(features(images)) == index % model.config.num_classes)
    return _mean(np.concatenate(hits)) | {"images": len(np.concatenate(hits)), "decoder": config.sample.decoder,
                                          "guidance": config.sample.guidance}


def evaluate(config: Config, model, params, mesh, step: int, *, split: str | None = None, trajectories: int | None = None,
             progress: bool = False) -> dict:
    """All of evaluation.json for one set of parameters: held-out likelihood, class accuracy of samples, provenance."""
    split = split or config.evaluate.split
    source = sources.open_source(config.data.source, split, config.data.image_size)
    spec = pipeline.spec(source, config.data.patch_size)
    if spec.tokens != model.config.tokens or spec.dim != model.config.dim:
        raise UserError(f"split {split} of {config.data.source} has images of shape {spec.image_shape}, not the training split's shape")
    trajectories = trajectories or config.evaluate.trajectories
    processes.agree({"--step": step, "--split": split, "--trajectories": trajectories})
    table = scores(config, model, params, source, mesh, trajectories, progress=progress)
    result = {"step": step, "split": split} | summarize(table, model, trajectories, source.levels)
    train = sources.open_source(config.data.source, config.data.split, config.data.image_size)
    accuracy = class_accuracy(config, model, params, spec, mesh, train, progress)
    if accuracy:
        result["class_accuracy"] = accuracy
    packages = ("ntm_jax", "jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    result["provenance"] = {
        "source": source.name, "version": source.version, "split": split, "pixel_levels": source.levels, "t_min": config.trajectory.t_min,
        "levels": np.asarray(state.levels(config, model, config.sample.steps, jnp.full(1, config.trajectory.t_min)))[0].tolist(),
        "config": config.raw, "packages": {name: importlib.metadata.version(name) for name in packages}, "devices": jax.device_count(),
    }
    return result


def table(result: dict) -> str:
    """The figures as a person reads them."""
    rows = []
    for unit, name in (("bits_per_dim", "bits/dim"), ("nats_per_dim", "nats/dim")):
        if unit in result:
            bound, weighted = result[unit]["bound"], result[unit]["importance_weighted"]
            rows.append((f"bound, {name}", bound))
            rows.append((f"importance-weighted bound ({weighted['trajectories']} trajectories), {name}", weighted))
    rows.append(("trajectory NLL, nats/dim", result["trajectory_nll"]))
    if "class_accuracy" in result:
        percent = {k: 100 * result["class_accuracy"][k] for k in ("mean", "stderr")}
        rows.append((f"class accuracy of {result['class_accuracy']['images']} samples, %", percent))
    width = max(len(name) for name, _ in rows)
    lines = [f"{result['split']} split, {result['count']} records, step {result['step']}"]
    lines += [f"  {name:<{width}}  {value['mean']:8.4f} ± {value['stderr']:.4f}" for name, value in rows]
    by_level = "  ".join(f"{v:.4f}" for v in result["trajectory_nll"]["by_level"])
    lines.append(f"  {'NLL by level, clean to noisy, nats/dim':<{width}}  {by_level}")
    return "\n".join(lines)


def report(result: dict, path) -> None:
    """Prints the figures and writes them as JSON, in the first process only."""
    if jax.process_index() == 0:
        epath.Path(path).write_text(json.dumps(result, indent=2) + "\n")
        print(table(result), flush=True)
