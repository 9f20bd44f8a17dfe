"""The learned density compared with the true one, where it is known at every noise level.

All log-densities are those of x_0, the data noised to t_0: the bounds of an NTM, the change of
variables of a flow-matching model's ODE, and the estimate of a flow map. A flow-matching model's
ODE therefore starts at t_0, a level that its training covers.

Symbols: B batch.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from ntm_jax import files
from ntm_jax.core import flow_matching, trajectory
from ntm_jax.core.model import full_precision
from ntm_jax.core.trajectory import Schedule
from ntm_jax.core.transformer import precision
from ntm_jax.data import pipeline, transforms
from ntm_jax.data.sources import Source
from ntm_jax.errors import UserError
from ntm_jax.evaluation import importance, scoring
from ntm_jax.evaluation.statistics import mean_and_stderr
from ntm_jax.export.read import load_run
from ntm_jax.progress import track
from ntm_jax.projects.densities import divergence, flow_map, plots
from ntm_jax.runtime import sharding
from ntm_jax.runtime.run import Run
from ntm_jax.training import objectives

SIDE = 64  # points a side of the grid on which densities are drawn and integrated
TRAJECTORIES = 16  # a point
EVALUATIONS = (1, 2, 4, 8, 16, 64)  # of a flow-matching network, for one log-density
VARIANTS = (  # of the ODE's solution: its name, whether by Heun, and with exact divergences
    ("Euler, exact divergence", False, True), ("Euler, Hutchinson", False, False),
    ("Heun, exact divergence", True, True))


def compare_with_true_density(run: Run, source: Source, scored: dict, *_) -> dict:
    """The true mean log-density of the records' x_0, and how far each bound lies from it, in nats.

    source: one with log_density.
    """
    config = run.config
    batches = pipeline.evaluation_batches(source, config.data.patch_size, len(source.records), 0, 1)
    batch, t_min = next(batches), config.trajectory.t_min
    x_0 = scoring.noised(jax.random.key(config.seed), batch["x"],
                         jnp.full(len(batch["x"]), t_min), batch["index"])
    true = _true_log_density(run, source, x_0, t_min)
    return {"log_density": mean_and_stderr(true)} | {
        name: mean_and_stderr(scored[name] - true) for name in scoring.BOUNDS}


def _true_log_density(run: Run, source: Source, tokens, t: float) -> np.ndarray:
    """The true log-density at tokens [n, N, D] of noise level t, [n] float64, in nats."""
    assert source.log_density is not None
    points = transforms.unpatchify(
        np.asarray(tokens, np.float64), run.spec.image_shape, run.config.data.patch_size)
    return source.log_density(points.reshape(len(points), -1), t)


@functools.partial(jax.jit, static_argnames=("schedule", "model", "steps", "level", "trajectories"))
def _log_density(params, root, batch, *, schedule: Schedule, model, steps, level, trajectories):
    points = batch["x"]
    t = schedule.fixed_levels(steps, len(points))[:, level:]
    keys = trajectory.example_keys(root, f"density/{level}", batch["index"])

    def draw(number):
        own = trajectory.draw_keys(keys, number)
        noise = trajectory.example_noise(own, (t.shape[1] - 1, *points.shape[1:]))
        return trajectory.noise_forward(points, t, noise)

    def terms(xs):
        return model.apply(params, xs, t, jnp.full(len(points), steps),
                           jnp.zeros(len(points), jnp.int32))

    return importance.estimate_bounds(terms, draw, t, trajectories)


def log_density(run: Run, points: np.ndarray, level: int, trajectories: int = TRAJECTORIES):
    """The importance-weighted lower bound on the log-density at points of level k < T, in nats.

    points: [n, D] in the data's dimensions -> [n].
    """
    x = np.asarray(points, np.float32).reshape(-1, run.model.config.tokens, run.model.config.dim)
    batch = sharding.place({"x": x, "index": np.arange(len(x), dtype=np.int32)}, run.mesh)
    with sharding.use(run.mesh):
        result = _log_density(
            run.params, jax.random.key(run.config.seed), batch, schedule=run.schedule,
            model=full_precision(run.model), steps=run.config.evaluation_steps, level=level,
            trajectories=trajectories)["importance_weighted"]
    return sharding.to_host(result)[: len(points)]


def picture(run: Run, result: dict, folder) -> None:
    """Draws densities.png: the true and the learned density of planar data at every noisy level.

    result: an evaluation.json. Other data have no picture.
    """
    source = run.config.data.open(result["split"])
    assert source.log_density is not None
    if not source.planar_extent:
        return
    t, extent = run.evaluated_levels()[:-1], source.planar_extent
    side = np.linspace(-extent, extent, SIDE)
    points = np.stack(np.meshgrid(side, side), -1).reshape(-1, 2)
    learned = [np.exp(log_density(run, points, k)) for k in range(len(t))]
    true = [np.exp(source.log_density(points, level)) for level in t]
    if jax.process_index() == 0:
        true, learned = (np.stack(a).reshape(-1, SIDE, SIDE) for a in (true, learned))
        plots.density_picture(true, learned, t, extent, folder / "densities.png")


@dataclasses.dataclass(frozen=True)
class Estimator:
    """Estimates of the log-density at x_0.

    compute(root, x_0 [B, N, D], batch) -> {method: [B] nats}; root keys its noise, and batch has
    index and label. evaluations: {method: evaluations of the network for one estimate}.
    is_bound: whether theory bounds the estimates by the log of a density; others are integrated
    where the data are points of the plane.
    """

    evaluations: dict[str, int]
    compute: Callable
    is_bound: bool = False


def bounds(run: Run, trajectories: int) -> list[Estimator]:
    """The bounds of an NTM, at every number of steps T that it was trained for.

    A trajectory takes T evaluations, each of the predictor and the transporter. The bound averages
    over the trajectories and is reported as one, whose expectation it has.
    """
    def estimator(steps: int) -> Estimator:
        weighted = f"NTM, importance-weighted, {trajectories} trajectories"

        def compute(root, x_0, batch):
            found = _log_density(
                run.params, root, {"x": x_0, "index": batch["index"]}, schedule=run.schedule,
                model=full_precision(run.model), steps=steps, level=0, trajectories=trajectories)
            return {"NTM, bound": found["bound"], weighted: found["importance_weighted"]}

        return Estimator({"NTM, bound": steps, weighted: steps * trajectories}, compute, True)

    return [estimator(steps) for steps in run.config.trajectory.steps]


def _backbone(run: Run) -> Callable:
    """A flow-matching network as divergence.ode_log_density takes it."""
    return functools.partial(
        run.model.backbone.apply, flow_matching.backbone_params(run.params))


def _uniform_levels(run: Run, steps: int, batch: int):
    """Levels [batch, steps + 1] that divide t_0..1 equally, in any number of steps."""
    return dataclasses.replace(run.schedule, schedule="linear").fixed_levels(steps, batch)


def _ode_estimator(run: Run, method: str, evaluations: int, heun: bool,
                   exactly: bool) -> Estimator:
    """The change of variables along the ODE, reported as `method`.

    heun: by Heun's method, otherwise Euler's. exactly: with exact divergences, otherwise
    Hutchinson's estimates.
    """
    def compute(root, x_0, batch):
        probes = None if exactly else divergence.rademacher(
            trajectory.example_keys(root, "evaluate/probes", batch["index"]), 1, x_0.shape[1:])
        t = _uniform_levels(run, evaluations // (2 if heun else 1), len(x_0))
        with precision("highest"):
            return {method: divergence.ode_log_density(
                _backbone(run), x_0, t, run.model.config.condition.stack(batch), heun, probes)}

    return Estimator({method: evaluations}, compute)


def solutions(run: Run) -> list[Estimator]:
    """The change of variables along a flow-matching model's ODE, by solver and divergence.

    Exact divergences take further Jacobian-vector products, one for each dimension, and
    Hutchinson's estimate one; they are not counted as evaluations.
    """
    return [_ode_estimator(run, f"flow matching, {name}", count, heun, exactly)
            for name, heun, exactly in VARIANTS
            for count in EVALUATIONS if count > 1 or not heun]


def flow_map_estimates(run: Run) -> list[Estimator]:
    """F2D2's estimate, and as a reference the ODE of the same network's velocity by Heun."""
    def estimator(evaluations: int) -> Estimator:
        def compute(root, x_0, batch):
            with precision("highest"):
                return {"F2D2": flow_map.log_density(
                    run.model.backbone, flow_matching.backbone_params(run.params), x_0,
                    _uniform_levels(run, evaluations, len(x_0)),
                    run.model.config.condition.stack(batch))}

        return Estimator({"F2D2": evaluations}, compute)

    reference = _ode_estimator(run, "F2D2's own velocity, Heun, exact divergence",
                               EVALUATIONS[-1], heun=True, exactly=True)
    return [estimator(count) for count in EVALUATIONS] + [reference]


def estimators(run: Run, trains: str, trajectories: int) -> list[Estimator]:
    """The estimators of a run's log-density; trains: see training.objectives.Objective."""
    if trains != "velocity":
        return bounds(run, trajectories)
    flow = run.config.model.backbone == "flow_map"
    return flow_map_estimates(run) if flow else solutions(run)


