"""The rows of a benchmark: parts of a run as functions to time, with their FLOPs.

A row is a function BenchmarkInput -> Case, listed in TRAINING or SAMPLING; None where a run has no
such part.

Symbols: B batch, T steps, K levels, N tokens, D token channels.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ntm_jax.core import flow_matching, sampling
from ntm_jax.core.denoising import make_denoiser
from ntm_jax.core.model import full_precision
from ntm_jax.core.trajectory import example_keys
from ntm_jax.data import pipeline
from ntm_jax.data.sources import Source
from ntm_jax.evaluation import scoring
from ntm_jax.runtime import build, flops, sharding
from ntm_jax.runtime.run import Denoiser, Run, new_pixel_params
from ntm_jax.sampling import decoders, generate, inverses
from ntm_jax.training import objectives, state
from ntm_jax.training.objectives import Objective, StepInputs
from ntm_jax.training.resources import flops_of_step
from ntm_jax.training.step import check_batch, make_step

TOLERANCES = (1e-3, 1e-5)  # at which the parallel inverse's sweeps are counted
TOKENS = 2048  # sweeps and round-trip errors use the first images with this many tokens in all


@dataclasses.dataclass(frozen=True)
class BenchmarkInput:
    """The input of the rows: a run with its parameters, or an untrained run with its data."""

    run: Run
    batch: int  # images sampled at a time
    source: Source | None = None  # training data
    held_out: Source | None = None

    @functools.cached_property
    def objective(self) -> Objective:
        """The run's objective."""
        return objectives.find(self.run.config.train.objective)

    @property
    def solves_ode(self) -> bool:
        """Whether the run is a flow-matching model, whose sampler solves an ODE."""
        return self.objective.trains == "velocity"

    @functools.cached_property
    def params(self):
        """The run's parameters, or new ones, which change no rate except the sweeps."""
        return self.run.params or state.initialize(self.run).ema | new_pixel_params(self.run)

    @functools.cached_property
    def denoiser(self) -> Denoiser:
        """The run's denoiser, or a new one as large as the predictor."""
        if self.run.denoiser:
            return self.run.denoiser
        module = make_denoiser(self.run.model)
        params = state.initialize(dataclasses.replace(self.run, model=module)).ema
        return Denoiser(module, params, None, None, None)

    @functools.cached_property
    def drawn(self) -> tuple:
        """Inputs of the sampler's parts, indices, condition, t [B, K] and u_0..u_T [B, K, N, D]."""
        run, params = self.run, self.params  # initialises new ones outside the mesh's context
        index = np.arange(self.batch, dtype=np.int32)
        index, y = sharding.place((index, run.default_condition(index)), run.mesh)
        with sharding.use(run.mesh):
            t, us = latents(params, jax.random.key(0), index, y, schedule=run.schedule,
                             model=full_precision(run.model), options=run.config.sample)
        return index, y, t, us

    def batches(self) -> pipeline.TrainIterator:
        config = self.run.config
        assert self.source is not None  # of training rows
        return pipeline.TrainIterator(
            self.source, config.data.patch_size, config.data.batch_size, config.seed,
            config.data.workers, *sharding.share(self.run.mesh), flip=config.data.flip)


@dataclasses.dataclass(frozen=True)
class Case:
    """The work of one row: once() does it and returns arrays to wait for."""

    once: Callable
    items: int  # of all processes
    flops: int | None = None  # of all devices; None if memory bandwidth is the limit
    bytes: int = 0  # of this process, if memory bandwidth is the limit
    least: int = 1  # calls in a run, at least: more than a full queue could answer at once
    close: Callable = lambda: None
    facts: dict = dataclasses.field(default_factory=dict)  # further entries of the row


@functools.partial(jax.jit, static_argnames=("schedule", "model", "options"))
def latents(params, root, index, y, *, schedule, model, options):
    """The predictor's part of sampling: (t [B, K], u_0..u_T [B, K, N, D])."""
    t = schedule.fixed_levels(options.steps, len(index))
    keys = example_keys(root, "sample", index)
    return t, sampling.draw_latents(model, params, keys, t, y, options.guidance)[0]


