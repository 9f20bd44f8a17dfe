"""The training loop: evaluate, save, next batch, step. A resumed run continues bit for bit."""

import contextlib
import math
import signal
import time

import jax
import numpy as np
from etils import epath

from ntm_jax.core import trajectory
from ntm_jax.data import pipeline
from ntm_jax.errors import UserError
from ntm_jax.runtime import (
    attention,
    distill,
    evaluate,
    finetune,
    flops,
    generate,
    load,
    objective,
    optimizer,
    plots,
    processes,
    sharding,
    state,
)
from ntm_jax.runtime import config as configuration
from ntm_jax.runtime import profile as profiling
from ntm_jax.runtime import workdir as workdir_
from ntm_jax.runtime.checkpoint import Checkpoints
from ntm_jax.runtime.config import Config
from ntm_jax.runtime.metrics import Writer

DIVERGED = ("To go on from it, give the same command with a lower --config.optimizer.learning_rate or --config.optimizer.clip; if it stops "
            "again at once, first remove the latest folder in WORKDIR/checkpoints, to go on from the one before; to change "
            "config.trajectory.t_min_range, start a new run with another --workdir and --config.init_from=WORKDIR")


def check(metrics: dict, step: int) -> dict:
    """A step's metrics on the host, as scalars to log; UserError if one is not finite, naming the step, the level and the term."""
    scalars = {name: float(metrics[name]) for name in ("loss", "grad_norm")}
    terms = [name for name in ("log_det", "log_scale", "quadratic", "misalignment") if name in metrics]  # a denoiser has none
    if not (metrics["finite"] and all(map(math.isfinite, scalars.values()))):
        bad = [f"{term} at level {k}" for term in terms for k, v in enumerate(metrics[term]) if not np.isfinite(v)]
        first = bad[0] if bad else "the gradient or the update, every term being finite,"
        raise UserError(f"step {step}: {first} is not a finite number, so the run stopped; the last checkpoint is untouched. {DIVERGED}")
    if not terms:
        return scalars
    nll = metrics["quadratic"] + metrics["log_scale"] - metrics["log_det"] + trajectory.LOG_2PI / 2
    apart = {f"misalignment/level_{k}": float(v) for k, v in enumerate(metrics.get("misalignment", ()))}
    return scalars | {f"nll/level_{k}": float(v) for k, v in enumerate(nll)} | apart


class _Stop:
    """Whether SIGTERM or Ctrl-C asked the run to stop; a second one is not caught."""

    def __init__(self):
        self.asked = False
        self._before = {}

    def __enter__(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError):  # not the main thread: the caller keeps its signals
                self._before[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, *_):
        self.asked = True
        self.__exit__()

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)


class _Trace:
    """Writes a profiler's trace of the steps from `span[0]` to `span[1]` in a folder, and says where their time went."""

    def __init__(self, folder, span, say):
        self._folder, self._span, self._say, self._on = folder, span, say, False

    def at(self, step, pending, ending, texts):
        """Called before a step, with what the last one returned, which is waited for where the trace begins or ends.

        texts(first, step): the compiled texts of the steps from first to step.
        """
        if self._span is None:
            return
        inside = self._span[0] <= step < self._span[1] and not ending
        if inside != self._on:
            jax.block_until_ready(pending)
            if inside:
                jax.profiler.start_trace(str(self._folder))
                self._first = step
            else:
                jax.profiler.stop_trace()
                self._report(step, texts)
            self._on = inside

    def _report(self, step, texts):
        if jax.process_index():
            return
        try:
            self._say(f"steps {self._first}:{step}, traced in {self._folder}: " +
                      profiling.report(self._folder, texts(self._first, step)))
        except Exception as error:  # whatever a trace holds, the run goes on
            self._say(f"the trace in {self._folder} could not be read, and there is no summary of it: "
                      f"{(str(error).splitlines() or [''])[0][:200] or type(error).__name__}")


def check_batch(config: Config, mesh) -> None:
    """UserError if the batch does not divide over the mesh's examples and config.train.accumulate."""
    size, shards, parts = config.data.batch_size, sharding.batch_shards(mesh), config.train.accumulate
    if size % (shards * parts):
        raise UserError(f"config.data.batch_size is {size}: expected a multiple of {shards * parts}, data x fsdp = {shards} times "
                        f"config.train.accumulate = {parts}")


