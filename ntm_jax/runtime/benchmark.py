"""Rates of what a run does, each beside the limit of the machine that it runs on: the training step, the input pipeline, the held-out
likelihood, the sampler and its parts.

A row is a function (Setting) -> Case, listed in TRAINING or SAMPLING: one more program's row is one more function there.
"""

import contextlib
import dataclasses
import functools
import math
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ntm_jax.core import flow_matching, sampling
from ntm_jax.core.denoising import score_denoise
from ntm_jax.core.model import NTM
from ntm_jax.core.transporter import fastest
from ntm_jax.data import pipeline
from ntm_jax.data.sources import Source
from ntm_jax.errors import UserError
from ntm_jax.runtime import attention, distill, evaluate, flops, generate, objective, sharding, state, train
from ntm_jax.runtime.config import SOLVERS, Config

SECONDS = 0.5  # a timed run lasts at least this long
COPIED = 1 << 27  # bytes: more than a cache holds
TOLERANCES = (1e-3, 1e-5)  # to which the parallel inverse's sweeps are counted
TOKENS = 2048  # of so many, the first images', sweeps and round-trip errors are told


@dataclasses.dataclass(frozen=True)
class Setting:
    """What the rows are made from: a configuration with its data and new parameters, or a load.Run with its own."""

    config: Config
    mesh: jax.sharding.Mesh
    source: Source | None = None  # training and held_out are asked of a configuration alone
    held_out: Source | None = None
    run: Any = None
    batch: int | None = None  # images that are sampled at a time; the configuration's number of samples if not given

    def model(self):
        if self.run:
            return self.run.model
        return state.make_model(self.config, pipeline.spec(self.source, self.config.data.patch_size), attention.choose(self.mesh))

    @property
    def flow(self) -> bool:
        """Whether the model is one of flow matching, whose samples solve an ODE."""
        return self.config.train.objective == "flow_matching"

    @functools.cached_property
    def params(self):
        """The run's parameters, or new ones: rates do not depend on them, but for the sweeps of the parallel inverse."""
        return self.run.params if self.run else state.initialize(self.config, self.model(), self.mesh).ema

    @functools.cached_property
    def denoiser(self) -> tuple:
        """(module, parameters): a denoiser's run's, or a new one as large as the predictor."""
        if self.run and self.run.denoiser:
            return self.run.denoiser
        module = distill.make_denoiser(self.model())
        return module, state.initialize(self.config, module, self.mesh).ema

    @functools.cached_property
    def drawn(self) -> tuple:
        """What the sampler's parts take, for a batch of images: indices, condition, levels [B, K] and latents u_0..u_T [B, K, N, D]."""
        model, params = self.model(), self.params
        index = np.arange(self.batch or self.config.sample.num, dtype=np.int32)
        y = generate.conditions(self.config, model, index)
        index, y = sharding.place((index, y), self.mesh)
        with sharding.use(self.mesh):
            t, us = _latents(params, jax.random.key(0), index, y, config=self.config, model=state.exact(model))
        return index, y, t, us

    def batches(self) -> pipeline.TrainIterator:
        data = self.config.data
        return pipeline.train_iterator(self.source, data.patch_size, data.batch_size, self.config.seed, data.workers,
                                       *sharding.share(self.mesh))


@dataclasses.dataclass(frozen=True)
class Case:
    """One row's work: once() does it and returns arrays to wait for."""

    once: Callable
    items: int  # of all processes
    flops: int | None = None  # of all devices; None where the limit is the copying of memory
    bytes: int = 0  # of this process
    least: int = 1  # times in a run, so that what lies ready in a queue is not taken for speed
    close: Callable = lambda: None
    facts: dict = dataclasses.field(default_factory=dict)  # what else the row tells


def _train_step(setting: Setting) -> Case:
    """Steps at the largest number of levels that is trained, on one batch that goes to the devices each time."""
    config, mesh, model, steps = setting.config, setting.mesh, setting.model(), max(setting.config.trajectory.steps)
    train.check_batch(config, mesh)
    with contextlib.closing(setting.batches()) as batches:
        batch = next(batches)
    step, current = objective.make_step(config, model, mesh), state.initialize(config, model, mesh)
    frozen = _frozen(config, current.ema)

    def once():
        nonlocal current
        with sharding.use(mesh):
            current, metrics = step(current, sharding.to_global(batch, mesh), steps, frozen, None)
        return metrics

    counted = objective.flops_of_step(config, model, step, current, sharding.to_global(batch, mesh), mesh, frozen=frozen)
    return Case(once, config.data.batch_size, flops=counted)