def _train_step(given: BenchmarkInput) -> Case:
    """Training steps with the most levels, on one batch that is copied to the devices each time."""
    run = given.run
    check_batch(run.config, run.mesh)
    with contextlib.closing(given.batches()) as batches:
        batch = next(batches)
    step, current = make_step(run, given.objective), state.initialize(run)
    reference, steps = _reference(run, current.ema), max(run.config.trajectory.steps)
    fixed = new_pixel_params(run)

    def once():
        nonlocal current
        with sharding.use(run.mesh):
            batch_now = sharding.to_global(batch, run.mesh)
            current, metrics = step(current, batch_now, steps, reference, None, fixed)
        return metrics

    counted = flops_of_step(
        run, given.objective, None, step, current, sharding.to_global(batch, run.mesh), steps,
        reference, None, fixed)
    return Case(once, run.config.data.batch_size, flops=counted)


def _reference(run: Run, params):
    """A copy of the reference parameters, since a step donates its own; None if unused."""
    if not run.config.train.align_weight:
        return None
    backbone = flow_matching.backbone_params(params)
    return jax.tree.map(lambda a: jax.device_put(np.asarray(a), a.sharding), backbone)


def _held_out(given: BenchmarkInput) -> tuple[dict, int]:
    """(this process's share of an evaluation batch, the batch's global size)."""
    config, mesh, source = given.run.config, given.run.mesh, given.held_out
    assert source is not None  # of training rows
    size = scoring.padded_batch_size(config, len(source.records), mesh)
    with contextlib.closing(pipeline.evaluation_batches(
            source, config.data.patch_size, size, *sharding.share(mesh))) as batches:
        return next(batches), size


def _forward(given: BenchmarkInput) -> Case:
    """The forward pass of the training loss, on a batch of the held-out likelihood."""
    run, (batch, size) = given.run, _held_out(given)
    params, mesh = state.initialize(run).params | new_pixel_params(run), run.mesh
    objective = given.objective

    def loss(model, params, root, batch, reference):
        context = objectives.loss_context(dataclasses.replace(run, model=model), objective)
        inputs = StepInputs(root, batch, run.config.evaluation_steps, 0)
        return objective.loss(context, params, inputs, reference)

    forward, root = jax.jit(loss, static_argnums=0), jax.random.key(0)
    reference = _reference(run, params)

    def once():
        with sharding.use(mesh):
            return forward(run.model, params, root, sharding.to_global(batch, mesh), reference)

    with sharding.use(mesh):
        counted = flops.count(functools.partial(loss, build.reference_variant(run.model)), params,
                              root, sharding.to_global(batch, mesh), reference)
    return Case(once, size, flops=counted)


def _input_pipeline(given: BenchmarkInput) -> Case:
    """This process's share of training batches, on the host."""
    batches = given.batches()
    size = sum(a.nbytes for a in next(batches).values())
    return Case(lambda: next(batches), given.run.config.data.batch_size, bytes=size, least=4,
                close=batches.close)


def _likelihood(given: BenchmarkInput) -> Case:
    """The held-out likelihood with one trajectory per record, as during training."""
    batch, size = _held_out(given)
    params = state.initialize(given.run).ema | new_pixel_params(given.run)
    run = dataclasses.replace(given.run, params=params)
    examples = {name: value for name, value in batch.items() if name != "mask"}
    score = functools.partial(
        scoring.bounds_of_batch, schedule=run.schedule,
        model=full_precision(build.reference_variant(run.model)),
        pixels=run.bounded, trajectories=1, steps=run.config.evaluation_steps)
    with sharding.use(run.mesh):
        counted = flops.count(score, run.params, jax.random.key(0),
                              sharding.to_global(examples, run.mesh))
    return Case(functools.partial(scoring.score_batch, run, batch, 1), size, flops=counted)


def _sampling(given: BenchmarkInput, function, *arguments) -> Case:
    """The case of function(model, inverse, parameters, *arguments) on a batch of images, jitted.

    Its FLOPs are the model's own, with every token inverted once: they exclude sweeps of the
    parallel inverse that repeat a token.
    """
    run, mesh = jax.jit(function, static_argnums=(0, 1)), given.run.mesh
    model = full_precision(given.run.model)
    inverse = given.run.config.sample.inverse

    def once():
        with sharding.use(mesh):
            return run(model, inverse, given.params, *arguments)

    with sharding.use(mesh):
        reference = functools.partial(function, build.reference_variant(model), "sequential")
        counted = flops.count(reference, given.params, *arguments)
    return Case(once, len(given.drawn[0]), flops=counted)