def train(config: Config, workdir: str, progress: bool = True, until: int | None = None,
          profile: tuple[int, int] | None = None) -> dict | None:
    """Trains in workdir, resuming what it holds, and ends with the held-out evaluation and pictures; returns the evaluation.

    until: stops there as a preemption would, saving; the schedule stays that of config.train.steps. Returns None when stopped early.
    profile: (start, stop), steps of which a trace and its summary are written in workdir/profile.
    """
    workdir_.check(workdir)
    mesh = sharding.make_mesh(config.mesh)
    check_batch(config, mesh)
    source = config.data.open(config.data.split)
    held_out = config.data.open(config.evaluate.split)
    spec = pipeline.spec(source, config.data.patch_size)
    model, teacher = state.make_model(config, spec, attention.choose(mesh)), None
    if config.teacher:
        kept = distill.frozen(workdir)
        teacher = load.load(f"{workdir}/frozen" if kept else config.teacher)
        distill.check_teacher(config, spec, teacher)
        model = distill.make_denoiser(model)
    processes.agree(configuration.flatten(config.raw) | {"--workdir": workdir})
    state.check_memory(state.abstract(config, model, mesh), mesh)
    configuration.claim(workdir, config, spec)  # refuses before the folder is touched
    total = config.train.steps
    with workdir_.owned(workdir):
        with contextlib.ExitStack() as stack:
            changes = configuration.claim(workdir, config, spec)  # what another owner has left
            checkpoints = stack.enter_context(
                Checkpoints(workdir, keep_every=config.train.keep, settings=configuration.fixed(config, spec)))
            latest = checkpoints.latest()
            if latest is None:
                current = state.initialize(config, model, mesh)
                if config.init_from:
                    current = finetune.start_from(config, spec, model, mesh, current)
                start, data_state = 0, None
            else:
                start, current, data_state = checkpoints.restore(state.abstract(config, model, mesh))
            if start > total:
                raise UserError(f"{workdir} holds step {start}, beyond config.train.steps = {total}: raise it to go on, or evaluate that "
                                "run")
            batches = pipeline.train_iterator(source, config.data.patch_size, config.data.batch_size, config.seed, config.data.workers,
                                              *sharding.share(mesh))
            stack.callback(batches.close)
            if data_state is not None:
                batches.set_state(data_state)
            if jax.process_index() == 0:
                configuration.write(workdir, config, spec)
            if teacher and not kept:
                distill.freeze(teacher, workdir)
            frozen = teacher.params if teacher else None
            if config.train.align_weight:
                frozen = finetune.frozen(config, model, mesh, workdir, current)
            writer = stack.enter_context(Writer(workdir, total, start, quiet=jax.process_index() > 0 or not progress))
            parameters = sum(a.size for a in jax.tree.leaves(current.params))
            writer.message(f"{parameters:,} parameters, {len(source.records):,} training records, mesh " +
                           " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items()) +
                           (f", resuming {workdir} at step {start}" if latest is not None else f", in {workdir}") +
                           (f", starting from {config.init_from}" if latest is None and config.init_from else ""))
            for change in changes:
                writer.message(change)
            stop = _Stop() if processes.several() else stack.enter_context(_Stop())  # of several, jax catches SIGTERM and tells the others
            current, done = _loop(config, model, mesh, current, start, batches, held_out, checkpoints, writer, stop, until,
                                  _Trace(epath.Path(workdir) / "profile", profile, writer.message), teacher, frozen)
            processes.restore_interrupts()
            if not done:
                return None
            writer.message(f"trained to step {total}; evaluating")
        run = load.Run(config, spec, model, current.ema, total, mesh, workdir)
        if teacher:
            run = load.with_denoiser(teacher, run)
        finish(run)
        features = "none" if config.evaluate.features == "inception" else None  # its weights are launch/evaluate.py's to be told
        result, scored = evaluate.evaluate(run, features=features, progress=progress)
        evaluate.report(run, result, scored, epath.Path(workdir) / "evaluation.json")
    return result


def _loop(config, model, mesh, current, start, batches, held_out, checkpoints, writer, stop, until, trace, teacher, frozen):
    """Steps from `start` in the order evaluate, save, next batch, step; returns the state and whether it reached the end."""
    total, every = config.train.steps, config.train.evaluate_every
    step_function, rate = objective.make_step(config, model, mesh, teacher), optimizer.schedule(config.optimizer, total)
    pending, clock = None, (time.perf_counter(), start)
    places, unread = {}, None  # of several processes: the data's position before each of the last steps, and why this one has no batch
    work = limit = 0  # FLOPs of a step, and this machine's a second: known from the first batch on, where a terminal shows them

    def read(step) -> dict:
        """The metrics of the step that ended at `step`, checked; they are waited for, so the next step is under way where speed counts."""
        nonlocal pending, clock
        values, pending = jax.device_get(pending), None
        if not values.pop("whole", True):  # all see it here, at the same step, and the state is still that of step - 1
            checkpoints.save(step - 1, current, places[step - 1])
            raise unread or UserError(f"another process of this job could not read a record (see its line); step {step - 1} is saved, and "
                                      "the same command resumes there when the data are mended")
        scalars = check(values, step)
        if step % config.train.log_every:
            return {}
        now = time.perf_counter()
        speed, clock = (step - clock[1]) / (now - clock[0]), (now, step)
        memory = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")  # a CPU tells none
        return scalars | {"learning_rate": float(rate(step - 1)), "examples_per_second": speed * config.data.batch_size} | (
            {"device_memory_gib": memory / 2**30} if memory else {}) | (
            {"flops_per_second": speed * work, "flop_share": speed * work / limit} if work else {})

    def texts(first, end) -> list[str]:
        """The compiled texts of the steps first to end, which were run: nothing is compiled anew."""
        with sharding.use(mesh):
            return [step_function.lower(current, batch, steps, frozen, whole).compile().as_text()
                    for steps in sorted({objective.steps_of(config, step) for step in range(first, end)})]

    for step in range(start, total + 1):
        ending = step == total or step == until or stop.asked or processes.stop_agreed(step)
        evaluating = bool(every) and (step % every == 0 or step == total)
        if step > start and (ending or evaluating or step % config.train.save_every == 0):
            scalars, bound = read(step), None  # what is saved is known to be finite
            if evaluating:
                figures, bound = _evaluate(config, model, current.ema, held_out, mesh, step, writer, teacher)
                scalars |= figures
            if scalars:
                writer.write(step, scalars)
            if ending or step % config.train.save_every == 0:
                checkpoints.save(step, current, batches.get_state(), bound)
        trace.at(step, pending, ending, texts)
        if ending:
            break
        places = {step - 1: places.get(step - 1), step: batches.get_state()}
        try:
            local = next(batches)
        except UserError as error:
            if step == start:
                raise
            if not processes.several():
                if pending:
                    read(step)
                checkpoints.save(step, current, places[step])
                raise
            unread = error  # a save needs all processes, and the others read on: they are told by a step that changes nothing
        batch, whole = sharding.to_global(local, mesh), sharding.told(unread is None, mesh) if processes.several() else None
        if step == start and writer.shows:
            work = objective.flops_of_step(config, model, step_function, current, batch, mesh, teacher, frozen)
            limit = flops.products(config.model.dtype, mesh, 0.1)()
        with sharding.use(mesh):
            current, metrics = step_function(current, batch, objective.steps_of(config, step), frozen, whole)
        if pending:
            scalars = read(step)
            if scalars:
                writer.write(step, scalars)
        pending = metrics
        writer.advance(step + 1)
    if step < total:
        writer.message(f"stopped at step {step}, saved; the same command resumes")
    return current, step == total


