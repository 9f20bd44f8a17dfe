"""Images from a model, by index: image i is the same in any batch, on any mesh, in any process.

Symbols: n images; B batch, K levels, N tokens, D token channels; H, W, C image height, width,
channels; V pixel levels; M text tokens, E their width.
"""

import dataclasses
import functools
import math
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ntm_jax import typed
from ntm_jax.core import denoising, flow_matching, sampling
from ntm_jax.core.model import NTM, exact
from ntm_jax.core.predictor import Predictor
from ntm_jax.core.trajectory import Schedule, example_keys, example_noise, per_example
from ntm_jax.core.transformer.conditions import Text, Vector, null
from ntm_jax.core.transformer.precision import precision
from ntm_jax.data import transforms
from ntm_jax.errors import UserError, shown
from ntm_jax.runtime import sharding
from ntm_jax.runtime.config import (
    SOLVERS,
    Config,
    SampleOptions,
    check_guidance,
    check_value,
    guided,
)
from ntm_jax.runtime.run import Run
from ntm_jax.sampling import inverses

BATCH = 100  # images at a time, of pictures and of scores, so that one program serves both


@dataclasses.dataclass(frozen=True)
class Sampler:
    """The static arguments of sampling, for which the jitted function compiles once."""

    model: NTM  # exact; see core.model.exact
    schedule: Schedule
    options: SampleOptions
    mesh: jax.sharding.Mesh | None  # of the inverse `auto`; see inverses.choose
    denoiser: Predictor | None = None  # of the decoder `denoiser`

    def inverse(self, rows: int) -> str:
        """The inverse of this many latents of all devices: parallel or sequential."""
        return inverses.choose(self.options.inverse, self.model.config, rows, self.mesh)


class Drawn(NamedTuple):
    """Samples, their levels, and the log-density of their trajectories.

    samples: [n, H, W, C], integers 0..V-1 or float32 latents, or [n, D] of arrays in their units.
    levels: x_T..x_0 from pure noise down, [n, K, ...] float32, as the model has them: pixels in
      [-1, 1], arrays standardised.
    log_prob_by_factor: [n, K] float32, nats, from pure noise down: log p(x_T), then
      log p(x_k | x_{k+1}, y). They are densities of the levels, of arrays in standardised units.
    """

    samples: np.ndarray
    levels: np.ndarray
    log_prob_by_factor: np.ndarray

    @property
    def log_prob(self) -> np.ndarray:
        """log p(x_0..x_T | y) of every sample, [n] float64, nats."""
        return self.log_prob_by_factor.sum(-1, dtype=np.float64)


@functools.partial(jax.jit, static_argnames=("sampler", "with_levels", "with_log_prob"))
def generate_tokens(params, root, index, y, denoiser_params=None, *, sampler: Sampler,
                    with_levels: bool = False, with_log_prob: bool = False):
    """Clean tokens [B, N, D] of the image indices [B] on condition y.

    with_levels: also returns x_0..x_T [B, K, N, D]; None otherwise. with_log_prob: returns a third
    array, the log-densities [B, K] of core.sampling.sample_with_log_prob.
    """
    model, schedule, options = sampler.model, sampler.schedule, sampler.options
    keys = example_keys(root, "sample", index)
    if options.decoder in SOLVERS:
        noise = example_noise(keys, (model.config.tokens, model.config.dim))
        t = schedule.levels(options.steps, jnp.zeros(len(index)))
        nothing = null(y, model.config.num_classes)
        with precision(model.config.precision):
            xs = flow_matching.solve(
                functools.partial(model.backbone.apply, flow_matching.backbone_params(params)),
                noise, t, y, nothing, options.guidance, options.decoder == "heun")
        return xs[:, 0], xs if with_levels else None
    t = schedule.fixed_levels(options.steps, len(index))
    us, log_density = sampling.draw_latents(model, params, keys, t, y, options.guidance)
    xs = None
    if with_levels or with_log_prob or options.decoder == "score":
        how = sampler.inverse(len(index) * options.steps)
        xs, log_det = sampling.invert_with_log_det(model, params, us, t, y, how)
        log_density -= log_det
    if options.decoder == "denoiser":
        x = denoising.denoise(exact(sampler.denoiser), denoiser_params, us[:, 0], t[:, 0],
                              options.steps, y)
    elif options.decoder == "score":
        x = denoising.score_denoise(model, params, xs, t, y, options.percentile)
    else:
        x_0 = xs[:, 0] if xs is not None else sampling.invert_level(
            model, params, us, t, y, 0, sampler.inverse(len(index)))
        x = x_0 / (1 - per_example(t[:, 0], x_0))
    found = x, xs if with_levels else None
    return (*found, log_density) if with_log_prob else found


@functools.lru_cache(maxsize=2)
def _records(data, split: str):
    """The records of a split, opened once for all batches."""
    return data.open(split).records


