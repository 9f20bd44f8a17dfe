"""The training loop: evaluate, save, next batch, step. A resumed run continues bit for bit."""

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from ntm_jax import files
from ntm_jax.data import pipeline
from ntm_jax.data.sources import Source
from ntm_jax.errors import UserError
from ntm_jax.evaluation.evaluate import EvaluationOptions, evaluate
from ntm_jax.evaluation.report import write_report
from ntm_jax.runtime import config as configuration
from ntm_jax.runtime import config_file, flops, sharding
from ntm_jax.runtime.checkpoint import Checkpoints, saved_settings
from ntm_jax.runtime.config import Config
from ntm_jax.runtime.processes import locked, require_same_everywhere
from ntm_jax.runtime.run import Run, untrained, with_denoiser
from ntm_jax.training import finetune, frozen, objectives, pictures, state
from ntm_jax.training.metrics import MetricsReporter
from ntm_jax.training.reward.rollouts import Rollouts, Samples, abstract_samples
from ntm_jax.training.signals import StopRequest
from ntm_jax.training.state import State
from ntm_jax.training.step import (
    check_batch,
    compile_and_check_memory,
    flops_of_step,
    logged_scalars,
    make_step,
    steps_of,
)
from ntm_jax.training.writers import MetricsWriter
from ntm_jax.training.writers import find as find_writers

LONG_HOURS = 8  # from which a run on a CPU is pointed out


def train(config: Config, folder: str, *, progress: bool = True, until: int | None = None,
          tracer=None, writers: Sequence[str] = ()) -> tuple[Run, dict] | None:
    """Trains in a workdir, resuming what it holds; ends with the held-out evaluation and pictures.

    until: stops there as a preemption would, saving; the schedule stays that of config.train.steps.
    tracer: analysis.profile.Trace, or nothing. writers: further writers of metrics, by name; see
    training/writers.

    Returns the trained run and its evaluation, or None when stopped early.
    """
    folder = files.expanded(folder)
    require_same_everywhere(configuration.flatten(config.raw) | {"--workdir": folder})
    options = _Options(progress, until, tracer, find_writers(writers))
    mesh = sharding.make_mesh(config.mesh)
    objective = objectives.checked(config)
    check_batch(config, mesh)
    source = config.data.open(config.data.split, "config.data.split")
    held_out = config.data.open(config.evaluate.split, "config.evaluate.split")
    spec = pipeline.spec(source, config.data.patch_size)
    count, batch = len(source.records), config.data.batch_size
    if batch > count and saved_settings(folder) is None:
        raise UserError(f"config.data.batch_size is {batch}, and {source.name} has {count} records "
                        "to train on: expected at most that many")
    run = untrained(config, spec, mesh, folder)
    teacher = frozen.load_teacher(run) if objective.needs_teacher else None
    state.check_state_fits(run)
    config_file.claim(folder, config, spec)  # refuses before anything is written
    use = objective.rollout_use
    rollouts = Rollouts(run, source, use) if use else None  # may train and keep a classifier
    with locked(folder):
        with contextlib.ExitStack() as stack:
            if rollouts:
                stack.callback(rollouts.close)
            loop = _start(run, teacher, source, held_out, rollouts, options, stack)
            if not loop.train():
                return None
            drawn = [*loop.draw(config.train.steps), *loop.drawn_change()]
            loop.writer.message(f"trained to step {config.train.steps}; evaluating")
        run = loop.evaluated(config.train.steps)
        # Inception's weights are a flag of launch/evaluate.py alone.
        features = "none" if config.evaluate.features == "inception" else None
        result, scored = evaluate(run, EvaluationOptions(features=features),
                                  measure=objective.measure, progress=progress)
        write_report(run, result, scored, epath.Path(folder) / "evaluation.json", brief=True)
        if jax.process_index() == 0:
            print(f"pictures: {', '.join(drawn)}", flush=True)
    return run, result


@dataclasses.dataclass(frozen=True)
class _Options:
    """The options of `train`, with the writers themselves."""

    progress: bool
    until: int | None
    tracer: Any
    writers: Sequence[MetricsWriter]


