"""The training loop: restore; then evaluate, save, next batch, step.

A resumed run continues bit for bit.
"""

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath
from jax.experimental import multihost_utils

from ntm_jax import files
from ntm_jax.data import pipeline
from ntm_jax.data.sources import Source
from ntm_jax.errors import UserError
from ntm_jax.evaluation.evaluate import evaluate
from ntm_jax.evaluation.image_scores import Comparison, compare_with, feature_scores, generated
from ntm_jax.evaluation.report import write_report
from ntm_jax.runtime import config as configuration
from ntm_jax.runtime import config_file, sharding, stops
from ntm_jax.runtime.checkpoint import Checkpoints
from ntm_jax.runtime.config import Config
from ntm_jax.runtime.processes import locked, require_same_everywhere
from ntm_jax.runtime.run import Run, untrained, with_denoiser, with_own_denoiser
from ntm_jax.sampling import generate
from ntm_jax.training import (
    distillation,
    finetune,
    objectives,
    pictures,
    pixels,
    reference_model,
    resources,
    state,
)
from ntm_jax.training.metrics import MetricsReporter, Rates, logged_scalars
from ntm_jax.training.objectives import Extension, Objective
from ntm_jax.training.state import State
from ntm_jax.training.step import check_batch, make_step, steps_of
from ntm_jax.training.writers import Given
from ntm_jax.training.writers import find as find_writers

FEW_RECORDS = 100  # below it a run starts with a note


def train(config: Config, folder: str, *, progress: bool = True, until: int | None = None,
          profile: tuple[int, int] | None = None,
          writers: Sequence[Given] = (), ending: bool = True) -> tuple[Run, dict] | None:
    """Trains in a workdir, resuming what it holds; ends with the held-out evaluation and pictures.

    With config.train.distil_steps the run then distils its denoiser, before the evaluation.

    until: stops there as a preemption would, saving; the schedule stays that of config.train.steps.
    profile: the steps (start, stop) that jax.profiler traces into WORKDIR/profile.
    writers: further writers of metrics; see training/writers.
    ending: whether the trained run is drawn and evaluated, and has a denoiser distilled.

    Returns the trained run and its evaluation, or None when stopped by `until` or a signal.
    """
    folder = files.expanded(folder)
    require_same_everywhere(configuration.flatten(config.raw) | {"--workdir": folder})
    extra_writers = find_writers(writers)
    mesh = sharding.make_mesh(config.mesh)
    objective = objectives.checked(config)
    source = config.data.open(config.data.split, "config.data.split")
    held_out = config.data.open(config.evaluate.split, "config.evaluate.split")
    check_batch(config, mesh)
    size, count = config.data.batch_size, len(source.records)
    if size > count:
        raise UserError(f"config.data.batch_size is {size}, and {source.name} has {count} records "
                        "to train on: expected at most that many")
    run = untrained(config, pipeline.spec(source, config.data.patch_size), mesh, folder)
    generate.autoencoder_of(run)  # of the pictures
    distilled = reference_model.load_distilled(run, objective)
    resources.check_state_fits(run)
    comparison = compare_with(run, config.evaluate, source, held_out, progress)
    if config.train.score_every and not comparison:
        raise UserError(
            f"config.train.score_every is {config.train.score_every}, and no samples are scored: "
            "set config.evaluate.num_samples, and config.evaluate.features to pixels, cnn or "
            "inception, of a model of pixels, or of latents with config.sample.autoencoder")
    extension = objective.extend(run, source)
    with locked(folder):
        with contextlib.ExitStack() as stack:
            stack.callback(extension.close)
            loop = _Loop(config, run, objective, distilled, source, held_out, comparison, extension,
                         stack, extra_writers, progress, profile)
            loop.train(config.train.steps if until is None else min(until, config.train.steps))
            if loop.stop.stopping or not loop.ended():
                return None
            trained = loop.step
            loop.take_best()
            drawn = loop.final_pictures() if ending else []
            loop.reporter.message(f"trained to step {trained}" + (
                "" if not ending else "; distilling its denoiser" if config.train.distil_steps else
                f"; evaluating step {loop.step}"))
        run = loop.evaluated()
        if not ending:
            return run, {}
        if config.train.distil_steps:
            del loop  # frees the optimizer's state
            nested = distillation.discard_others(run)
            if not train(distillation.settings(config), nested, progress=progress, ending=False):
                return None
            run = with_own_denoiser(run, auto=config.sample.decoder == configuration.AUTO)
            pictures.draw(run, held_out, objective.label)
        result, scored = evaluate(run, measure=objective.measure, comparison=comparison,
                                  progress=progress)
        write_report(run, result, scored, epath.Path(folder) / "evaluation.json", brief=True)
        if jax.process_index() == 0:
            print(f"pictures: {', '.join(drawn)}", flush=True)
    return run, result