def conditions(run: Run, index):
    """The default condition of these image indices.

    The classes in turn, or the texts or vectors of the held-out records in turn.
    """
    model = run.model.config
    if not (model.text_width or model.condition_width):
        return index % max(model.num_classes, 1)
    records = _records(run.config.data, run.config.evaluate.split)
    chosen = [records[int(i) % len(records)] for i in index]
    if model.condition_width:
        values = np.stack([record["condition"] for record in chosen])
        return Vector(values, np.ones(len(values), bool))
    return Text(*(np.stack([record[name] for record in chosen]) for name in ("text", "text_mask")))


def check_condition(run: Run, n: int, label):
    """The condition of n images as arrays: labels [n], or the Text or Vector of such a model.

    label: one label, labels [n], integers or names of classes; Text with states [n, M, E] and mask
    [n, M]; one vector [E] or vectors [n, E] in their own units. Raises UserError where it does not
    fit the model.
    """
    classes, width = run.model.config.num_classes, run.model.config.text_width
    if run.model.config.condition_width:
        return _check_vector(run, n, label)
    if width:
        fits = isinstance(label, Text) and np.shape(label.states)[::2] == (n, width)
        if not fits or np.shape(label.mask) != label.states.shape[:2]:
            raise UserError("the model is conditioned on text: give label=Text(states "
                            f"[{n}, M, {width}], mask [{n}, M]) of "
                            "ntm_jax.core.transformer.conditions")
        return Text(np.asarray(label.states, np.float16), np.asarray(label.mask, bool))
    if label is None and classes:
        raise UserError(f"no label is given, and the model has {classes} classes: give one label, "
                        f"or one for each of the {n} images")
    if label is not None and not classes:
        raise UserError(f"label {shown(label)} is given, and the model has no classes: leave it "
                        "out")
    label = np.asarray(0 if label is None else label)
    if label.dtype == object:  # such as a column of pandas
        label = np.array(label.tolist())
    if label.dtype.kind == "U":
        label = np.vectorize(lambda name: run.spec.label_of(str(name)))(label)
    if label.dtype.kind not in "iu":
        raise UserError(f"label {shown(label.tolist())} is given: expected the number of a class, "
                        f"0 to {classes - 1}, or its name")
    if label.shape not in ((), (1,), (n,)):
        raise UserError(f"label has shape {label.shape}: expected one label, or one for each of "
                        f"the {n} images")
    label = np.broadcast_to(label, n)
    if classes and not ((0 <= label) & (label < classes)).all():
        raise UserError(f"labels run from {label.min()} to {label.max()}: expected 0 to "
                        f"{classes - 1}")
    return label.astype(np.int32)


def _check_vector(run: Run, n: int, condition) -> Vector:
    """Vectors [E] or [n, E] in their own units, standardised as the condition of n records."""
    width, spec = run.model.config.condition_width, run.spec
    expected = f"expected {width} numbers [{width}], or [{n}, {width}]"
    if condition is None:
        raise UserError("no condition is given, and the model is conditioned on vectors: "
                        f"{expected}")
    values = np.asarray(condition)
    if values.dtype.kind not in "fiu" or values.shape not in ((width,), (1, width), (n, width)):
        raise UserError(f"condition is {values.dtype} {list(values.shape)}: {expected}")
    if not np.isfinite(values).all():
        raise UserError("condition holds a number that is not finite")
    values = transforms.standardise(values, spec.condition_mean, spec.condition_std)
    return Vector(np.broadcast_to(values, (n, width)), np.ones(n, bool))


def own_conditions(run: Run, y: Vector) -> np.ndarray:
    """Standardised vectors in their own units, [n, E] float64."""
    return transforms.unstandardise(y.values, run.spec.condition_mean, run.spec.condition_std)


def sample_at(run: Run, index, condition=None, options: SampleOptions | None = None,
              seed: int | None = None, with_levels: bool = False):
    """The images of these indices [n] on a condition, labels [n], Text or Vector; see conditions.

    options and seed: the configuration's by default. Returns images [n, H, W, C], uint8 0..V-1, or
    float32 latents, or rows [n, D] of an array in its units; with_levels also the levels from pure
    noise down, [n, K, ...], of an array in standardised units.
    """
    spec = run.spec
    x, xs = _tokens_at(run, index, condition, options, seed, with_levels=with_levels)
    if not with_levels:
        return spec.from_tokens(x)
    return spec.from_tokens(x), spec.from_tokens(xs, own_units=False)[:, ::-1]


def draw_at(run: Run, index, condition=None, options: SampleOptions | None = None,
            seed: int | None = None) -> Drawn:
    """The samples of sample_at, with their levels and the log-density of their trajectories.

    Raises UserError for an ODE's solver, whose samples have no such density.
    """
    options, spec = options or run.config.sample.options, run.spec
    if options.decoder in SOLVERS:
        raise UserError(f"decoder={options.decoder} solves an ODE, whose samples have no "
                        "trajectory density: sample without the log-density")
    x, xs, log_density = _tokens_at(run, index, condition, options, seed, with_levels=True,
                                    with_log_prob=True)
    levels = transforms.unpatchify(xs, spec.image_shape, spec.patch_size)[:, ::-1]
    return Drawn(spec.from_tokens(x), levels.reshape(*levels.shape[:2], *spec.data_shape),
                 log_density[:, ::-1])