def _start(run: Run, teacher: Run | None, source: Source, held_out: Source,
           rollouts: Rollouts | None, options: _Options, stack: contextlib.ExitStack) -> "_Loop":
    """The loop of a new or a resumed run; `stack` closes what it holds open."""
    config, folder, total = run.config, run.workdir, run.config.train.steps
    changes = config_file.claim(folder, config, run.spec)  # what another owner has left
    checkpoints = stack.enter_context(Checkpoints(
        folder, keep_every=config.train.keep, settings=config_file.fixed(config, run.spec)))
    latest = checkpoints.latest()
    if latest is None:
        current = state.initialize(run)
        if config.init_from:
            current = finetune.start_from(run, current)
        start, data_state = 0, None
    else:
        expected = state.abstract(run)
        names = checkpoints.entries(latest, "samples") if rollouts else ()
        if names:
            expected = state.with_samples(expected, abstract_samples(run, names))
        start, current, data_state = checkpoints.restore(expected)
    if start > total:
        raise UserError(f"{folder} holds step {start}, beyond config.train.steps = {total}: raise "
                        "it to go on, or evaluate that run")
    batches = pipeline.train_iterator(
        source, config.data.patch_size, config.data.batch_size, config.seed, config.data.workers,
        *sharding.share(run.mesh))
    stack.callback(batches.close)
    if data_state is not None:
        batches.set_state(data_state)
    if jax.process_index() == 0:
        config_file.write(folder, config, run.spec)
    reference = frozen.prepare(run, current, teacher, rollouts is not None, latest is None)
    if rollouts:
        rollouts.reference = reference
    quiet = jax.process_index() > 0 or not options.progress
    writer = stack.enter_context(MetricsReporter(
        folder, total, start, quiet, options.writers, configuration.flatten(config.raw)))
    size = sum(a.size for a in jax.tree.leaves(current.params))
    mesh = " x ".join(f"{axis} {size}" for axis, size in run.mesh.shape.items())
    new = f"in {folder}" + (f", starting from {config.init_from}" if config.init_from else "")
    writer.message(f"{size:,} parameters, {len(source.records):,} training records, mesh {mesh}, "
                   + (new if latest is None else f"resuming {folder} at step {start}"))
    for line in (source.skipped, *changes):
        if line:
            writer.message(line)
    stop = stack.enter_context(StopRequest())
    restored = None
    if isinstance(current, state.StateWithSamples):
        restored, current = current.samples, current.without_samples()
    return _Loop(
        run=run, current=current, start=start, restored=restored, batches=batches, source=source,
        held_out=held_out, checkpoints=checkpoints, writer=writer, stop=stop, teacher=teacher,
        reference=reference, rollouts=rollouts, until=options.until, tracer=options.tracer)


@dataclasses.dataclass
class _Batch:
    """The global batch of a step, and what a save before that step needs.

    arrays: with those of scored samples in post-training.
    position: the data iterator's state before the batch.
    complete: in a job of several processes, whether each has its share (sharding.flag_by_process);
      a step on an incomplete batch changes nothing. None in a job of one process.
    unscored: the samples of post-training until they are scored.
    scalars: of the samples, to log.
    """

    arrays: dict
    position: dict
    complete: Any
    unscored: Samples | None = None
    scalars: dict = dataclasses.field(default_factory=dict)

    def is_complete(self) -> bool:
        """Whether every process has its share. All processes must call it together."""
        return self.complete is None or bool(sharding.to_host(self.complete).all())


def _is_logged(config: Config, step: int) -> bool:
    """Whether a line of metrics is written in the cycle of updates that begins at a step."""
    every = config.train.log_every
    return (step + config.reward.updates) // every > step // every