def data_notes(source: Source, held_out: Source) -> list[str]:
    """Lines on the records that a run trains on: what their source says, and whether they are few.
    """
    lines = [source.notes] if source.notes else []
    if len(source.records) < FEW_RECORDS:
        lines.append(
            f"{len(source.records)} training records are few: the model will repeat them, and "
            f"figures of {len(held_out.records)} held-out ones say little; take some hundred")
    return [f"note: {line}" for line in lines]


class _Loop:
    """Training in progress, from the run's last checkpoint on.

    config: of the run, as given. distilled: the run whose model a new one distils, or None.
    comparison: the real images that samples are scored by, or None. stack: closes what the loop
    opens.
    """

    def __init__(self, config: Config, run: Run, objective: Objective, distilled: Run | None,
                 source: Source, held_out: Source, comparison: Comparison | None,
                 extension: Extension, stack: contextlib.ExitStack, extra_writers: Sequence,
                 progress: bool, profile: tuple[int, int] | None):
        folder, total = run.workdir, config.train.steps
        self.run, self.objective, self.distilled = run, objective, distilled
        self.held_out, self.comparison, self.extension = held_out, comparison, extension
        self.profile, self.tracing = range(*profile or (0, 0)), False
        changes = config_file.check_resumable(folder, config, run.spec)
        self.checkpoints = stack.enter_context(Checkpoints(
            folder, keep_every=config.train.keep, settings=config_file.fixed(config, run.spec)))
        latest = self.checkpoints.latest()
        self.step, self.current, position, samples = self._restored(latest)
        if self.step > total:
            raise UserError(f"{folder} holds step {self.step}, beyond config.train.steps = "
                            f"{total}: raise it to go on, or evaluate that run")
        iterator = pipeline.TrainIterator(
            source, config.data.patch_size, config.data.batch_size, config.seed,
            config.data.workers, *sharding.share(run.mesh), flip=config.data.flip)
        stack.callback(iterator.close)
        if position is not None:
            iterator.set_state(position)
        if latest is None and config.train.distil_steps:
            distillation.discard_others(run)
        if jax.process_index() == 0:
            config_file.write(folder, config, run.spec)
        if not distilled:  # which has its own
            self.run = pixels.prepare(run, latest is None, progress)
        self.reference = reference_model.prepare(
            run, objective, self.current, distilled, new=latest is None)
        self.batches = _Batches(run, iterator, extension, self.reference, samples)
        self.reporter = stack.enter_context(MetricsReporter(
            folder, total, self.step, jax.process_index() > 0 or not progress, extra_writers,
            configuration.flatten(config.raw)))
        size = sum(a.size for a in jax.tree.leaves(self.current.params))
        mesh = " x ".join(f"{axis} {size}" for axis, size in run.mesh.shape.items())
        new = f"in {folder}" + (f", starting from {config.init_from}" if config.init_from else "")
        self.reporter.message(
            f"{size:,} parameters, {len(source.records):,} training records, mesh {mesh}, "
            + (new if latest is None else f"resuming {folder} at step {self.step}"))
        for line in (*data_notes(source, held_out), *changes):
            self.reporter.message(line)
        self.stop = stack.enter_context(stops.watch())
        self.stop.busy = self.checkpoints.saving
        self.step_function = make_step(run, objective, distilled)
        self.start, self.saved = self.step, time.perf_counter()  # when the run was last saved
        # A stop ended the evaluation of the restored step.
        self.unevaluated = latest is not None and self._evaluates() and not bool(
            multihost_utils.broadcast_one_to_all(self.checkpoints.measured(latest)))
        self.batch: Any = None  # of the present step
        # (metrics, the batch's scalars and position) of the last step, read after the next begins
        self.unread: tuple[dict, dict, dict] | None = None

    def _restored(self, latest: int | None) -> tuple[int, State, dict | None, dict]:
        """(step, state, the data's position, the extension's arrays) to go on from."""
        run = self.run
        if latest is None:
            current = state.initialize(run)
            if run.config.init_from:
                current = finetune.start_from(run, current)
            return 0, current, None, {}
        expected = dict(vars(state.abstract(run)))
        if names := self.checkpoints.entries(latest, "samples"):
            expected["samples"] = self.extension.abstract(names)
        step, found, position = self.checkpoints.restore(expected)
        samples = found.pop("samples", {})
        return step, State(**found), position, samples

    def train(self, last: int) -> None:
        """Steps to `last`, in the order evaluate, save, next batch, step.

        Ends earlier at a signal, which also ends an evaluation; always between the steps on one
        batch, where it saves. A resumed run repeats the evaluation.
        """
        try:
            self._steps_to(last)
        finally:
            self.stop.end()
        if self.stop.stopping or not self.ended():
            self.reporter.message(f"stopped at step {self.step}, saved; the same command resumes")
        elif self.step < self.run.config.train.steps:
            patience = self.run.config.train.patience
            self.reporter.message(
                f"stopped at step {self.step}: {patience} evaluations without a better figure; "
                "raise config.train.patience to go on")

    def _steps_to(self, last: int) -> None:
        while True:
            stopping = self.stop.point() or self.step >= last
            between = self.step % self.extension.updates == 0
            if self.step > self.start or self.unevaluated:
                self._evaluate_and_save(stopping and between)
            # A stop may have ended the evaluation.
            ending = ((stopping or self.stop.stopping) and between) or self._out_of_patience()
            self._trace(ending)
            if ending:
                break
            if between:
                self.batch = None  # its arrays need not be in memory while others are made
                self.batch = self._next_batch()
            if self.step == self.start:
                self._compile()
                self._rehearse()
                self.stop.begin()
            self._take_step()

    def ended(self) -> bool:
        """Whether all steps are taken, or config.train.patience has run out."""
        return self.step >= self.run.config.train.steps or self._out_of_patience()

    def _out_of_patience(self) -> bool:
        """Whether the last config.train.patience evaluations were not better than one before.

        They are counted from the best checkpoint, so a resumed run counts as one that never
        stopped.
        """
        train = self.run.config.train
        if not train.patience or self.step % train.evaluate_every:
            return False
        return (self.step - self._best()) // train.evaluate_every >= train.patience

    def _best(self) -> int:
        """The best saved step, the present one without; process 0 decides, as disks may lag."""
        best = self.checkpoints.best()
        return int(multihost_utils.broadcast_one_to_all(self.step if best is None else best))

    def take_best(self) -> None:
        """With config.train.patience, goes back to the EMA of the best step."""
        if not self.run.config.train.patience or (best := self._best()) == self.step:
            return
        expected = {"ema": state.abstract(self.run).ema}
        self.step, found, _ = self.checkpoints.restore(expected, best, partial=True)
        self.current = dataclasses.replace(self.current, **found)

    def _evaluates(self) -> bool:
        train = self.run.config.train
        return bool(train.evaluate_every) and (
            self.step % train.evaluate_every == 0 or self.step == train.steps)

    def _evaluate_and_save(self, ending: bool) -> None:
        train, step, evaluating = self.run.config.train, self.step, self._evaluates()
        saving = (ending or step % train.save_every == 0 or (evaluating and train.patience > 0)
                  or self._save_is_due() or self.unevaluated)
        scoring = bool(train.score_every) and step % train.score_every == 0
        if not (evaluating or saving or scoring):
            return
        # What is saved is known to be finite.
        scalars, best_by = self._read() if self.unread else {}, None
        with self.stop.evaluation():
            if evaluating:
                score = self.objective.held_out(self.evaluated(), self.held_out)
                self.reporter.message(f"step {step}: {score.message}")
                scalars |= score.scalars
                best_by = score.value
            if scoring:
                assert self.comparison  # train() checks it
                found = feature_scores(self.evaluated(), self.comparison)
                self.reporter.message(
                    f"step {step}: Fréchet distance {found['frechet']:.4g} of "
                    f"{self.run.config.evaluate.num_samples} samples")
                scalars |= {f"score/{name}": value for name, value in found.items()}
        self.reporter.write(step, scalars)
        if saving or (self.stop.stopping and step % self.extension.updates == 0):
            self._save(best_by)
        if evaluating and step < train.steps and not self.stop.stopping:
            with self.stop.evaluation():
                self._draw()

    def _save_is_due(self) -> bool:
        """Whether config.train.save_minutes have passed since the last save; process 0 decides."""
        train = self.run.config.train
        if not train.save_minutes or self.step % self.extension.updates:
            return False
        due = time.perf_counter() - self.saved >= 60 * train.save_minutes
        if jax.process_count() == 1:
            return due
        # The processes wait for each other here, so they ask rarely.
        return (self.step % train.log_every == 0
                and bool(multihost_utils.broadcast_one_to_all(due)))

    def _save(self, best_by: float | None = None) -> None:
        """Saves the present state with the position of the next batch."""
        position, samples = self.batches.to_save()
        saved = vars(self.current) | ({"samples": samples} if samples else {})
        self.reporter.flush()
        self.checkpoints.save(self.step, saved, position, best_by, again=self.unevaluated)
        self.unevaluated = False
        self.saved = time.perf_counter()

    def _next_batch(self) -> "_Batch":
        """The batch of the present step. Where it fails, all steps before it are saved first."""
        try:
            return self.batches.next(self.step, self.current.params)
        except jax.errors.JaxRuntimeError:  # a device failed
            raise
        except Exception:  # of a record, or of a reward
            if self.step > self.start and jax.process_count() == 1:
                self._write_last()
                self._save()
            raise

    def _compile(self) -> None:
        """Compiles the first step, counts its FLOPs, and checks the memory of the largest T."""
        self.reporter.message("compiling the first step; a model of the default size takes about "
                              "half a minute on a CPU")
        arguments = self._arguments(max(self.run.config.trajectory.steps))
        step_flops = resources.flops_of_step(
            self.run, self.objective, self.distilled, self.step_function, *arguments,
        ) if self.reporter.shows else 0
        resources.compile_and_check_memory(self.run, self.step_function, *arguments)
        self.rates = Rates(self.run, self.objective, self.step, step_flops)

    def _rehearse(self) -> None:
        """Evaluates, draws and scores one batch, as config.train.rehearse says.

        The programs are those of later evaluations, so what fails or does not fit fails now.
        """
        config, started = self.run.config, time.perf_counter()
        if config.train.rehearse == "false" or (
                config.train.rehearse == "auto" and jax.process_count() == 1):
            return
        records, run = self.held_out.records, self.evaluated()
        few = [records[i] for i in range(min(len(records), config.evaluate.batch_size))]
        self.objective.held_out(run, dataclasses.replace(self.held_out, records=few))
        self._draw()
        if comparison := self.comparison:
            comparison.extractor(next(generated(run, batch=comparison.batch)))
        peak = (self.run.mesh.local_devices[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
        self.reporter.message(
            f"rehearsed evaluation, pictures and scores in {time.perf_counter() - started:.0f} s"
            + (f"; a device's memory peaked at {peak / 2**30:.1f} GiB" if peak else ""))

    def _arguments(self, steps: int) -> tuple:
        fixed = self.run.params  # before it has a trained model, p(x | x_0)'s alone
        return self.current, self.batch.arrays, steps, self.reference, self.batch.complete, fixed

    def _take_step(self) -> None:
        arguments = self._arguments(steps_of(self.run.config, self.objective, self.step))
        with sharding.use(self.run.mesh):
            self.current, metrics = self.step_function(*arguments)
        self._write_last()
        self.unread = metrics, self.batch.scalars, self.batch.position
        self.step += 1
        self.reporter.advance(self.step)

    def _write_last(self) -> None:
        """Writes the metrics of the step before the present one, where they are not yet read."""
        if self.unread:
            self.reporter.write(self.step, self._read())

    def _read(self) -> dict:
        """The checked metrics of the step that ended at the present one; {} if not logged.

        They are waited for, so the next step should be under way.
        """
        assert self.unread
        (metrics, of_batch, position), self.unread = self.unread, None
        values = jax.device_get(metrics)
        if not values.pop("batch_complete", True):
            # All processes see it here, at the same step, and the state is that before the step.
            self.checkpoints.save(self.step - 1, vars(self.current), position)
            raise self.batches.error or UserError(
                "another process of this job could not read a record (see its line); step "
                f"{self.step - 1} is saved, and the same command resumes there when the data are "
                "mended")
        scalars = logged_scalars(values, self.step)
        if self.step % self.run.config.train.log_every:
            return {}
        # The terminal shows the first ones.
        means = {name: value for name, value in of_batch.items() if "/" not in name}
        return means | scalars | of_batch | self.rates.read(self.step)

    def _trace(self, ending: bool) -> None:
        """Starts the profiler before the first of the steps `profile`, and stops it after the last.

        A run that ends between them stops it there.
        """
        inside = self.step in self.profile and not ending
        if inside == self.tracing:
            return
        self.tracing, folder = inside, f"{self.run.workdir}/profile"
        jax.block_until_ready(self.unread)
        if inside:
            jax.profiler.start_trace(folder)
            return
        jax.profiler.stop_trace()
        self.reporter.message(f"traced in {folder}: pip install xprof && xprof --logdir={folder}")

    def evaluated(self) -> Run:
        """The run with its EMA at the present step, as it is evaluated and sampled."""
        params = self.current.ema | (self.run.params or {})  # with those of p(x | x_0)
        run = dataclasses.replace(self.run, params=params, step=self.step)
        return with_denoiser(self.distilled, run) if self.distilled else run

    def final_pictures(self) -> list[str]:
        """Draws the pictures of a run that has ended, with the extension's own; their paths."""
        drawn = self._draw()
        own = self.extension.pictures(self.evaluated(), self.reference, self.held_out)
        for path in own:
            self.reporter.picture(self.step, path)
        return [*drawn, *own]

    def _draw(self) -> list[str]:
        """Draws the pictures of the present step; their paths."""
        paths = pictures.draw(self.evaluated(), self.held_out, self.objective.label)
        for path in paths:
            self.reporter.picture(self.step, path)
        return paths


@dataclasses.dataclass
class _Batch:
    """The global batch of the steps that begin at one step.

    position: the data iterator's state before the batch.
    complete: in a job of several processes, whether each has its share (sharding.flag_by_process);
      a step on an incomplete batch changes nothing. None in a job of one process.
    pending: the extension's, until it is finished.
    scalars: of the extension, to log.
    """

    arrays: dict
    position: dict
    complete: Any
    pending: Any
    scalars: dict = dataclasses.field(default_factory=dict)


class _Batches:
    """The batches of a run: read by every process, placed on the devices, and extended.

    They are begun one ahead if the extension asks for it. saved: the extension's arrays in the
    checkpoint from which the run is resumed; {} if none.
    """

    def __init__(self, run: Run, iterator: pipeline.TrainIterator, extension: Extension,
                 reference, saved: dict):
        self._run, self._iterator, self._extension = run, iterator, extension
        self._reference, self._saved = reference, saved
        self._read: list[_Batch] = []  # batches that no step has been taken on
        self._local: dict = {}  # this process's share of the last one
        # In a job of several processes, the error with which this one could not read its share of
        # a batch; None where it could.
        self.error: UserError | None = None

    def next(self, step: int, params) -> _Batch:
        """The batch of a step; params: those of that step.

        Raises UserError for a record that cannot be read; to_save then gives what a run needs to
        resume at `step`. In a job of several processes a save needs all of them, and the others
        read on: so from the second batch on, `_Batch.complete` tells them.
        """
        if not self._read:
            self._begin(step, params)
        following = step + self._extension.updates
        if self._extension.ahead and following < self._run.config.train.steps:
            self._begin(following, params)
        first = self._read[0]
        first.arrays, first.scalars = self._extension.finish(first.pending)
        first.pending = None
        return self._read.pop(0)

    def to_save(self) -> tuple[dict, dict]:
        """(the data's position of the next batch, the extension's arrays of it).

        All processes must call it together.
        """
        if not self._read:
            return self._iterator.get_state(), {}
        first = self._read[0]
        complete = first.complete is None or sharding.to_host(first.complete).all()
        return first.position, self._extension.to_save(first.pending) if complete else {}

    def _begin(self, step: int, params) -> None:
        """Reads the batch of a step, and begins to extend it."""
        position, complete = self._iterator.get_state(), None
        try:
            self._local = next(self._iterator)
        except UserError as error:
            if not self._local or jax.process_count() == 1:
                raise
            self.error = error
        if jax.process_count() > 1:
            complete = sharding.flag_by_process(self.error is None, self._run.mesh)
        arrays = sharding.to_global(self._local, self._run.mesh)
        every = self._run.config.train.log_every
        logged = (step + self._extension.updates) // every > step // every
        if self._saved:
            pending = self._extension.restore(self._saved, arrays, logged)
        else:
            pending = self._extension.begin(params, self._reference, arrays, step, logged)
        self._saved = {}
        self._read.append(_Batch(arrays, position, complete, pending))
