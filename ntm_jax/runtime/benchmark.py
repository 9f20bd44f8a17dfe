"""Rates of what a run does, each beside the limit of the machine that it runs on: the training step, the input pipeline, the held-out
likelihood.

A row is a function (Setting) -> Case, listed in ROWS: one more program's row is one more function there.
"""

import contextlib
import dataclasses
import functools
import math
import statistics
from collections.abc import Callable

import jax
import numpy as np

from ntm_jax.data import pipeline, sources
from ntm_jax.data.sources import Source
from ntm_jax.runtime import attention, evaluate, flops, sharding, state, train
from ntm_jax.runtime.config import Config

SECONDS = 0.5  # a timed run lasts at least this long
COPIED = 1 << 27  # bytes: more than a cache holds


@dataclasses.dataclass(frozen=True)
class Setting:
    """What the rows are made from."""

    config: Config
    mesh: jax.sharding.Mesh
    source: Source
    held_out: Source

    def model(self):
        return state.make_model(self.config, pipeline.spec(self.source, self.config.data.patch_size), attention.choose(self.mesh))

    def batches(self) -> pipeline.TrainIterator:
        data = self.config.data
        return pipeline.train_iterator(self.source, data.patch_size, data.batch_size, self.config.seed, data.workers,
                                       *sharding.share(self.mesh))


@dataclasses.dataclass(frozen=True)
class Case:
    """One row's work: once() does it and returns arrays to wait for."""

    name: str
    once: Callable
    items: int  # of all processes
    flops: int | None = None  # of all devices; None where the limit is the copying of memory
    bytes: int = 0  # of this process
    least: int = 1  # times in a run, so that what lies ready in a queue is not taken for speed
    close: Callable = lambda: None


def _train_step(setting: Setting) -> Case:
    """Steps at the largest number of levels that is trained, on one batch that goes to the devices each time."""
    config, mesh, model, steps = setting.config, setting.mesh, setting.model(), max(setting.config.trajectory.steps)
    train.check_batch(config, mesh)
    with contextlib.closing(setting.batches()) as batches:
        batch = next(batches)
    step, current = train.make_step(config, model, mesh), state.initialize(config, model, mesh)

    def once():
        nonlocal current
        with sharding.use(mesh):
            current, metrics = step(current, sharding.to_global(batch, mesh), steps)
        return metrics

    counted = train.flops_of_step(config, model, current, sharding.to_global(batch, mesh), mesh)
    return Case("train step", once, config.data.batch_size, flops=counted)


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

    def terms(model, params, root, batch):
        return train.OBJECTIVES[config.train.objective](config, model, params, root, batch, config.evaluation_steps)

    forward, root = jax.jit(terms, static_argnums=0), jax.random.key(0)

    def once():
        with sharding.use(mesh):
            return forward(model, params, root, sharding.to_global(batch, mesh))

    with sharding.use(mesh):
        counted = flops.count(functools.partial(terms, state.plain(model)), params, root, sharding.to_global(batch, mesh))
    return Case("forward pass", once, size, flops=counted)


def _input_pipeline(setting: Setting) -> Case:
    """Training batches on the host, this process's share."""
    batches = setting.batches()
    size = sum(a.nbytes for a in next(batches).values())
    return Case("input pipeline", lambda: next(batches), setting.config.data.batch_size, bytes=size, least=4, close=batches.close)


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
    return Case("likelihood evaluation", once, size, flops=counted)


ROWS = (_train_step, _forward, _input_pipeline, _likelihood)


def benchmark(config: Config, runs: int) -> list[dict]:
    """The rows, in the order of ROWS: name, items_per_second (the median of runs), flops_per_second (model FLOPs, without recomputation;
    None where the limit is the copying of memory), limit (FLOP/s or byte/s), share_of_limit, runs (each one's items/s)."""
    setting = Setting(
        config, sharding.make_mesh(config.mesh), sources.open_source(config.data.source, config.data.split, config.data.image_size),
        sources.open_source(config.data.source, config.evaluate.split, config.data.image_size))
    return [measure(make(setting), runs, setting) for make in ROWS]


def measure(case: Case, runs: int, setting: Setting) -> dict:
    """A case's row. Its limit is measured before and after every run, and is the median: what disturbs the one disturbs the other."""
    limit = copying() if case.flops is None else flops.products(setting.config.model.dtype, setting.mesh, SECONDS)
    try:
        for _ in range(2):  # compiled
            jax.block_until_ready(case.once())
        count = case.least
        while (seconds := flops.seconds(case.once, count)) < SECONDS:
            count = min(10 * count, math.ceil(1.2 * count * SECONDS / seconds))
        rates, limits = [], [limit()]
        for _ in range(runs):
            flops.seconds(case.once, case.least)  # a queue that filled meanwhile is empty again
            rates.append(count * case.items / flops.seconds(case.once, count))
            limits.append(limit())
    finally:
        case.close()
    items, limit = statistics.median(rates), statistics.median(limits)
    reached = items / case.items * (case.bytes if case.flops is None else case.flops)
    return {"name": case.name, "items_per_second": items, "flops_per_second": None if case.flops is None else reached, "limit": limit,
            "share_of_limit": reached / limit, "runs": rates}


def copying() -> Callable[[], float]:
    """A measurement of the bytes of memory that one thread of this host copies in a second."""
    source = np.ones(COPIED, np.uint8)
    target = np.empty_like(source)
    return lambda: COPIED / min(flops.seconds(lambda: np.copyto(target, source), 1) for _ in range(5))


def table(rows: list[dict]) -> str:
    """The rows as a person reads them, and how many examples the pipeline gives for each that a step takes."""
    heads = ("", "items/s", "lowest", "highest", "GFLOP/s", "limit", "share")
    cells = [(row["name"], *(f"{v:,.1f}" for v in (row["items_per_second"], min(row["runs"]), max(row["runs"]))),
              "" if row["flops_per_second"] is None else f"{row['flops_per_second'] / 1e9:,.1f}",
              f"{row['limit'] / 1e9:,.1f} {'GB/s' if row['flops_per_second'] is None else 'GFLOP/s'}", f"{row['share_of_limit']:.1%}")
             for row in rows]
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    lines = ["  ".join(f"{cell:{'<' if i == 0 else '>'}{widths[i]}}" for i, cell in enumerate(line)) for line in (heads, *cells)]
    rates = {row["name"]: row["items_per_second"] for row in rows}
    appetite = rates["input pipeline"] / rates["train step"]
    lines.append(f"appetite: the input pipeline gives {appetite:.1f} examples for each that a train step takes")
    slower = rates["forward pass"] / rates["likelihood evaluation"]
    lines.append(f"a trajectory's evaluation takes {slower:.2f} times as long as a train step's forward pass in batches of that size")
    return "\n".join(lines)