def signed_errors(run: Run, source: Source, estimators: list[Estimator]) -> list[dict]:
    """A row for each estimate: its mean error in nats, above 0 where it is above the truth.

    Each row has method, evaluations and error (mean, stderr), and for planar data mass, the
    integral of the estimate's exponential over the plane, which is 1 for a density.
    """
    assert source.log_density is not None
    t_min, rows = run.config.trajectory.t_min, []
    for estimator in track(estimators, f"estimates of {run.workdir}", "done"):
        @jax.jit
        def compute(root, batch, estimator=estimator):
            x_0 = scoring.noised(root, batch["x"], jnp.full(len(batch["x"]), t_min), batch["index"])
            return {"x_0": x_0} | estimator.compute(root, x_0, batch)

        found = scoring.per_record(run, source, compute)
        true = _true_log_density(run, source, found["x_0"], t_min)
        masses = {} if estimator.is_bound or not source.planar_extent else _masses(
            run, source.planar_extent, estimator)
        rows += [{"method": method, "evaluations": count,
                  "error": mean_and_stderr(found[method].astype(np.float64) - true)}
                 | ({"mass": masses[method]} if masses else {})
                 for method, count in estimator.evaluations.items()]
    return rows


def _masses(run: Run, extent: float, estimator: Estimator) -> dict[str, float]:
    """The integrals of exp(estimate) over the square [-extent, extent]^2 at level t_0."""
    side, step = np.linspace(-extent, extent, SIDE, retstep=True)
    x = np.stack(np.meshgrid(side, side), -1).reshape(-1, 2).astype(np.float32)
    shape = len(x), run.model.config.tokens, run.model.config.dim
    batch = {"index": np.arange(len(x), dtype=np.int32), "label": np.zeros(len(x), np.int32)}
    placed = sharding.place(batch | {"x": x.reshape(shape)}, run.mesh)
    with sharding.use(run.mesh):
        found = jax.jit(lambda root, batch: estimator.compute(root, batch["x"], batch))(
            jax.random.key(run.config.seed), placed)
    # `place` repeats points where the devices do not divide them.
    return {name: float(step**2 * np.exp(values[: len(x)].astype(np.float64)).sum())
            for name, values in sharding.to_host(found).items()}


