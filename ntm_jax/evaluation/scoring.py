"""Scores of every record of a split, and the log-likelihood of any images.

Every record counts once, and its noise is keyed by its index: the same checkpoint gives the same
scores twice, and within rounding in any batch size, on any mesh and any number of processes.
Likelihoods run the transporter in float32. Symbols: B batch, N tokens, D token channels; n images,
H, W, C their shape.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from ntm_jax.core import trajectory
from ntm_jax.core.model import full_precision
from ntm_jax.core.pixels import PixelLikelihood
from ntm_jax.core.trajectory import Schedule
from ntm_jax.data import pipeline
from ntm_jax.data.sources import Source
from ntm_jax.errors import UserError, as_array, check_count
from ntm_jax.evaluation import importance
from ntm_jax.progress import track
from ntm_jax.runtime import sharding
from ntm_jax.runtime.config import Config
from ntm_jax.runtime.run import Run, checked_seed

BOUNDS = ("bound", "importance_weighted")


def noised(root, x, t_0, index):
    """x_0 [B, N, D] of continuous data x [B, N, D], which counts as data.

    It is drawn once for each record, independent of the number of trajectories.
    """
    keys = trajectory.example_keys(root, "evaluate/x_0", index)
    return trajectory.noise_first_level(x, t_0, trajectory.example_noise(keys, x.shape[1:]))


@functools.partial(jax.jit, static_argnames=(
    "schedule", "model", "pixels", "trajectories", "steps"))
def bounds_of_batch(params, root, batch, *, schedule: Schedule, model,
                    pixels: PixelLikelihood | None, trajectories: int, steps: int) -> dict:
    """importance.estimate_bounds of a batch's examples, in trajectories of `steps` steps.

    pixels: p(x | x_0); None bounds the density of the data noised to t_0.
    """
    x, y, index = batch["x"], model.config.condition.stack(batch), batch["index"]
    t = schedule.fixed_levels(steps, len(x))
    keys = trajectory.example_keys(root, "evaluate", index)
    start = None if pixels else noised(root, x, t[:, 0], index)

    def draw(number):
        own = trajectory.draw_keys(keys, number)
        noise = trajectory.example_noise(own, (t.shape[1], *x.shape[1:]))
        if pixels:
            return pixels.simulate(params, x, t, noise)
        return trajectory.noise_forward(start, t, noise[:, 1:])

    def terms(xs):
        return model.apply(params, xs, t, jnp.full(len(x), steps), y)

    if pixels is None:
        return importance.estimate_bounds(terms, draw, t, trajectories)
    return importance.estimate_bounds(
        terms, draw, t, trajectories, x if pixels.forward else None,
        lambda x_0: pixels.log_prob(params, x, x_0, t[:, 0], y))


def score_batch(run: Run, batch: dict, trajectories: int, seed: int | None = None,
                decoded: bool = False) -> dict:
    """importance.estimate_bounds of this process's share of a batch -> global arrays.

    batch: x, its condition, index and mask, of which the last two are kept. seed: the run's by
    default. decoded: of continuous data, bounds the density of the data itself, not of the data
    noised to t_0. The bounds on the density of an array are in its own units. Raises UserError for
    fewer than 1 trajectories.
    """
    check_count("trajectories", trajectories)
    pixels = run.pixels if decoded else run.bounded
    seed = checked_seed(run, seed)
    batch = sharding.to_global(batch, run.mesh)
    kept = {name: batch.pop(name) for name in ("index", "mask") if name in batch}
    with sharding.use(run.mesh):
        result = bounds_of_batch(
            run.params, jax.random.key(seed), batch | {"index": kept["index"]},
            schedule=run.schedule, model=full_precision(run.model), pixels=pixels,
            trajectories=trajectories, steps=run.config.evaluation_steps)
    if run.spec.columns:
        result |= {name: result[name] - run.spec.log_unit
                   for name in ("bound", "importance_weighted", "weighted")}
    return result | kept


def score_records(run: Run, source: Source, trajectories: int, progress: bool = False,
                  decoded: bool = False) -> dict:
    """The scores of every record of a split, {name: [records, ...]}; see estimate_bounds."""
    return map_records(
        run, source, lambda part: score_batch(run, part, trajectories, None, decoded), progress)


def padded_batch_size(config: Config, count: int, mesh) -> int:
    """The size of a batch of `count` records: the configuration's or all, in equal shards."""
    shards = sharding.batch_shards(mesh)
    return -(-min(config.evaluate.batch_size, count) // shards) * shards


def map_records(run: Run, source: Source, score, progress: bool = False) -> dict:
    """Applies score() to all records of a split -> {name: [records, ...]}, ordered by index.

    score(part) takes this process's share of a batch and returns global arrays, index and mask
    among them.
    """
    config, mesh = run.config, run.mesh
    batch_size = padded_batch_size(config, len(source.records), mesh)
    batches = pipeline.evaluation_batches(
        source, config.data.patch_size, batch_size, *sharding.share(mesh))
    total = -(-len(source.records) // batch_size)
    parts = [sharding.to_host(score(batch))
             for batch in track(batches, "evaluate", "batches", total, progress)]
    return _by_index(parts)


def _by_index(parts: list[dict]) -> dict:
    """The scores of all batches, each record once and in order, without padding.

    The shares of processes come in any order, and the last batch may repeat the first records.
    """
    table = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    real = table.pop("mask", np.ones(len(table["index"]))) > 0
    _, order = np.unique(table["index"][real], return_index=True)
    return {name: values[real][order] for name, values in table.items()}


def per_record(run: Run, source: Source, compute) -> dict:
    """{name: [records, ...]} of compute(root, batch), jitted, on one device or many."""
    def score(part):
        batch = sharding.to_global(part, run.mesh)
        kept = {"index": batch["index"], "mask": batch.pop("mask")}
        with sharding.use(run.mesh):
            return kept | compute(jax.random.key(run.config.seed), batch)

    found = map_records(run, source, score)
    return {name: values for name, values in found.items() if name != "index"}


@dataclasses.dataclass(frozen=True)
class LevelTerms:
    """The likelihood of n images and its terms in nats, means over their trajectories.

    log_prob: importance-weighted estimates of log p(x | y), lower bounds in expectation, [n].
    reconstruction: log p(x | x_0), [n]; of arrays with the change of units, which is all that it
      has for noised data.
    rate: log q(x_k | x_{k+1}, x) - log p(x_k | x_{k+1}, y), what step k takes from the bound,
      [n, T], clean to noisy.
    nll: -log p(x_k | x_{k+1}, y), exact for a trajectory, [n, T], clean to noisy; of arrays in
      standardised units.
    """

    log_prob: np.ndarray
    reconstruction: np.ndarray
    rate: np.ndarray
    nll: np.ndarray

    @property
    def bound(self) -> np.ndarray:
        """The evidence lower bound, which is the reconstruction less all rates, [n]."""
        return self.reconstruction - self.rate.sum(1)


def as_images(run: Run, images) -> np.ndarray:
    """Images [n, H, W, C], or rows [n, D] of an array, as an array.

    Raises UserError for no images and for images of another shape.
    """
    name = "data" if run.spec.columns else "images"
    shape = f"[n, {', '.join(map(str, run.spec.data_shape))}]"
    images = as_array(name, images, f"numbers {shape}")
    if not images.ndim or images.shape[1:] != run.spec.data_shape:
        raise UserError(f"{name} have shape {images.shape}: expected {shape}")
    check_count("the number of samples", len(images))
    return images


def as_tokens(run: Run, images: np.ndarray) -> np.ndarray:
    """Tokens [n, N, D] of as_images. Raises UserError for values that the data cannot have."""
    spec = run.spec
    if spec.pixel_levels:
        last = spec.pixel_levels - 1
        low, high = images.min(initial=0), images.max(initial=0)
        if images.dtype.kind not in "iu" or low < 0 or high > last:
            raise UserError(f"images are {images.dtype} of values from {low} to {high}: expected "
                            f"integers 0 to {last}")
    x = spec.to_tokens(images)
    if not np.isfinite(x).all():
        raise UserError("the data hold numbers that are not finite, or that are too large for the "
                        "training data's deviation")
    return x


def score_images(run: Run, images: np.ndarray, condition, trajectories: int,
                 seed: int | None = None, decoded: bool = False) -> LevelTerms:
    """The bounds on log p(image | condition) in nats, and their terms.

    images: of as_images, integers 0..V-1, or rows of an array in its units; condition: labels [n],
    Text or Vector. Of continuous data they bound the density of the data noised to t_0,
    with noise keyed by the seed, or with `decoded` that of the data itself. Images are scored
    in sharding.padded_batches of up to config.evaluate.batch_size.

    Raises UserError like as_tokens.
    """
    x = as_tokens(run, images)
    batch = {"x": x, "index": np.arange(len(x), dtype=np.int32),
             **run.model.config.condition.arrays(condition)}
    (number, count), parts = sharding.share(run.mesh), []
    for places in sharding.padded_batches(
            len(x), run.config.evaluate.batch_size, run.mesh, "score", run.model, run.schedule,
            run.config.evaluation_steps, trajectories, decoded):
        own = np.split(places, count)[number]
        part = {name: values[own] for name, values in batch.items()}
        parts.append(sharding.to_host(score_batch(run, part, trajectories, seed, decoded)))
    scores = _by_index(parts)
    reconstruction = scores.get("reconstruction", np.zeros(len(x), np.float32)) - run.spec.log_unit
    rate = -scores["predictor"] - scores["log_det"] - scores["forward"][:, :-1]
    return LevelTerms(scores["importance_weighted"], reconstruction, rate, scores["nll"])