def _tokens_at(run: Run, index, condition, options, seed: int | None, with_levels: bool,
               **wanted) -> list:
    """generate_tokens of these indices [n], on the host."""
    options = options or run.config.sample.options
    check_decoder(run, options.decoder)
    denoiser = run.denoiser if options.decoder == "denoiser" else None
    sampler = Sampler(exact(run.model), run.schedule, options, run.mesh,
                      denoiser and denoiser.module)
    index = np.asarray(index, np.int32)
    y = conditions(run, index) if condition is None else condition
    y = y if isinstance(y, (Text, Vector)) else np.asarray(y, np.int32)
    placed, y = sharding.place((index, y), run.mesh)
    with sharding.use(run.mesh):  # score denoising has the levels anyway: the same program
        found = generate_tokens(
            run.params, jax.random.key(run.config.seed if seed is None else seed), placed, y,
            denoiser and denoiser.params, sampler=sampler,
            with_levels=with_levels or options.decoder == "score", **wanted)
    return [part if part is None else sharding.to_host(part)[: len(index)] for part in found]


def _plain(option):
    """An option of sampling, NumPy's numbers as Python's."""
    if isinstance(option, (np.generic, np.ndarray)):
        return option.tolist()
    return [_plain(one) for one in option] if isinstance(option, (tuple, list)) else option


def override(config: Config, **given) -> SampleOptions:
    """The configuration's options of sampling with the given ones that are not None.

    Raises UserError for an option that is unknown, or whose value its setting does not take.
    """
    given = {name: _plain(value) for name, value in given.items() if value is not None}
    values = dataclasses.asdict(config.sample.options) | given
    options = typed.read(SampleOptions, values, "sample")
    for name in given:
        check_value(f"sample.{name}", getattr(options, name))
    check(config, options)
    return options


def check(config: Config, options: SampleOptions) -> None:
    """Checks options of sampling that differ from the configuration's.

    Raises UserError for guidance of another length than the steps, or that the model was not
    trained for. Warns of a number of steps that it was not trained with.
    """
    guidance, steps, own = options.guidance, options.steps, config.sample
    check_guidance("guidance", guidance, steps)
    if guidance != own.guidance and guided(guidance) and not config.train.condition_dropout:
        raise UserError(f"guidance is {guidance}, and the model was trained without condition "
                        "dropout: sample with guidance 0")
    trained = config.trajectory.steps
    if steps != own.steps and steps not in trained and options.decoder not in SOLVERS:
        warnings.warn(f"{steps} steps were not trained, only {', '.join(map(str, trained))}: "
                      "expect worse images", stacklevel=2)


def check_decoder(run: Run, decoder: str) -> None:
    """Raises UserError for a decoder that needs a denoiser or an ODE that the run does not have."""
    velocity = run.config.sample.decoder in SOLVERS or (
        run.model.backbone is not None and not run.model.config.transporter_blocks)
    if decoder in SOLVERS and not velocity:
        raise UserError(f"decoder={decoder} solves the ODE of a flow-matching model, and this run "
                        "is not one: take inverse or score")
    if decoder == "denoiser" and not run.denoiser:
        raise UserError("decoder=denoiser needs a denoiser, and this run has none: give as "
                        "--workdir the run of one, trained with config.train.objective=denoiser "
                        "and --config.teacher")


def in_batches(n: int, batch: int) -> list[np.ndarray]:
    """Image indices 0..n-1, `batch` at a time."""
    return [np.arange(start, min(start + batch, n)) for start in range(0, n, batch)]


def parse_guidance(scales) -> float | tuple[float, ...] | None:
    """Texts -> one guidance scale, or a tuple with one for each step; None without texts.

    Raises UserError for a text that is not a number.
    """
    if not scales:
        return None
    try:
        scales = tuple(float(scale) for scale in scales)
    except ValueError:
        scales = (math.nan,)
    if not all(map(math.isfinite, scales)):
        raise UserError("--guidance takes a number, or one for each step, such as 1,0.5,0,0")
    return scales[0] if len(scales) == 1 else scales


def parse_vectors(texts) -> tuple[tuple[float, ...], ...] | None:
    """Texts such as 0.5,-1.2 -> vectors; None without texts.

    Raises UserError for a text that does not hold finite numbers.
    """
    if not texts:
        return None
    try:
        vectors = tuple(tuple(map(float, text.split(","))) for text in texts)
    except ValueError:
        vectors = ((math.nan,),)
    if not all(math.isfinite(number) for vector in vectors for number in vector):
        raise UserError("--condition takes numbers separated by commas, such as 0.5,-1.2")
    return vectors
