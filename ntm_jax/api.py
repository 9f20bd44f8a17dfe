"""The Python interface, for notebooks and scripts; the programs in launch/ call the same functions.

    import ntm_jax
    config = ntm_jax.experiment("digits", **{"train.steps": 200})
    run = ntm_jax.train(config, "runs/digits-python")
    images = run.sample(16, label=7)
    nats = run.log_prob(images, label=7)

Symbols: n images; H, W, C image height, width, channels; V pixel levels; M text tokens, E their
width. Models of an array have rows of D numbers in place of images, and conditions of E numbers.
"""

import dataclasses
import difflib
import importlib
import math
import os
import pkgutil
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from ntm_jax import host_memory
from ntm_jax.core.conditions import Text
from ntm_jax.core.likelihood import bits_per_dim
from ntm_jax.core.pixels import KINDS
from ntm_jax.data import sources, transforms
from ntm_jax.errors import UserError, abbreviate, as_array, check_count, first_line
from ntm_jax.evaluation.evaluate import EvaluationOptions, evaluate
from ntm_jax.evaluation.report import check_unit, write_report
from ntm_jax.evaluation.scoring import LevelTerms, as_images, as_tokens, score_images
from ntm_jax.export import publish
from ntm_jax.export.read import load_run
from ntm_jax.export.write import write_export
from ntm_jax.registry import load as load_part
from ntm_jax.runtime import config as configuration
from ntm_jax.runtime import config_file, renamed, sharding
from ntm_jax.runtime import run as base
from ntm_jax.runtime.config import Config
from ntm_jax.sampling import generate, prompts, selection
from ntm_jax.sampling.latents import decode_latents, encode_tokens
from ntm_jax.sampling.write import SampleRequest, write_samples
from ntm_jax.training import loop, objectives, pixels
from ntm_jax.training.writers import Given

host_memory.keep_freed()


