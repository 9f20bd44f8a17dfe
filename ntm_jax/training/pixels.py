"""Fits p(x | x_0) to the training data, before the first step of a run.

It depends on the data and on the noise at t_0, not on the model of trajectories: one fit serves all
checkpoints of a run, and WORKDIR/pixels keeps it.

Symbols: B batch, N tokens, D token channels, V pixel values.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jax.experimental import multihost_utils

from ntm_jax.core import trajectory
from ntm_jax.core.pixels import PixelLikelihood
from ntm_jax.data import pipeline
from ntm_jax.data.sources import Source, take
from ntm_jax.evaluation import scoring
from ntm_jax.progress import track
from ntm_jax.runtime import sharding
from ntm_jax.runtime.checkpoint import Checkpoints
from ntm_jax.runtime.config import Optimizer
from ntm_jax.runtime.run import (
    PIXELS,
    Run,
    abstract_pixel_params,
    new_pixel_params,
    pixel_params,
)
from ntm_jax.training import optimizers
from ntm_jax.training.objectives import StepInputs
from ntm_jax.training.step import update_ema

COUNTED = 10_000  # most training records that a histogram counts
HELD_OUT = 1_000  # most training records, of a tenth, that end the network's training
CHECKS, PATIENCE = 12, 3  # comparisons on them, and those without a better figure that end it
DRAWS = 4  # of the noise of each of them
DECAY = 0.99  # of the network's moving average


def prepare(run: Run, new: bool, progress: bool) -> Run:
    """The run with the parameters of p(x | x_0), fitted once and kept in WORKDIR/pixels.

    new: the run has no checkpoint, and what lies in the folder is another's. All processes call it.
    """
    if not abstract_pixel_params(run):
        return run
    folder = epath.Path(run.workdir) / PIXELS
    if new and jax.process_index() == 0 and folder.exists():
        folder.rmtree()
    multihost_utils.sync_global_devices("another run's pixel likelihood removed")
    if not new and multihost_utils.broadcast_one_to_all(folder.exists()):
        return with_params(run, pixel_params(run, run.workdir))
    fitted = fit(run, progress)
    save(fitted, run.workdir)
    return fitted


def with_params(run: Run, found: dict) -> Run:
    """The run with these parameters of p(x | x_0), {"pixels": ...} or {}, in place of its own."""
    kept = {name: value for name, value in (run.params or {}).items() if name != "pixels"}
    return dataclasses.replace(run, params=kept | found)


def save(run: Run, workdir: str) -> None:
    """Keeps the parameters of p(x | x_0) in WORKDIR/pixels, if there are any."""
    found = {name: value for name, value in (run.params or {}).items() if name == "pixels"}
    if found:
        with Checkpoints(f"{workdir}/{PIXELS}") as checkpoints:
            checkpoints.save(0, found, {})


def fit(run: Run, progress: bool = False) -> Run:
    """The run with p(x | x_0) of its configuration, fitted to records of its training data.

    Raises UserError where it needs these and they cannot be opened.
    """
    pixels, params = run.pixels, new_pixel_params(run).get("pixels")
    if params is None:
        return with_params(run, {})
    source = run.config.data.open(run.config.data.split)
    params["log_prior"] = jax.device_put(histogram(run, source), sharding.replicated(run.mesh))
    if pixels.network:
        params = _fit_network(run, pixels, params, source, progress)
    return with_params(run, {"pixels": params})


def histogram(run: Run, source: Source) -> np.ndarray:
    """log pi(v) of each pixel and channel, [N, D, V] float32: counts plus 1, normalised."""
    spec, chosen = run.spec, source.evenly_spread(COUNTED).tolist()
    counts = np.ones((spec.tokens, spec.dim, spec.pixel_levels))
    places = np.indices(counts.shape[:2])
    for batch in pipeline.evaluation_batches(
            source, spec.patch_size, min(len(chosen), 100), chosen=chosen):
        index = np.rint((batch["x"] + 1) * ((spec.pixel_levels - 1) / 2)).astype(int)
        for image in index[batch["mask"] > 0]:
            counts[(*places, image)] += 1
    return np.log(counts / counts.sum(-1, keepdims=True)).astype(np.float32)


def _fit_network(run: Run, pixels: PixelLikelihood, params: dict, source: Source,
                 progress: bool) -> dict:
    """Parameters with a network that is trained on nine tenths of the records.

    Of its moving averages it is the best one on the others, which also end its training.
    """
    config, schedule, size = run.config, run.schedule, run.config.data.batch_size
    order = np.random.RandomState(config.seed).permutation(len(source.records))
    held = order[: max(1, min(len(order) // 10, HELD_OUT))]
    learning = take(source, order[len(held):] if len(order) > len(held) else order)
    steps = config.train.pixel_likelihood_steps
    optimizer = optimizers.make(Optimizer(warmup_steps=steps // 10, weight_decay=0.3), steps)
    root = jax.random.key(config.seed)

    def bits(network, log_prior, inputs: StepInputs, t_0, y):
        x = inputs.batch["x"]
        noise = trajectory.example_noise(inputs.keys("pixels"), x.shape[1:])
        x_0 = trajectory.noise_first_level(x, t_0, noise)
        own = {"pixels": {"log_prior": log_prior, "network": network}}
        found = pixels.log_prob(own, x, x_0, t_0, y)
        return -found / (x[0].size * math.log(2))

    # The arrays of several processes cannot be constants of a program, so log_prior is an argument.
    @functools.partial(jax.jit, out_shardings=sharding.replicated(run.mesh))
    def update(state, log_prior, batch, step):
        network, opt_state, average = state
        inputs = StepInputs(jax.random.fold_in(root, step), batch, 0, step)
        t_0 = inputs.t_min(schedule)
        y = inputs.condition(pixels.network, config.train.condition_dropout)
        gradient = jax.grad(
            lambda network: jnp.mean(bits(network, log_prior, inputs, t_0, y)))(network)
        updates, opt_state = optimizer.update(gradient, opt_state, network)
        network = optax.apply_updates(network, updates)
        return network, opt_state, update_ema(average, network, step, DECAY)

    @jax.jit
    def measured(network, log_prior, batch):
        y, t_0 = run.model.config.condition.stack(batch), jnp.full(len(batch["x"]), schedule.t_min)

        def drawn(number):
            inputs = StepInputs(jax.random.fold_in(root, number), batch, 0, 0)
            return jnp.sum(bits(network, log_prior, inputs, t_0, y) * batch["mask"])

        return jnp.mean(jax.lax.map(drawn, jnp.arange(DRAWS)))

    held_batches = list(pipeline.evaluation_batches(
        source, run.spec.patch_size, scoring.padded_batch_size(config, len(held), run.mesh),
        *sharding.share(run.mesh), held.tolist()))

    def held_out(network) -> float:
        with sharding.use(run.mesh):
            return sum(float(measured(network, log_prior, sharding.to_global(batch, run.mesh)))
                       for batch in held_batches) / len(held)

    network, log_prior = params["network"], params["log_prior"]
    state, best = (network, optimizer.init(network), network), (held_out(network), 0, network)
    every = -(-steps // CHECKS)
    iterator = pipeline.TrainIterator(
        learning, run.spec.patch_size, size, config.seed, 0, *sharding.share(run.mesh),
        flip=config.data.flip)
    try:
        for step in track(range(steps), "fit p(x | x_0)", "steps", steps, progress):
            with sharding.use(run.mesh):
                batch = sharding.to_global(next(iterator), run.mesh)
                state = update(state, log_prior, batch, step)
            if (step + 1) % every == 0 or step + 1 == steps:
                best = min(best, (held_out(state[2]), step + 1, state[2]), key=lambda one: one[:2])
                if step + 1 - best[1] >= PATIENCE * every:
                    break
    finally:
        iterator.close()
    return params | {"network": best[2]}