def benchmark(runs: list[tuple[Run, list[Estimator]]], split: str) -> dict:
    """The content of truth.json: the signed errors of several runs' estimates.

    Raises UserError where the runs' density is unknown or is not the same.
    """
    first = runs[0][0].config
    for run, _ in runs:
        config = run.config
        if (config.data.source, config.trajectory.t_min) != (
                first.data.source, first.trajectory.t_min):
            raise UserError(f"{run.workdir} has data.source={config.data.source} and "
                            f"trajectory.t_min={config.trajectory.t_min}, and {runs[0][0].workdir} "
                            f"{first.data.source} and {first.trajectory.t_min}: their errors do "
                            "not compare; give runs of one density at one noise level")
    source = first.data.open(split)
    if source.log_density is None:
        raise UserError(f"the density of data.source={first.data.source} is not known: expected "
                        "runs of toy:NAME")
    return {"source": first.data.source, "split": split, "count": len(source.records),
            "t_min": first.trajectory.t_min,
            "runs": [{"workdir": run.workdir, "step": run.step,
                      "rows": signed_errors(run, source, estimators)} for run, estimators in runs]}


def write_benchmark(result: dict, out: str) -> None:
    """Writes truth.json and truth.png in the folder `out`, and prints the table."""
    folder = epath.Path(files.expanded(out))
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(folder / "truth.json", result)
    plots.truth_plot(result, folder / "truth.png")
    print("evaluations  error in nats (above 0: too high)  mass   method")
    for run in result["runs"]:
        for row in run["rows"]:
            error, mass = row["error"], f"{row['mass']:.3f}" if "mass" in row else "-"
            shown = f"{error['mean']:+.4f} ± {error['stderr']:.4f}"
            print(f"{row['evaluations']:>11}  {shown:>33}  {mass:>6}  {row['method']}")


def compare_with_truth(workdirs: Sequence[str], out: str, split: str | None = None,
                       trajectories: int = 32) -> dict:
    """Compares runs of one known density with it, and writes truth.json and truth.png to `out`.

    split: the first run's by default. trajectories: for each record, of an NTM's bounds. Returns
    the content of truth.json. Raises UserError where the runs do not compare.
    """
    runs = [load_run(workdir, None, False) for workdir in workdirs]
    result = benchmark([(run, estimators(run, objectives.find(run.config.train.objective).trains,
                                         trajectories)) for run in runs],
                       split or runs[0].config.evaluate.split)
    write_benchmark(result, out)
    return result