class Run(base.Run):
    """A trained run: its parameters at a step, and what can be asked of them.

    Conditions: label is one class, by its name or number, classes [n], or for a model of texts
    core.conditions.Text with states [n, M, E] and mask [n, M], of n texts or of one.
    condition is one vector [E] or vectors [n, E] in their own units, for a model that is
    conditioned on vectors. All methods raise UserError for a condition that the model does not
    have, and for images or options that do not fit.
    """

    def sample(self, n: int, label=None, prompts: str | Sequence[str] | None = None,
               seed: int | None = None, with_levels: bool = False, *, condition=None,
               with_log_prob: bool = False, steps: int | None = None,
               guidance: float | Sequence[float] | None = None, decoder: str | None = None,
               inverse: str | None = None, percentile: float | None = None) -> np.ndarray | Any:
        """n images [n, H, W, C], integers 0..V-1, float32 latents, or [n, D] of an array.

        label: see Run; without it classes, or held-out texts or vectors, in turn. prompts: one
        text, or several, repeated over the images in turn. condition: one vector [E], or several
        [m, E], of which each has n samples: [m, n, D]. seed: image i of a seed is the same image in
        any n.
        with_levels: also returns the levels from pure noise down, [n, K, H, W, C]: of pixels
        rounded and clipped to integers 0..V-1, of an array in standardised units. steps, guidance
        (one scale, or one per step from noise down), decoder, inverse, percentile: config.sample's
        by default. The first call compiles for the next power of two of n; smaller n need no
        further compilation.

        with_log_prob: returns a generate.Drawn, with samples, levels and the log-density of their
        trajectories, log p(x_0..x_T | condition) in nats, in all and by factor. It needs no further
        evaluation of the networks. With guidance it is the density of the guided model.
        """
        check_count("n", n)
        if prompts is not None:
            texts = _texts(prompts)
            states = self.text([texts[i % len(texts)] for i in range(n)])
            label = base.one_condition(label, states)
        index, many = np.arange(n), ()
        given = None if condition is None else as_array("condition", condition, "vectors [m, E]")
        if given is not None and given.ndim > 1:
            condition, many = given.repeat(n, 0), given.shape[:1]
            # Sample i of condition j has index i m + j: the same in any n, and no noise is shared.
            index = np.arange(len(condition)).reshape(n, *many).T.ravel()
        found = self.sample_at(
            index, base.one_condition(label, condition), seed, with_levels, with_log_prob,
            steps=steps, guidance=guidance, decoder=decoder, inverse=inverse, percentile=percentile)
        return jax.tree.map(lambda a: a.reshape(*many, n, *a.shape[1:]), found)

    def sample_at(self, index, label=None, seed: int | None = None, with_levels: bool = False,
                  with_log_prob: bool = False, *, steps: int | None = None,
                  guidance: float | Sequence[float] | None = None, decoder: str | None = None,
                  inverse: str | None = None, percentile: float | None = None
                  ) -> np.ndarray | Any:
        """The images of these indices [n]; arguments as in sample, label may be vectors [n, E].

        Indices are 0 to 2^31 - 1. At most config.evaluate.batch_size images are drawn at a time.
        """
        index = np.asarray(index, np.int32)
        condition = None if label is None else self.condition.validate(len(index), label)
        chosen = generate.override(self.config, steps=steps, guidance=guidance, decoder=decoder,
                                   inverse=inverse, percentile=percentile)

        def draw(places):
            own = None if condition is None else jax.tree.map(lambda a: a[places], condition)
            if with_log_prob:
                return generate.draw_at(self, index[places], own, chosen, seed)
            return generate.sample_at(self, index[places], own, chosen, seed, with_levels)

        return self._in_batches(len(index), draw, "sample", chosen, with_levels, with_log_prob)

    def _in_batches(self, count: int, compute, *program):
        """The arrays of compute(places), joined; see sharding.padded_batches."""
        parts = [compute(places) for places in sharding.padded_batches(
            count, self.config.evaluate.batch_size, self.mesh, self.model, self.schedule, *program)]
        return jax.tree.map(lambda *found: np.concatenate(found)[:count], *parts)

    def best_of(self, candidates: int, judge: "str | os.PathLike | base.Run | None" = None,
                stop_nats: float | None = None) -> "Run":
        """This run with samples that are selected, each from so many candidates, by likelihood.

        Keeps the candidate with the largest conditional log-likelihood ratio; see
        sampling.selection. judge: whose likelihood selects, another run of the same data or what
        `load` takes; the run itself by default. stop_nats: the information in nats with which a
        candidate is kept without comparing it with further ones; all are compared by default.
        Raises UserError where the judge cannot select.
        """
        other = load(judge) if isinstance(judge, (str, os.PathLike)) else judge
        return _run(selection.best_of(self, candidates, other, stop_nats))

    def with_pixel_likelihood(self, kind: str, progress: bool = False) -> "Run":
        """This run with another p(x | x_0) for its likelihoods, a kind of config.model's.

        histogram and network are fitted to the training data, which must then be there. Raises
        UserError for continuous data, and to and from `learned` and `uniform`, with which a model
        is trained.
        """
        own = self.config.model.pixel_likelihood
        if not self.spec.pixel_levels or kind not in KINDS or {"learned", "uniform"} & {kind, own}:
            raise UserError(f"pixel_likelihood is {kind} of {self.config.data.source}: expected "
                            "binned, bayes, histogram or network, of a model of pixels that "
                            f"was trained with one of them, found {own}")
        model = dataclasses.replace(self.config.model, pixel_likelihood=kind)
        run = dataclasses.replace(self, config=dataclasses.replace(self.config, model=model))
        return _run(pixels.fit(run, progress))

    def selecting(self, candidates: int, judge=None, enough: float | None = None) -> "Run":
        """`best_of` under its earlier name."""
        return self.best_of(candidates, judge, enough)

    def text(self, captions: str | Sequence[str]) -> Text:
        """The states of one or n captions, in the encoder of the run, as conditions.Text."""
        return prompts.states(prompts.open_encoder(self), _texts(captions))

    def log_prob(self, images, label=None, trajectories: int = 32, seed: int | None = None, *,
                 condition=None, noised: bool | None = None) -> np.ndarray:
        """Importance-weighted estimates of log p(image | label) in nats, [n].

        Each is a lower bound in expectation: a single estimate may exceed log p. It tightens with
        more trajectories.

        images: [n, H, W, C], integers 0..V-1, or rows [n, D] of an array, whose density is in its
        own units. noised: only of continuous data, bounds the density of the data noised to t_0,
        with noise keyed by the seed, not that of the data itself; by default for latents, not for
        arrays.
        """
        return self.log_prob_by_level(images, label, trajectories, seed, condition=condition,
                                      noised=noised).log_prob

    def log_prob_by_level(self, images, label=None, trajectories: int = 32,
                          seed: int | None = None, *, condition=None,
                          noised: bool | None = None) -> LevelTerms:
        """The bound of log_prob and its terms: the reconstruction, and each step's rate and NLL.

        It takes the arguments of log_prob, and as much time. Terms are in nats; see
        scoring.LevelTerms.
        """
        label, images = base.one_condition(label, condition), as_images(self, images)
        given = self.condition.validate(len(images), label)
        if noised and self.spec.pixel_levels:
            raise UserError(f"noised is {abbreviate(noised)}, and {self.workdir} is a model of "
                            "pixels, which have a probability of their own: leave it out")
        decoded = bool(self.spec.columns) if noised is None else not noised
        return score_images(self, images, given, trajectories, seed, decoded)

    def encode(self, images, label=None, seed: int | None = None, *, condition=None) -> np.ndarray:
        """The latents u_T..u_0 of images, from pure noise down, [n, K, H, W, C] float32.

        u_k = f(x_k) at every level of one trajectory of each image, whose noise is keyed by the
        seed and the image's place; u_T is the noise x_T itself. Rows of an array have latents
        [n, K, D] of their standardised units. images, label and condition: as in log_prob.
        """
        label, images = base.one_condition(label, condition), as_images(self, images)
        x, given = as_tokens(self, images), self.condition.validate(len(images), label)

        def compute(places):
            own = jax.tree.map(lambda a: a[places], given)
            return encode_tokens(self, x[places], places, own, seed)

        us = self._in_batches(len(x), compute, "encode", self.config.evaluation_steps)
        return generate.as_levels(self.spec, us)

    def decode(self, latents, label=None, *, condition=None, decoder: str | None = None,
               with_levels: bool = False) -> np.ndarray | Any:
        """The images of latents u_T..u_0 [n, K, H, W, C], as `sample` makes them of its own.

        latents: laid out as `encode` returns them, of K-1 steps. label and condition: as in
        log_prob. decoder: inverse inverts the transporter at level 0 alone, score at all levels,
        and denoises; the configuration's by default. with_levels: also returns x_T..x_0 [n, K, ...]
        as the model has them, in float32: pixels in [-1, 1], arrays standardised.
        """
        spec, shape = self.spec, f"[n, K, {', '.join(map(str, self.spec.data_shape))}]"
        us = as_array("latents", latents, f"numbers {shape}").astype(np.float32)
        if us.ndim < 2 or us.shape[2:] != spec.data_shape:
            raise UserError(f"latents have shape {us.shape}: expected {shape}")
        chosen = generate.override(self.config, steps=us.shape[1] - 1, decoder=decoder)
        given = self.condition.validate(len(us), base.one_condition(label, condition))
        us = transforms.patchify(
            us[:, ::-1].reshape(*us.shape[:2], *spec.image_shape), spec.patch_size)

        def compute(places):
            own = jax.tree.map(lambda a: a[places], given)
            return decode_latents(self, us[places], own, chosen, with_levels)

        x, xs = self._in_batches(len(us), compute, "decode", chosen, with_levels)
        images = spec.from_tokens(x)
        return (images, generate.as_levels(spec, xs)) if with_levels else images

    def reweight(self, log_target: Callable, *, condition=None, label=None, n: int = 1000,
                 seed: int | None = None, steps: int | None = None, guidance=None,
                 inverse: str | None = None) -> Any:
        """n samples with weights that correct them to a target density, as Reweighted.

        Arguments are those of projects.weighing.reweight.
        """
        return load_part("ntm_jax.projects.weighing.reweight:reweight")(
            self, log_target, condition=condition, label=label, n=n, seed=seed, steps=steps,
            guidance=guidance, inverse=inverse)

    def bits_per_dim(self, images, label=None, trajectories: int = 32, seed: int | None = None, *,
                     condition=None) -> np.ndarray:
        """log_prob as an upper bound in expectation on -log2 p(image | label) / (H W C), [n].

        Raises UserError for continuous latents.
        """
        check_unit("bits_per_dim", self)
        nats = -self.log_prob(images, label, trajectories, seed, condition=condition)
        return bits_per_dim(nats, math.prod(self.spec.image_shape))

    def evaluate(self, options: EvaluationOptions | None = None, against=None,
                 progress: bool = False) -> dict:
        """The figures of evaluation.json: likelihood with standard errors, samples' scores.

        against: another run, scored on the same records. progress: shows a progress bar.
        """
        return self.scores(options, against, progress)[0]

    def scores(self, options: EvaluationOptions | None = None, against=None,
               progress: bool = False) -> tuple[dict, dict]:
        """The figures of `evaluate`, and the scores of every record by name, [records, ...]."""
        config = self.denoiser.config if self.denoiser else self.config
        measure = objectives.find(config.train.objective).measure if config else None
        return evaluate(self, options, against=against, measure=measure, progress=progress)

    def report(self, name: str = "evaluation.json", result: dict | None = None, scores=None,
               per_example: bool = False, unit: str | None = None) -> dict:
        """Prints an evaluation and writes it into the run's folder; see evaluation.report.

        Evaluates first if `result` and `scores` are not given. Returns the evaluation.
        """
        if result is None:
            result, scores = self.scores(progress=True)
        epath.Path(self.workdir).mkdir(parents=True, exist_ok=True)  # new for a run on the Hub
        write_report(self, result, scores, epath.Path(self.workdir) / name, per_example, unit)
        return result

    def write_samples(self, out: str, request: SampleRequest) -> None:
        """Writes images into a folder, resuming a stopped call; see sampling.write."""
        write_samples(self, out, request)

    def collect(self, out: str, request) -> None:
        """Writes samples that a reward accepts into a folder; see projects.reward.collect."""
        load_part("ntm_jax.projects.reward.collect:collect")(self, out, request)

    def export(self, out: str, steps: int | None = None, guidance=None,
               decoder: str | None = None) -> None:
        """Writes the run as a folder that works without this package; see export.write."""
        write_export(self, out, steps, guidance, decoder)