@dataclasses.dataclass
class _Loop:
    """Training in progress."""

    run: Run
    current: State
    start: int
    restored: dict | None  # the saved samples of the first batch
    batches: pipeline.TrainIterator
    source: Source
    held_out: Source
    checkpoints: Checkpoints
    writer: MetricsReporter
    stop: StopRequest
    teacher: Run | None
    reference: dict | None
    rollouts: Rollouts | None
    until: int | None
    tracer: Any

    def __post_init__(self):
        config = self.run.config
        self.objective = objectives.find(config.train.objective)
        self.step_function = make_step(self.run, self.teacher)
        self.cycle = config.reward.updates if self.rollouts else 1  # steps on the same batch
        self.batch: Any = None  # of the present step
        self.next: _Batch | None = None  # of the next cycle, if config.reward.ahead
        self.pending: Any = None  # of the last step, read after the next is dispatched
        self.clock = time.perf_counter(), self.start
        self.stopping = False  # at the next step that ends a cycle
        self.warned = False  # that the run takes long
        self.saved = time.perf_counter()  # when the run was last saved
        # In a job of several processes, the error with which this one could not read its share of
        # the last batch; None where it could.
        self.unread = None
        self.step_flops = 0  # of the largest T; 0 where they are not logged
        self.peak_flops = 0  # this machine's FLOP/s, measured
        self.pictures = None, []  # the step at which they were drawn, and their paths

    def train(self) -> bool:
        """Takes the steps from `start`, in the order evaluate, save, next batch, step.

        Returns whether the run reached its last step.
        """
        total = self.run.config.train.steps
        last = total if self.until is None else min(total, self.until)
        for step in range(self.start, total + 1):
            # The processes agree on one step, at which they must ask; the cycle may end later.
            self.stopping = self.stopping or step >= last or self.stop.agreed(step)
            ending = self.stopping and step % self.cycle == 0
            if step > self.start:
                self._evaluate_and_save(step, ending)
            if self.tracer:
                self.tracer.at(step, self.pending, ending, self._texts, self.writer.message)
            if ending:
                break
            if step % self.cycle == 0:
                self.batch = None  # its samples need not be in memory while others are drawn
                self.batch = self._next_batch(step)
            self._take_step(step)
        if step < total:
            self.writer.message(f"stopped at step {step}, saved; the same command resumes")
        return step == total

    def evaluated(self, step: int) -> Run:
        """The run with its EMA at a step, as it is evaluated and sampled."""
        run = dataclasses.replace(self.run, params=self.current.ema, step=step)
        return with_denoiser(self.teacher, run) if self.teacher else run

    def draw(self, step: int) -> list[str]:
        """Draws the pictures of a step, once, into the workdir and TensorBoard; their paths."""
        if self.pictures[0] != step:
            paths = pictures.draw(self.evaluated(step), self.source, self.held_out,
                                  self.objective.loss_label)
            self.pictures = step, paths
            for path in paths:
                self.writer.picture(step, path)
        return self.pictures[1]

    def drawn_change(self) -> list[str]:
        """Draws samples before and after post-training; the picture's path, [] for others."""
        if not self.rollouts:
            return []
        assert self.rollouts.reference is not None
        step = self.run.config.train.steps
        path = pictures.draw_change(self.evaluated(step), self.rollouts.reference, self.held_out)
        self.writer.picture(step, path)
        return [path]

    def _evaluate_and_save(self, step: int, ending: bool) -> None:
        train = self.run.config.train
        every = train.evaluate_every
        evaluating = bool(every) and (step % every == 0 or step == train.steps)
        saving = ending or step % train.save_every == 0 or self._save_is_due(step)
        if not (evaluating or saving):
            return
        scalars, best_by = self._read(step), None  # what is saved is known to be finite
        if evaluating:
            score = self.objective.held_out(self.evaluated(step), self.held_out)
            self.writer.message(f"step {step}: {score.message}")
            scalars |= score.scalars
            best_by = score.value
        if scalars:
            self.writer.write(step, scalars)
        if saving:
            self._save(step, self.next, best_by)
            self.saved = time.perf_counter()
        if evaluating:
            self.draw(step)

    def _save_is_due(self, step: int) -> bool:
        """Whether config.train.save_minutes have passed since the last save; process 0 decides."""
        train = self.run.config.train
        if not train.save_minutes or step % self.cycle:
            return False
        due = time.perf_counter() - self.saved >= 60 * train.save_minutes
        if jax.process_count() == 1:
            return due
        # The processes wait for each other here, so they ask rarely.
        return step % train.log_every == 0 and bool(multihost_utils.broadcast_one_to_all(due))

    def _save(self, step: int, batch: _Batch | None, best_by: float | None = None) -> None:
        """Saves the state of a step; batch: that of the step, if it has been read."""
        saved, position = self.current, batch.position if batch else self.batches.get_state()
        if batch and batch.unscored and batch.is_complete():
            saved = state.with_samples(saved, batch.unscored.to_save())
        self.writer.flush()
        self.checkpoints.save(step, saved, position, best_by)

    def _next_batch(self, step: int) -> _Batch:
        """The batch of a step, with scored samples in post-training.

        With config.reward.ahead, this dispatches the drawing of the next batch's samples before it
        scores those of the step, so that the devices work while the host scores.
        """
        batch, self.next = self.next or self._read_batch(step, step, None), None
        following = step + self.cycle
        if self.run.config.reward.ahead and following < self.run.config.train.steps:
            self.next = self._read_batch(following, step, batch)
        if self.rollouts and batch.unscored:
            batch.arrays, batch.scalars = self.rollouts.finish(batch.unscored)
            batch.unscored = None
        return batch

    def _read_batch(self, step: int, current: int, batch: _Batch | None) -> _Batch:
        """Reads the batch of a step, and dispatches the drawing of its samples.

        current: the step of the present parameters. batch: that of the current step, if it has been
        read.

        Raises UserError for a record that cannot be read, once all before it is saved. In a job of
        several processes a save needs all of them, and the others read on: the flag `complete`, and
        a step that changes nothing, tell them.
        """
        position, complete = self.batches.get_state(), None
        try:
            self.local = next(self.batches)
        except UserError as error:
            if current == self.start:
                raise
            if jax.process_count() == 1:
                self._write_last(current)
                self._save(current, batch or _Batch({}, position, None))
                raise
            self.unread = error
        if jax.process_count() > 1:
            complete = sharding.flag_by_process(self.unread is None, self.run.mesh)
        arrays, samples = sharding.to_global(self.local, self.run.mesh), None
        if self.rollouts:
            logged = _is_logged(self.run.config, step)
            if self.restored:
                samples = self.rollouts.restored(self.restored, arrays, logged)
            else:
                samples = self.rollouts.begin(self.current.params, arrays, step, logged)
            self.restored = None
        return _Batch(arrays, position, complete, samples)

    def _take_step(self, step: int) -> None:
        config, mesh = self.run.config, self.run.mesh
        arguments = (self.current, self.batch.arrays, steps_of(config, step), self.reference,
                     self.batch.complete)
        if step == self.start:
            self._compile(*arguments)
        with sharding.use(mesh):
            self.current, metrics = self.step_function(*arguments)
        self._write_last(step)
        self.pending = metrics, self.batch.scalars, self.batch.position
        self.writer.advance(step + 1)

    def _write_last(self, step: int) -> None:
        """Writes the metrics of the step that ended at `step`, where they are not yet read."""
        scalars = self._read(step) if self.pending else {}
        if scalars:
            self.writer.write(step, scalars)

    def _compile(self, *arguments) -> None:
        """Compiles the first step, counts its FLOPs, and checks the memory of the largest T."""
        self.writer.message("compiling the first step; a model of the default size takes about "
                            "half a minute on a CPU")
        if self.writer.shows:
            self.step_flops = flops_of_step(
                self.run, self.step_function, self.current, self.batch.arrays, self.teacher,
                self.reference)
            dtype = self.run.config.model.dtype
            self.peak_flops = flops.matmul_rate_probe(dtype, self.run.mesh, 0.1)()
        current, batch, _, *rest = arguments
        longest = max(self.run.config.trajectory.steps)
        compile_and_check_memory(self.run, self.step_function, current, batch, longest, *rest)
        self.clock = time.perf_counter(), self.start

    def _read(self, step: int) -> dict:
        """The checked metrics of the step that ended at `step`; {} where they are not logged.

        They are waited for, so the next step should be under way.
        """
        (metrics, of_samples, position), self.pending = self.pending, None
        values = jax.device_get(metrics)
        if not values.pop("batch_complete", True):
            # All processes see it here, at the same step, and the state is still that of step - 1.
            self.checkpoints.save(step - 1, self.current, position)
            raise self.unread or UserError(
                "another process of this job could not read a record (see its line); step "
                f"{step - 1} is saved, and the same command resumes there when the data are mended")
        scalars, config = logged_scalars(values, step), self.run.config
        means = {name: value for name, value in of_samples.items() if "/" not in name}
        scalars = means | scalars | of_samples  # the terminal shows the first ones
        if step % config.train.log_every:
            return {}
        now, (before, first) = time.perf_counter(), self.clock
        speed, self.clock = (step - first) / (now - before), (now, step)
        self._warn_of_a_long_run(step, speed)
        scalars["examples_per_second"] = speed * config.data.batch_size
        memory = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        if memory:
            scalars["device_memory_gib"] = memory / 2**30
        if self.step_flops:
            drawn = np.mean([steps_of(config, number) for number in range(first, step)])
            rate = speed * self.step_flops * float(drawn) / max(config.trajectory.steps)
            scalars |= {"flops_per_second": rate, "flop_share": rate / self.peak_flops}
        return scalars

    def _warn_of_a_long_run(self, step: int, speed: float) -> None:
        """Says once, on a CPU, that the run takes a day or so."""
        hours = (self.run.config.train.steps - step) / speed / 3600
        if hours < LONG_HOURS or self.warned or jax.default_backend() != "cpu":
            return
        self.warned = True
        self.writer.message(
            f"a step takes {1 / speed:.2g} s, and the steps that are left about {hours:.0f} hours: "
            "lower config.train.steps, config.data.batch_size or config.model.width, or raise "
            "config.data.patch_size, in a new --workdir")

    def _texts(self, first: int, end: int) -> list[str]:
        """The compiled texts of steps first to end, which have run, so nothing is compiled."""
        choices = sorted({steps_of(self.run.config, step) for step in range(first, end)})
        with sharding.use(self.run.mesh):
            compiled = [self.step_function.lower(
                self.current, self.batch.arrays, steps, self.reference,
                self.batch.complete).compile()
                for steps in choices]
        return [program.as_text() or "" for program in compiled]