def _evaluate(config, model, ema, held_out, mesh, step, writer, teacher) -> tuple[dict, dict]:
    """The held-out bound on the way, one trajectory a record: scalars to log, and the figure that the best checkpoint is chosen by."""
    if teacher:
        error = evaluate.denoiser_errors(load.with_denoiser(teacher, load.Run(config, teacher.spec, model, ema, step, mesh, "")), held_out)
        writer.message(f"step {step}: held-out error to the target {error['to_target']['mean']:.6f} ± {error['to_target']['stderr']:.6f}")
        return {"evaluate/mse": error["to_target"]["mean"]}, {"bound": error["to_target"]["mean"]}
    if config.train.objective == "flow_matching":
        error = evaluate.velocity_errors(config, model, ema, held_out, mesh, config.evaluate.trajectories)
        writer.message(f"step {step}: held-out error of the velocity {error['mean']:.5f} ± {error['stderr']:.5f}")
        return {"evaluate/velocity_error": error["mean"]}, {"bound": error["mean"]}
    table = evaluate.scores(config, model, ema, held_out, mesh, trajectories=1)
    result = evaluate.summarize(table, model, 1, held_out.levels)
    unit = "bits_per_dim" if held_out.levels else "nats_per_dim"
    bound = result[unit]["bound"]
    writer.message(f"step {step}: held-out bound {bound['mean']:.4f} ± {bound['stderr']:.4f} {unit.replace('_per_', '/')}")
    by_level = {f"evaluate/nll/level_{k}": v for k, v in enumerate(result["trajectory_nll"]["by_level"])}
    return {f"evaluate/{unit}": bound["mean"]} | by_level, {"bound": bound["mean"]}


def finish(run: load.Run) -> None:
    """The run's pictures: samples, denoising trajectories, the loss curve."""
    folder, config, spec = epath.Path(run.workdir), run.config, run.spec
    points = not spec.levels and spec.image_shape == (1, 2, 1)  # of the plane: the more the better to see
    first, *rest = generate.in_batches(config.sample.num, 500 if points else 100)
    clean, levels = run.sample_at(first, trajectory=True)  # of these images both pictures: one program to compile
    images = np.concatenate([clean, *(run.sample_at(index) for index in rest)])
    clean, levels = (a[: 500 if points else 10] for a in (clean, levels))
    t = state.sampled_levels(config, run.model)[::-1]
    some = np.unique(np.linspace(0, len(t) - 1, 17).round().astype(int))
    t, pictures = t[some], levels[:, some]
    if t[-1]:  # an ODE ends in the clean image
        t, pictures = np.append(t, 0.0), np.concatenate([pictures, clean[:, None]], 1)
    if jax.process_index():
        return
    squares = run.denoiser or config.train.objective == "flow_matching"
    plots.loss_plot(folder / "metrics.jsonl", folder / "loss.png", *(["training loss (mean squared error)"] if squares else []))
    if points:
        plots.points_picture(images.reshape(-1, 1, 2), [0.0], folder / "samples.png")
        plots.points_picture(pictures.reshape(*pictures.shape[:2], 2), t, folder / "trajectories.png")
    else:
        plots.save_png(folder / "samples.png", generate.picture(images, spec.levels))
        plots.trajectory_picture(generate.displayable(pictures, spec.levels), t, folder / "trajectories.png")