def _texts(given: str | Sequence[str]) -> list[str]:
    """One text, or several, as a list."""
    return [given] if isinstance(given, str) else list(given)


def _run(run: base.Run) -> Run:
    return Run(**{field.name: getattr(run, field.name) for field in dataclasses.fields(base.Run)})


def load(workdir: str | os.PathLike, step: int | None = None, raw: bool = False) -> Run:
    """The run in a workdir, in one of its WORKDIR/checkpoints/STEP, or in an export.

    workdir: a folder, or hf://OWNER/NAME[@REVISION] for an export on the Hugging Face Hub. step:
    by default the latest, or the best one of a run with config.train.patience. raw: with the raw
    parameters in place of their moving average. Raises UserError if there is no run, or its files
    are damaged.
    """
    return _run(load_run(os.fspath(workdir), step, raw))


def push(export: str, repository: str, private: bool = False) -> str:
    """Uploads an export's folder to the Hugging Face Hub as OWNER/NAME.

    private: creates a private repository. Returns the address to load, hf://OWNER/NAME@COMMIT.
    Raises UserError if the export is damaged, or the Hub refuses it.
    """
    return publish.push(export, repository, private)


def experiment(name: str, variant: str = "", *, data=None, labels=None, condition=None,
               **overrides) -> Config:
    """The configuration of a shipped experiment: experiment("digits", **{"train.steps": 200}).

    variant: "gaussian" is --config=digits:gaussian, and so is the name "digits:gaussian". data,
    labels, condition: arrays in memory as its data source, see train. overrides: settings by
    "section.key". Settings that the experiment leaves open, such as the image size of `folder`, are
    chosen for its data, and printed. Raises UserError for an unknown experiment, variant or
    setting, or a value that does not fit.
    """
    source = _source(data, labels, condition)
    name, _, named = name.partition(":")
    variant = variant or named
    package = importlib.import_module("ntm_jax.experiments")
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    if name not in names:
        raise UserError(f"there is no experiment {name!r}: expected one of {', '.join(names)}")
    module = importlib.import_module(f"ntm_jax.experiments.{name}")
    try:
        values = module.get_config(variant) if variant else module.get_config()
        names, overrides = configuration.flatten(values.to_dict()), renamed.current(overrides)
        for key in overrides:
            if key not in names:
                close = ", ".join(difflib.get_close_matches(key, names, 3)) or "section.key"
                raise ValueError(f"{key} is not a setting, did you mean {close}?")
        values.update_from_flattened_dict(overrides)
        if source:
            values.data.source = source
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"experiment {name!r}: {first_line(error)}") from None
    config = config_file.complete(values)
    objectives.checked(config)
    _check_used(config, condition)
    return config


