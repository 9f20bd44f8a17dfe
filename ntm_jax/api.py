"""The Python interface, for notebooks and scripts; the programs in launch/ call the same functions.

    import ntm_jax
    config = ntm_jax.experiment("digits", **{"train.steps": 200})
    run = ntm_jax.train(config, "runs/digits")
    images = run.sample(16, label=7)
    nats = run.log_prob(images, label=7)

Symbols: n images; H, W, C image height, width, channels; V pixel levels; M text tokens, E their
width.
"""

import dataclasses
import difflib
import importlib
import math
import pkgutil
from collections.abc import Sequence

import numpy as np
from etils import epath

from ntm_jax import host_memory
from ntm_jax.core.likelihood import bits_per_dim
from ntm_jax.data import sources
from ntm_jax.errors import UserError, first_line
from ntm_jax.evaluation import known_density
from ntm_jax.evaluation.evaluate import EvaluationOptions, evaluate
from ntm_jax.evaluation.report import check_unit, write_report
from ntm_jax.evaluation.scoring import log_prob
from ntm_jax.export import publish
from ntm_jax.export.read import load_run
from ntm_jax.export.write import write_export
from ntm_jax.runtime import config as configuration
from ntm_jax.runtime import config_file
from ntm_jax.runtime import run as base
from ntm_jax.runtime.config import Config
from ntm_jax.sampling import generate, prompts
from ntm_jax.sampling.write import SampleRequest, write_samples
from ntm_jax.training import loop, objectives

host_memory.keep_freed()


class Run(base.Run):
    """A trained run: its parameters at a step, and what can be asked of them.

    Conditions: label is one class, by its name or number, classes [n], or for a model of texts
    layers.Text with states [n, M, E] and mask [n, M]. All methods raise UserError for a condition
    that the model does not have, and for images or options that do not fit.
    """

    def sample(self, n: int, label=None, prompts=None, seed: int | None = None,
               with_levels: bool = False, **options):
        """n images [n, H, W, C], integers 0..V-1, or float32 latents.

        label: see Run; without it classes, or held-out texts, in turn. prompts: texts, repeated
        over the images in turn. seed: image i of a seed is the same image in any n. with_levels:
        also returns the levels from pure noise down, [n, K, H, W, C]. options: steps, guidance,
        decoder, inverse, percentile; the configuration's by default.
        """
        if prompts is not None:
            label = self.text([prompts[i % len(prompts)] for i in range(n)])
        return self.sample_at(np.arange(n), label, seed, with_levels, **options)

    def sample_at(self, index, label=None, seed: int | None = None, with_levels: bool = False,
                  **options):
        """The images of these indices [n]; arguments as in sample."""
        condition = None if label is None else generate.check_condition(self, len(index), label)
        chosen = generate.override(self.config, **options)
        self._check_decoder(options.get("decoder"))
        return generate.sample_at(self, index, condition, chosen, seed, with_levels)

    def text(self, captions):
        """The states of captions, in the encoder of the run, as layers.Text for n of them."""
        return prompts.states(prompts.open_encoder(self), captions)

    def log_prob(self, images, label=None, trajectories: int = 32, seed: int | None = None):
        """The importance-weighted lower bound on log p(image | label) in nats, [n].

        images: [n, H, W, C], integers 0..V-1. For continuous latents it bounds the density of the
        image noised to t_0, with noise keyed by the seed.
        """
        condition = generate.check_condition(self, len(images), label)
        return log_prob(self, images, condition, trajectories, seed)

    def bits_per_dim(self, images, label=None, trajectories: int = 32, seed: int | None = None):
        """The upper bound on -log2 p(image | label) / (H W C) that log_prob gives, [n].

        Raises UserError for continuous latents.
        """
        check_unit("bits_per_dim", self)
        nats = -self.log_prob(images, label, trajectories, seed)
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
        measure = objectives.find(self.config.train.objective).measure
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
        self._check_decoder(request.decoder)
        write_samples(self, out, request)

    def export(self, out: str, steps: int | None = None, guidance=None,
               decoder: str | None = None) -> None:
        """Writes the run as a folder that works without this package; see export.write."""
        self._check_decoder(decoder)
        write_export(self, out, steps, guidance, decoder)

    def _check_decoder(self, decoder: str | None) -> None:
        if decoder:
            objectives.check_decoder(self.config, decoder, "decoder")


def _run(run: base.Run) -> Run:
    return Run(**{field.name: getattr(run, field.name) for field in dataclasses.fields(base.Run)})


