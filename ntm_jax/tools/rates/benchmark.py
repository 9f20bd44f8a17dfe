"""Measures the speed of a run's parts, each beside the limit of this machine.

The parts are the training step, the input pipeline, the held-out likelihood, and the sampler with
its parts; rows.py has one function for each.
"""

import ast
import copy
import math
import statistics
from collections.abc import Callable, Iterator

import jax
import numpy as np

from ntm_jax.data import pipeline
from ntm_jax.errors import UserError
from ntm_jax.runtime import config_file, flops, sharding
from ntm_jax.runtime.config import Config
from ntm_jax.runtime.run import Run, untrained
from ntm_jax.tools.rates.rows import SAMPLING, TRAINING, BenchmarkInput, Case
from ntm_jax.training import objectives

SECONDS = 0.5  # the shortest timed run
COPIED = 1 << 27  # bytes, more than a cache holds


def benchmark(config: Config, runs: int, batch: int | None = None, only: str = "") -> list[dict]:
    """The rows of a configuration, in the order of TRAINING and SAMPLING.

    A row has name, items_per_second (the median of the runs), flops_per_second (the model's FLOPs,
    without recomputation; None if memory bandwidth is the limit), limit (FLOP/s or bytes/s),
    share_of_limit, and runs (each run's items/s). An inverse's row also has tokens and
    round_trip_error, and the parallel one's sweeps, {tolerance: mean by level, clean to noisy}.

    runs: how often each row is timed. batch: images sampled at a time, config.sample.num by
    default. only: selects the rows whose name contains this. Raises UserError if there is none.
    """
    return _rows(TRAINING | SAMPLING, _untrained(config, batch), runs, only)


def _untrained(config: Config, batch: int | None = None) -> BenchmarkInput:
    """An untrained run of a configuration, with its data."""
    objective = objectives.find(config.train.objective)
    if {"teacher", "reference"} & set(objective.needs):
        raise UserError(f"config.train.objective={config.train.objective} needs a trained run: "
                        "give --workdir of the run in place of --config")
    objectives.checked(config)
    source, held_out = map(config.data.open, (config.data.split, config.evaluate.split))
    spec = pipeline.spec(source, config.data.patch_size)
    run = untrained(config, spec, sharding.make_mesh(config.mesh))
    return BenchmarkInput(run, batch or max(config.sample.num, 1), source, held_out)


def benchmark_run(run: Run, runs: int, batch: int | None = None, only: str = "") -> list[dict]:
    """The rows of SAMPLING for a trained run; arguments as in benchmark."""
    return _rows(SAMPLING, BenchmarkInput(run, batch or max(run.config.sample.num, 1)), runs, only)


def _rows(makers: dict[str, Callable], given: BenchmarkInput, runs: int, only: str) -> list[dict]:
    rows = [{"name": name} | measure(case, runs, given)
            for name, make in makers.items() if only in name and (case := make(given))]
    if not rows:
        raise UserError(f"--rows={only} is in no row's name: leave it out to see them all")
    return rows


def vary(values: dict, choices: str, runs: int) -> list[dict]:
    """The rows of the train step of an experiment at several values of its settings.

    values: the settings by section. choices: "section.key:value,value,...", or several settings
    with commas between them, which take the same value. A row has those of `benchmark`, and
    milliseconds a step, compile_seconds, of tracing and compilation, and value.
    """
    rows = []
    for name, text, config in list(varied(values, choices)):  # all values are read first
        given = _untrained(config)
        case = TRAINING["train step"](given)
        jax.clear_caches()  # its FLOPs may have been counted on a trace of this very step
        first = flops.seconds(case.once, 1)
        row: dict = {"name": name} | measure(case, runs, given)
        seconds = case.items / row["items_per_second"]
        rows.append(row | {"milliseconds": 1e3 * seconds, "compile_seconds": first - seconds,
                           "value": text})
    return rows


def varied(values: dict, choices: str) -> Iterator[tuple[str, str, Config]]:
    """(settings=value, value, configuration) for each value; see `vary`. Raises UserError."""
    names, _, texts = choices.partition(":")
    for text in texts.split(","):
        changed = copy.deepcopy(values)
        for name in names.split(","):
            _change(changed, name, text)
        yield f"{names}={text}", text, config_file.complete(changed)