def train(config: Config | str, workdir: str | os.PathLike, *, data=None, labels=None,
          condition=None, progress: bool = True, until: int | None = None,
          profile: tuple[int, int] | None = None, writers: Sequence[Given] = ()) -> Run | None:
    """Trains in a workdir, resuming what it holds, evaluates, and returns the run.

    config: of `experiment`, or the name of one, such as "digits:gaussian". data: in place of
    config.data.source, images [n, H, W, C] in memory, uint8 pixels or float32 latents, or an array
    [n, D] of numbers in any units. labels: [n] where there are classes, numbers or names of
    classes. condition: [n, E] numbers in any units, for config.model.condition=vector. See
    sources.from_arrays. progress: shows a progress bar on a terminal, lines elsewhere.

    until: stops at this step as a preemption would, saving. profile: the steps (start, stop) that
    jax.profiler traces into WORKDIR/profile. writers: where metrics go besides metrics.jsonl and
    TensorBoard: names such as "wandb:PROJECT", writers of your own, and functions called with
    (step, scalars) after each held-out evaluation. An exception that they raise ends the training.

    Returns None when stopped by `until` or a signal. Raises UserError where configuration, data and
    workdir do not fit together, and for a loss that is not finite.
    """
    if isinstance(config, str):
        config = experiment(config, data=data, labels=labels, condition=condition)
    else:
        config = with_arrays(config, data, labels, condition)
    finished = loop.train(config, os.fspath(workdir), progress=progress, until=until,
                          profile=profile, writers=writers)
    return None if finished is None else _run(finished[0])


def with_arrays(config: Config, images, labels=None, condition=None) -> Config:
    """The configuration with arrays in memory as its source, which this process can then open.

    images, labels, condition: the arguments data, labels and condition of `train`. Without images
    the configuration is returned unchanged.
    Raises UserError like sources.from_arrays, and for conditions that the model does not use.
    """
    source = _source(images, labels, condition)
    _check_used(config, condition)
    if not source:
        return config
    data = dataclasses.replace(config.data, source=source, image_size=0)
    return dataclasses.replace(config, data=data)


def _check_used(config: Config, condition) -> None:
    """Raises UserError for vectors as conditions of a model that is not conditioned on vectors."""
    if condition is not None and config.model.condition != "vector":
        raise UserError("condition is given, and config.model.condition is "
                        f"{config.model.condition}: set it to vector, or leave condition out")


def _source(images, labels, condition) -> str | None:
    """The name of arrays as a data source that this process can open; None without arrays."""
    if images is None:
        if labels is not None or condition is not None:
            raise UserError("labels or condition are given without data: expected both, or "
                            "neither where config.data.source has them")
        return None
    arrays = sources.from_arrays(images, labels, condition=condition)
    sources.provide(arrays)
    return arrays.name