def load(workdir: str, step: int | None = None, raw: bool = False) -> Run:
    """The run in a workdir, in one of its WORKDIR/checkpoints/STEP, or in an export.

    workdir: a folder, or hf://OWNER/NAME[@REVISION] for an export on the Hugging Face Hub. step:
    the latest by default. raw: with the raw parameters in place of their moving average. Raises
    UserError if there is no run, or its files are damaged.
    """
    return _run(load_run(workdir, step, raw))


def compare_with_truth(workdirs: Sequence[str], out: str, split: str | None = None,
                       trajectories: int = 32) -> dict:
    """Compares runs of one known density with it, and writes truth.json and truth.png to `out`.

    split: the first run's by default. trajectories: for each record, of an NTM's bounds. Returns
    the content of truth.json. Raises UserError where the runs do not compare.
    """
    runs = [load(workdir) for workdir in workdirs]
    estimators = [objectives.find(run.config.train.objective).estimators(run, trajectories)
                  for run in runs]
    result = known_density.benchmark(
        list(zip(runs, estimators, strict=True)), split or runs[0].config.evaluate.split)
    known_density.write_benchmark(result, out)
    return result


def push(export: str, repository: str, private: bool = False) -> str:
    """Uploads an export's folder to the Hugging Face Hub as OWNER/NAME.

    private: creates a private repository. Returns the address to load, hf://OWNER/NAME@COMMIT.
    Raises UserError if the export is damaged, or the Hub refuses it.
    """
    return publish.push(export, repository, private)


def experiment(name: str, variant: str = "", *, data=None, labels=None, **overrides) -> Config:
    """The configuration of a shipped experiment: experiment("digits", **{"train.steps": 200}).

    variant: as in --config=digits:gaussian. data, labels: arrays in memory as its data source, see
    train. overrides: settings by "section.key". Settings that the experiment leaves open, such as
    the image size of `folder`, are chosen for its data. Raises UserError for an unknown experiment,
    variant or setting, or a value that does not fit.
    """
    try:
        module = importlib.import_module(f"ntm_jax.experiments.{name}")
    except ModuleNotFoundError:
        package = importlib.import_module("ntm_jax.experiments")
        names = ", ".join(sorted(module.name for module in pkgutil.iter_modules(package.__path__)))
        raise UserError(f"there is no experiment {name!r}: expected one of {names}") from None
    try:
        values = module.get_config(variant) if variant else module.get_config()
        names = configuration.flatten(values.to_dict())
        for key in overrides:
            if key not in names:
                close = ", ".join(difflib.get_close_matches(key, names, 3)) or "section.key"
                raise ValueError(f"{key} is not a setting, did you mean {close}?")
        values.update_from_flattened_dict(overrides)
        if data is not None:
            values.data.source = _provide(data, labels)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"experiment {name!r}: {first_line(error)}") from None
    config, _ = config_file.complete(values)
    objectives.checked(config)
    return config


def train(config: Config, workdir: str, *, data=None, labels=None, progress: bool = True,
          until: int | None = None, tracer=None, writers: Sequence[str] = ()) -> Run | None:
    """Trains in a workdir, resuming what it holds, evaluates, and returns the run.

    data: images [n, H, W, C] in memory, uint8 pixels or float32 latents, in place of
    config.data.source. labels: [n] where there are classes, numbers or names of classes; see
    sources.from_arrays. progress: shows a progress bar on a terminal, lines elsewhere.
    until: stops at this step as a preemption would, saving. tracer: an analysis.profile.Trace.
    writers: where metrics go besides metrics.jsonl and TensorBoard, such as ["wandb:PROJECT"].

    Returns None when stopped early. Raises UserError where configuration, data and workdir do not
    fit together, and for a loss that is not finite.
    """
    if data is not None:
        config = with_arrays(config, data, labels)
    finished = loop.train(config, workdir, progress=progress, until=until, tracer=tracer,
                          writers=writers)
    return None if finished is None else _run(finished[0])


def with_arrays(config: Config, images, labels=None) -> Config:
    """The configuration with arrays in memory as its source, which this process can then open.

    images, labels: as in train. Raises UserError like sources.from_arrays.
    """
    data = dataclasses.replace(config.data, source=_provide(images, labels), image_size=0)
    return dataclasses.replace(config, data=data)


def _provide(images, labels) -> str:
    """Makes arrays a data source that this process can open; its name."""
    arrays = sources.from_arrays(images, labels)
    sources.provide(arrays)
    return arrays.name