def _sampler(decoder: str, given: BenchmarkInput) -> Case | None:
    """Images sampled with a decoder; None if the model does not support it."""
    needs = decoders.find(decoder)
    if needs.solves_ode != given.solves_ode:
        return None
    index, y, *_ = given.drawn
    denoiser = given.denoiser if needs.needs_denoiser else None
    options = dataclasses.replace(given.run.config.sample, decoder=decoder)

    def images(model, inverse, params, root, index, y, denoiser_params):
        sampler = generate.Sampler(
            model, given.run.schedule, dataclasses.replace(options, inverse=inverse),
            given.run.mesh, given.run.pixels, denoiser and denoiser.module)
        return generate.generate_tokens(params, root, index, y, denoiser_params, sampler=sampler)

    return _sampling(given, images, jax.random.key(0), index, y, denoiser and denoiser.params)


def _predictor(given: BenchmarkInput) -> Case | None:
    """The predictor's steps from pure noise to u_0."""
    if given.solves_ode:
        return None
    index, y, _, _ = given.drawn

    def predicted(model, _, params, root, index, y):
        return latents(params, root, index, y, schedule=given.run.schedule, model=model,
                        options=given.run.config.sample)

    return _sampling(given, predicted, jax.random.key(0), index, y)


def _inverse(how: str, given: BenchmarkInput) -> Case | None:
    """The inverse of all levels of a trajectory, by a method; None without a transporter."""
    model, mesh = full_precision(given.run.model), given.run.mesh
    if not model.config.transporter_blocks:
        return None
    _, y, t, us = given.drawn

    def inverted(model, _, params, us, t, y):
        return sampling.invert_trajectory(model, params, us, t, y, how)

    case = _sampling(given, inverted, us, t, y)
    auto = inverses.choose("auto", model.config, us.shape[0] * (us.shape[1] - 1), mesh)
    first = max(TOKENS // model.config.tokens, mesh.size)
    us, t, y = jax.tree.map(lambda a: a[:first], (us, t, y))
    invert = jax.jit(functools.partial(inverted, model, None))
    transport = jax.jit(functools.partial(sampling.transport_trajectory, model))
    with sharding.use(mesh):
        xs = invert(given.params, us, t, y)
        back = invert(given.params, transport(given.params, xs, t, y), t, y)
        facts = {"tokens": model.config.tokens, "auto": auto,
                 "round_trip_error": float(jnp.max(jnp.abs(back - xs)))}
        if how == "parallel":
            facts["sweeps"] = {
                f"{tolerance:g}": sharding.to_host(
                    _sweeps(given.params, us, t, y, tolerance, model=model)).tolist()
                for tolerance in TOLERANCES}
    return dataclasses.replace(case, facts=facts)


@functools.partial(jax.jit, static_argnames="model")
def _sweeps(params, us, t, y, tolerance, *, model):
    """Mean sweeps of a block by level [T], clean to noisy, until changes are below tolerance."""
    return jnp.mean(sampling.inverse_sweeps(model, params, us, t, y, tolerance), (0, 2))


def _score(given: BenchmarkInput) -> Case | None:
    """Trajectory score denoising of inverted levels."""
    if given.solves_ode:
        return None
    _, y, t, us = given.drawn
    options = given.run.config.sample

    def denoised(model, _, params, xs, t, y):
        sampler = generate.Sampler(model, given.run.schedule, options, given.run.mesh,
                                   given.run.pixels)
        return sampler.score_denoise(params, xs, t, y)

    return _sampling(given, denoised, us, t, y)


TRAINING = {"train step": _train_step, "forward pass": _forward,
            "input pipeline": _input_pipeline, "likelihood evaluation": _likelihood}
SAMPLING = {
    **{f"images, decoder {decoder}": functools.partial(_sampler, decoder)
       for decoder in decoders.DECODERS.names},
    "predictor's steps": _predictor,
    **{f"inverse, {how}": functools.partial(_inverse, how) for how in ("sequential", "parallel")},
    "score denoising": _score}