def _change(values: dict, name: str, text: str) -> None:
    """Sets section.key to the value that a text means; a tuple's to a tuple of it alone."""
    section, _, key = name.partition(".")
    settings = values.get(section)
    if not isinstance(settings, dict) or key not in settings:
        raise UserError(f"--vary names {name}, which is no setting of a section: expected "
                        "SETTING:VALUE,VALUE, such as model.predictor_layers:3,6,12")
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        value = text
    settings[key] = (value,) if isinstance(settings[key], tuple) else value


def growth(rows: list[dict]) -> str:
    """The text of the rows of `vary`."""
    lines = [("", "ms/step", "GFLOP/s", "limit", "share", "compile s")]
    for row in rows:
        rate, limit = (f"{row[key] / 1e9:,.1f}" for key in ("flops_per_second", "limit"))
        lines.append((row["name"], f"{row['milliseconds']:,.1f}", rate, limit,
                      f"{row['share_of_limit']:.1%}", f"{row['compile_seconds']:.1f}"))
    return aligned(lines)


def measure(case: Case, runs: int, given: BenchmarkInput) -> dict:
    """Times a case: its row without the name; see benchmark.

    The limit is the median of measurements before and after every run, so that other work on the
    machine affects both alike.
    """
    copies = case.flops is None
    limit = copying() if copies else flops.matmul_rate_probe(
        given.run.config.model.dtype, given.run.mesh, SECONDS)
    try:
        jax.block_until_ready(case.once())  # compiles
        count, limits = case.least, [limit()]
        while (seconds := flops.seconds(case.once, count)) < SECONDS:
            count = min(10 * count, math.ceil(1.2 * count * SECONDS / seconds))
        limits.append(limit())
        # The last of these is the first run, except for a queue, which has filled meanwhile.
        rates = [] if copies else [count * case.items / seconds]
        while len(rates) < runs:
            if copies:
                flops.seconds(case.once, case.least)  # empties the queue
            rates.append(count * case.items / flops.seconds(case.once, count))
            limits.append(limit())
    finally:
        case.close()
    items, limit = statistics.median(rates), statistics.median(limits)
    reached = items / case.items * (case.bytes if case.flops is None else case.flops)
    return {"items_per_second": items, "flops_per_second": None if copies else reached,
            "limit": limit, "share_of_limit": reached / limit, "runs": rates} | case.facts


def copying() -> Callable[[], float]:
    """A function that measures the bytes/s that one thread of this host copies in memory."""
    source = np.ones(COPIED, np.uint8)
    target = np.empty_like(source)
    return lambda: COPIED / min(
        flops.seconds(lambda: np.copyto(target, source), 1) for _ in range(5))


def table(rows: list[dict]) -> str:
    """The text of the rows, and the sweeps of the parallel inverse."""
    heads = ("", "items/s", "lowest", "highest", "GFLOP/s", "limit", "share")
    lines = [aligned([heads, *map(_cells, rows)])]
    for row in rows:
        for tolerance, sweeps in row.get("sweeps", {}).items():
            lines.append(
                f"mean sweeps of the parallel inverse over {row['tokens']} tokens to {tolerance}, "
                "clean to noisy: " + ", ".join(f"{v:.1f}" for v in sweeps))
    return "\n".join(lines)


def aligned(cells: list[tuple[str, ...]], names: int = 1) -> str:
    """Lines of columns, the first ones, of names, to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:{'<' if i < names else '>'}{widths[i]}}"
                  for i, cell in enumerate(line)).rstrip()
        for line in cells)


def _cells(row: dict) -> tuple[str, ...]:
    rates = row["items_per_second"], min(row["runs"]), max(row["runs"])
    copies = row["flops_per_second"] is None
    return (row["name"], *(f"{v:,.{1 if v >= 10 else 3}f}" for v in rates),
            "" if copies else f"{row['flops_per_second'] / 1e9:,.1f}",
            f"{row['limit'] / 1e9:,.1f} {'GB/s' if copies else 'GFLOP/s'}",
            f"{row['share_of_limit']:.1%}")