def _frozen(config: Config, params):
    """What a step that holds its means near a frozen copy takes: a copy, since a step donates its parameters."""
    if not config.train.align_weight:
        return None
    return jax.tree.map(lambda a: jax.device_put(np.asarray(a), a.sharding), flow_matching.backbone_params(params))


def _held_out(setting: Setting) -> tuple[dict, int]:
    """This process's share of an evaluation batch, and the size of all of it."""
    size, shards = min(setting.config.evaluate.batch_size, len(setting.held_out.records)), sharding.batch_shards(setting.mesh)
    size = -(-size // shards) * shards
    with contextlib.closing(pipeline.evaluation_batches(
            setting.held_out, setting.config.data.patch_size, size, *sharding.share(setting.mesh))) as batches:
        return next(batches), size


def _forward(setting: Setting) -> Case:
    """The training step's forward pass alone, up to each example's terms, on the batch that the likelihood is evaluated on."""
    config, mesh, model = setting.config, setting.mesh, setting.model()
    batch, size = _held_out(setting)
    params = state.initialize(config, model, mesh).params

    def terms(model, params, root, batch, frozen):
        return objective.OBJECTIVES[config.train.objective](config, model, params, root, batch, config.evaluation_steps, frozen)

    forward, root, frozen = jax.jit(terms, static_argnums=0), jax.random.key(0), _frozen(config, params)

    def once():
        with sharding.use(mesh):
            return forward(model, params, root, sharding.to_global(batch, mesh), frozen)

    with sharding.use(mesh):
        counted = flops.count(functools.partial(terms, state.plain(model)), params, root, sharding.to_global(batch, mesh), frozen)
    return Case(once, size, flops=counted)


def _input_pipeline(setting: Setting) -> Case:
    """Training batches on the host, this process's share."""
    batches = setting.batches()
    size = sum(a.nbytes for a in next(batches).values())
    return Case(lambda: next(batches), setting.config.data.batch_size, bytes=size, least=4, close=batches.close)


def _likelihood(setting: Setting) -> Case:
    """Held-out likelihood with one trajectory a record, as on the way of a training run."""
    config, mesh, held_out, model = setting.config, setting.mesh, setting.held_out, setting.model()
    batch, size = _held_out(setting)
    params = state.initialize(config, model, mesh).ema

    once = functools.partial(evaluate.score_batch, config, model, params, batch, mesh, held_out.levels, trajectories=1)
    told = {name: value for name, value in batch.items() if name != "mask"}
    with sharding.use(mesh):
        counted = flops.count(
            functools.partial(evaluate._score, config=config, model=state.exact(state.plain(model)), levels=held_out.levels, trajectories=1,
                              steps=config.evaluation_steps), params, jax.random.key(0), sharding.to_global(told, mesh))
    return Case(once, size, flops=counted)


@functools.partial(jax.jit, static_argnames=("config", "model"))
def _latents(params, root, index, y, *, config, model):
    """The predictor's part of sampling: (t [B, K], u_0..u_T [B, K, N, D])."""
    t = state.levels(config, model, config.sample.steps, jnp.full(len(index), config.trajectory.t_min))
    keys = state.example_keys(root, "sample", index)
    return t, sampling.sample_latents(model, params, keys, t, y, config.sample.guidance)


def _sampling(setting: Setting, function, *arguments) -> Case:
    """The row of function(model, inverse, parameters, *arguments) on a batch of images, jitted.

    Its FLOPs are the model's own, every token inverted once: a sweep of the parallel inverse that does a token over counts for nothing.
    """
    run, mesh, model = jax.jit(function, static_argnums=(0, 1)), setting.mesh, state.exact(setting.model())

    def once():
        with sharding.use(mesh):
            return run(model, setting.config.sample.inverse, setting.params, *arguments)

    with sharding.use(mesh):
        counted = flops.count(functools.partial(function, state.plain(model), "sequential"), setting.params, *arguments)
    return Case(once, len(setting.drawn[0]), flops=counted)


def _sampler(decoder: str, setting: Setting) -> Case | None:
    """Images as launch/sample.py makes them by a decoder; None where it is not one of the model's."""
    if (decoder in SOLVERS) != setting.flow:
        return None
    config, (index, y, *_) = setting.config, setting.drawn
    module, denoiser = setting.denoiser if decoder == "denoiser" else (None, None)

    def images(model, inverse, params, root, index, y, denoiser):
        return generate._generate(
            params, root, index, y, denoiser, config=config, model=model, steps=config.sample.steps, guidance=config.sample.guidance,
            decoder=decoder, inverse=inverse, trajectory=False, denoiser=module)

    return _sampling(setting, images, jax.random.key(0), index, y, denoiser)


def _predictor(setting: Setting) -> Case | None:
    """The predictor's steps from pure noise to u_0."""
    if setting.flow:
        return None
    index, y, _, _ = setting.drawn

    def latents(model, _, params, root, index, y):
        return _latents(params, root, index, y, config=setting.config, model=model)

    return _sampling(setting, latents, jax.random.key(0), index, y)


def _inverse(how: str, setting: Setting) -> Case | None:
    """All levels of a trajectory inverted one way, as the score decoder asks for them; None where there is no transporter."""
    model = state.exact(setting.model())
    if not model.config.transporter_blocks:
        return None
    _, y, t, us = setting.drawn
    case = _sampling(setting, lambda model, _, *arguments: _inverted(*arguments, model=model, how=how), us, t, y)
    us, t, y = jax.tree.map(lambda a: a[: max(TOKENS // model.config.tokens, setting.mesh.size)], (us, t, y))
    with sharding.use(setting.mesh):
        xs = _inverted(setting.params, us, t, y, model=model, how=how)
        back = _inverted(setting.params, _transported(setting.params, xs, t, y, model=model), t, y, model=model, how=how)
        facts = {"tokens": model.config.tokens, "round_trip_error": float(jnp.max(jnp.abs(back - xs)))}
        if how == "parallel":
            facts["sweeps"] = {f"{tolerance:g}": sharding.to_host(_sweeps(setting.params, us, t, y, tolerance, model=model)).tolist()
                               for tolerance in TOLERANCES}
    return dataclasses.replace(case, facts=facts)


@functools.partial(jax.jit, static_argnames=("model", "how"))
def _inverted(params, us, t, y, *, model, how):
    return sampling.invert_trajectory(model, params, us, t, y, how)


@functools.partial(jax.jit, static_argnames="model")
def _transported(params, xs, t, y, *, model):
    """Latents u_0..u_T of levels x_0..x_T [B, K, N, D]."""
    steps = jnp.full(len(xs), xs.shape[1] - 1)
    below = [model.apply(params, xs[:, k], t[:, k], steps, y, method=NTM.transport)[0] for k in range(xs.shape[1] - 1)]
    return jnp.stack([*below, xs[:, -1]], 1)


@functools.partial(jax.jit, static_argnames="model")
def _sweeps(params, us, t, y, tolerance, *, model):
    """By level, clean to noisy, the mean sweeps of a block after which nothing changes by more than tolerance, [T]; at most N."""
    return jnp.mean(sampling.inverse_sweeps(model, params, us, t, y, tolerance), (0, 2))


def _score(setting: Setting) -> Case | None:
    """Trajectory score denoising of levels that are inverted already."""
    if setting.flow:
        return None
    _, y, t, us = setting.drawn

    def denoised(model, _, params, xs, t, y):
        return score_denoise(model, params, xs, t, y, setting.config.sample.percentile)

    return _sampling(setting, denoised, us, t, y)


TRAINING = {"train step": _train_step, "forward pass": _forward, "input pipeline": _input_pipeline, "likelihood evaluation": _likelihood}
SAMPLING = {
    **{f"images, decoder {decoder}": functools.partial(_sampler, decoder) for decoder in ("inverse", "score", "denoiser", *SOLVERS)},
    "predictor's steps": _predictor, **{f"inverse, {how}": functools.partial(_inverse, how) for how in ("sequential", "parallel")},
    "score denoising": _score}


def benchmark(config: Config, runs: int, batch: int | None = None, only: str = "") -> list[dict]:
    """All rows of a configuration, in the order of TRAINING and SAMPLING: name, items_per_second (the median of runs), flops_per_second
    (model FLOPs, without recomputation; None where the limit is the copying of memory), limit (FLOP/s or byte/s), share_of_limit, runs
    (each one's items/s). An inverse's row also has tokens and round_trip_error, the parallel one's sweeps, {tolerance: by level, clean to
    noisy}. only: the rows whose name holds this; UserError where there is none."""
    setting = Setting(
        config, sharding.make_mesh(config.mesh), config.data.open(config.data.split), config.data.open(config.evaluate.split), batch=batch)
    return _rows(TRAINING | SAMPLING, setting, runs, only)


def benchmark_run(run, runs: int, batch: int | None = None, only: str = "") -> list[dict]:
    """The rows of SAMPLING, of a load.Run."""
    return _rows(SAMPLING, Setting(run.config, run.mesh, run=run, batch=batch), runs, only)


def _rows(makers: dict[str, Callable], setting: Setting, runs: int, only: str) -> list[dict]:
    chosen = {name: make for name, make in makers.items() if only in name}
    rows = [{"name": name} | measure(case, runs, setting) for name, make in chosen.items() if (case := make(setting))]
    if not rows:
        raise UserError(f"--rows={only} is in no row's name: leave it out to see them all")
    return rows


def measure(case: Case, runs: int, setting: Setting) -> dict:
    """A case's row, but for its name. Its limit is measured before and after every run, and is the median: what disturbs the one disturbs
    the other."""
    limit = copying() if case.flops is None else flops.products(setting.config.model.dtype, setting.mesh, SECONDS)
    try:
        jax.block_until_ready(case.once())  # compiled
        count, limits = case.least, [limit()]
        while (seconds := flops.seconds(case.once, count)) < SECONDS:
            count = min(10 * count, math.ceil(1.2 * count * SECONDS / seconds))
        limits.append(limit())
        rates = [] if case.flops is None else [count * case.items / seconds]  # the last was a run, but of a queue, filled meanwhile
        while len(rates) < runs:
            if case.flops is None:
                flops.seconds(case.once, case.least)  # it is empty again
            rates.append(count * case.items / flops.seconds(case.once, count))
            limits.append(limit())
    finally:
        case.close()
    items, limit = statistics.median(rates), statistics.median(limits)
    reached = items / case.items * (case.bytes if case.flops is None else case.flops)
    return {"items_per_second": items, "flops_per_second": None if case.flops is None else reached, "limit": limit,
            "share_of_limit": reached / limit, "runs": rates} | case.facts


def copying() -> Callable[[], float]:
    """A measurement of the bytes of memory that one thread of this host copies in a second."""
    source = np.ones(COPIED, np.uint8)
    target = np.empty_like(source)
    return lambda: COPIED / min(flops.seconds(lambda: np.copyto(target, source), 1) for _ in range(5))


def table(rows: list[dict]) -> str:
    """The rows as a person reads them, and what they say of each other."""
    heads = ("", "items/s", "lowest", "highest", "GFLOP/s", "limit", "share")
    cells = [(row["name"], *(f"{v:,.{1 if v >= 10 else 3}f}" for v in (row["items_per_second"], min(row["runs"]), max(row["runs"]))),
              "" if row["flops_per_second"] is None else f"{row['flops_per_second'] / 1e9:,.1f}",
              f"{row['limit'] / 1e9:,.1f} {'GB/s' if row['flops_per_second'] is None else 'GFLOP/s'}", f"{row['share_of_limit']:.1%}")
             for row in rows]
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    lines = ["  ".join(f"{cell:{'<' if i == 0 else '>'}{widths[i]}}" for i, cell in enumerate(line)) for line in (heads, *cells)]
    rates = {row["name"]: row["items_per_second"] for row in rows}
    if {"train step", "input pipeline"} <= rates.keys():
        appetite = rates["input pipeline"] / rates["train step"]
        lines.append(f"appetite: the input pipeline gives {appetite:.1f} examples for each that a train step takes")
    if {"forward pass", "likelihood evaluation"} <= rates.keys():
        slower = rates["forward pass"] / rates["likelihood evaluation"]
        lines.append(f"a trajectory's evaluation takes {slower:.2f} times as long as a train step's forward pass in batches of that size")
    return "\n".join([*lines, *_of_sampling(rows, rates)])


def _of_sampling(rows: list[dict], rates: dict) -> list[str]:
    """Where the score decoder's time goes, and what the inverses cost, as far as the rows tell."""
    inverses = {row["name"].split()[-1]: row for row in rows if row["name"].startswith("inverse")}
    parts, lines = ["predictor's steps", "score denoising"], []
    if len(inverses) == 2:
        tokens, best = inverses["parallel"]["tokens"], max(row["items_per_second"] for row in inverses.values())
        parts.append(f"inverse, {fastest(tokens, jax.default_backend() == 'cpu')}")
        lines.append(f"--inverse=auto takes {parts[-1]}, {best / rates[parts[-1]]:.2f} times as long as the faster one")
        for tolerance, sweeps in inverses["parallel"]["sweeps"].items():
            lines.append(f"mean sweeps of the parallel inverse over {tokens} tokens to {tolerance}, clean to noisy: "
                         + ", ".join(f"{v:.1f}" for v in sweeps))
        errors = ", ".join(f"{how} {row['round_trip_error']:.1e}" for how, row in inverses.items())
        lines.append(f"largest round-trip error |x - inverse(forward(x))|: {errors}")
    if set(parts) <= rates.keys():
        times = {name: 1 / rates[name] for name in parts}
        shares = ", ".join(f"{name} {seconds / sum(times.values()):.0%}" for name, seconds in times.items())
        lines.insert(0, f"score decoder, each part timed by itself: {shares}")
    return lines
