"""From an experiment's ConfigDict to frozen dataclasses, checked: below this file no ConfigDict is seen.

A section's keys are all given, none is unknown, and each has the type stated here; a violation is a UserError of one line.
"""

import dataclasses
import math
import typing

from etils import epath

from ntm_jax import files, typed
from ntm_jax.core import trajectory
from ntm_jax.core.layers import REMAT
from ntm_jax.core.transporter import INVERSES
from ntm_jax.data import sources
from ntm_jax.data.pipeline import DataSpec
from ntm_jax.data.sources import Source
from ntm_jax.errors import UserError
from ntm_jax.runtime import checkpoint


@dataclasses.dataclass(frozen=True)
class Data:
    source: str  # digits, mnist_5k, emoji, shapes, tfds:NAME, folder:PATH, records:PATH, mock:SHAPE, toy:NAME
    split: str  # with a slice if wished: train, train[:1350]
    batch_size: int  # global
    patch_size: int
    image_size: int  # 0: as stored
    workers: int  # 0: read in the training process
    mock: str  # the shape of the records, as a mock source, for compiling where the data are not at hand; may be empty
    text: str = ""  # the encoder of captions, see data.text; of records the one they were prepared with, and may be empty

    def open(self, split: str) -> Source:
        """A split of the source; UserError as sources.open_source."""
        return sources.open_source(self.source, split, self.image_size, self.text)


@dataclasses.dataclass(frozen=True)
class Trajectory:
    schedule: str  # linear, shifted
    shift: float | None  # of the shifted schedule; None: from the number of tokens
    steps: tuple[int, ...]  # the numbers of steps T that are trained together
    t_min: float  # evaluation and sampling
    t_min_range: tuple[float, float]  # training, uniform


@dataclasses.dataclass(frozen=True)
class Model:
    width: int
    head_size: int
    kv_heads: int
    mlp_ratio: int
    positions: str  # learned, rotary
    transporter_width: int
    transporter_blocks: int  # 0: no transporter, Gaussian denoising
    transporter_layers: int
    predictor_layers: int
    head: str  # direct, preconditioned, posterior
    log_scale_bound: float
    data_std: float
    condition: str  # none, class, text
    dtype: str  # float32, bfloat16
    remat: str  # none, full, narrow, dots; see core.layers.REMAT
    scan: bool
    backbone: str = "transformer"  # of the posterior head: transformer (core.flow_matching.Velocity), flux2 (backbones.flux2)
    double_layers: int = 0  # of flux2, before the predictor_layers single ones
    transporter_text: bool = False  # with condition=text: whether the transporter is told the text too, its tokens' mean
    transporter_positions_std: float = 0.02  # of the transporter's new table of positions, with positions=learned


@dataclasses.dataclass(frozen=True)
class Train:
    objective: str  # end_to_end, pairwise, flow_matching, denoiser
    steps: int
    save_every: int
    evaluate_every: int
    log_every: int
    keep: int  # keeps every Nth step's checkpoint beside the last three and the best; 0: none
    accumulate: int  # parts that a batch is taken in, one after the other: less memory, the same step
    condition_dropout: float
    align_weight: float = 0.0  # lambda, annealed to 0: holds the means near those of the flow-matching model that init_from names
    level_power: float = 0.0  # p: a factor counts t_k^p in what is minimised, t_k its target's level; 0: alike, as in the likelihood


@dataclasses.dataclass(frozen=True)
class Optimizer:
    learning_rate: float
    floor: float
    warmup_steps: int
    weight_decay: float
    clip: float
    ema_decay: float


@dataclasses.dataclass(frozen=True)
class Mesh:
    slices: int  # TPU slices, joined by the data centre's network; each holds 1/slices of the data axis
    data: int  # -1, here or at another axis: what the devices leave
    fsdp: int
    tensor: int
    sequence: int


@dataclasses.dataclass(frozen=True)
class Evaluate:
    split: str
    trajectories: int  # an example, for the importance-weighted bound
    batch_size: int
    images: int  # samples that are scored beside the training images; 0: none
    features: str = "none"  # they are compared by: none, pixels, cnn (trained on the training images), inception; see runtime.quality


@dataclasses.dataclass(frozen=True)
class Sample:
    num: int
    steps: int
    guidance: float | tuple[float, ...]  # of all steps, or one for each, from pure noise down
    decoder: str  # inverse, score, denoiser; euler, heun: the ODE of a flow-matching model
    inverse: str = "auto"  # auto, parallel, sequential: how the transporter is inverted; see core.transporter
    percentile: float = 100.0  # of the score decoder: clips the gradient there; 100: not


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment."""

    seed: int
    data: Data
    trajectory: Trajectory
    model: Model
    train: Train
    optimizer: Optimizer
    mesh: Mesh
    evaluate: Evaluate
    sample: Sample
    teacher: str = ""  # of the denoiser objective: the run that is distilled, its folder or WORKDIR/checkpoints/STEP
    init_from: str = ""  # a new run starts from these parameters: an export, a run's folder, WORKDIR/checkpoints/STEP, public weights

    @property
    def raw(self) -> dict:
        """The same as plain JSON values."""
        return files.plain(dataclasses.asdict(self))

    @property
    def evaluation_steps(self) -> int:
        """The number of steps T that likelihoods are of: those of sampling, but for a flow-matching model, whose ODE has more."""
        return max(self.trajectory.steps) if self.train.objective == "flow_matching" else self.sample.steps

    def shift(self, tokens: int) -> float:
        """The schedule's shift m for a sequence of `tokens` tokens."""
        return trajectory.default_shift(tokens) if self.trajectory.shift is None else self.trajectory.shift


CONFIG = "config.json"
DAMAGED = "give launch/train.py the run's own command, which writes it anew from the last checkpoint's copy of the settings"
SOLVERS = ("euler", "heun")
RESUMABLE = ("mesh.", "data.workers", "data.mock", "train.steps", "train.accumulate", "train.save_every", "train.evaluate_every",
             "train.log_every", "train.keep", "optimizer.", "evaluate.", "sample.")  # what a resumed run may change
CHOICES = {
    "trajectory.schedule": ("linear", "shifted"), "model.positions": ("learned", "rotary"),
    "model.head": ("direct", "preconditioned", "posterior"), "model.backbone": ("transformer", "flux2"),
    "model.condition": ("none", "class", "text"), "model.dtype": ("float32", "bfloat16"), "model.remat": tuple(REMAT),
    "train.objective": ("end_to_end", "pairwise", "flow_matching", "denoiser"),
    "sample.decoder": ("inverse", "score", "denoiser", *SOLVERS),
    "sample.inverse": INVERSES,
    "evaluate.features": ("none", "pixels", "cnn", "inception"),
}
NON_NEGATIVE = ("train.keep", "train.condition_dropout", "train.align_weight",
                "train.level_power", "optimizer.floor", "optimizer.warmup_steps", "optimizer.weight_decay", "evaluate.images",
                "sample.guidance", "trajectory.t_min", "trajectory.t_min_range", "sample.num", "train.evaluate_every")
ANY_SIGN = ("trajectory.shift", "mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.sequence")


LARGEST_SIZE = 2**31 - 1  # sizes and indices of arrays are int32
LARGEST_FLOAT = 3e38  # numbers are float32
RANGES = {  # of settings with bounds of their own: the least and the largest value
    "seed": (0, 2**32 - 1),  # a key of jax takes 32 bits: a larger seed would be the same as a smaller one
    "optimizer.ema_decay": (0, math.nextafter(1, 0)), "data.workers": (0, 1024), "data.image_size": (0, 65_536),
    "evaluate.trajectories": (1, 1_000_000), "trajectory.steps": (1, 10_000), "sample.steps": (1, 100_000), "sample.percentile": (0, 100),
    "model.predictor_layers": (1, 1000), "model.double_layers": (0, 1000), "model.transporter_layers": (1, 1000),
    "model.transporter_blocks": (0, 100),
}


def read(config) -> Config:
    """A ConfigDict or a plain dict -> Config. Raises UserError naming the key, what was found and what was expected."""
    values = config.to_dict() if hasattr(config, "to_dict") else config
    result = typed.read(Config, values, "config")
    for key, value in flatten(result.raw).items():
        _check_value(key, value)
    _check_levels(result)
    _check_training(result)
    _check_flow(result)
    if result.sample.decoder == "denoiser" and not result.teacher:
        raise UserError("config.sample.decoder=denoiser needs a denoiser: train one with experiments/digits_denoiser.py")
    check_guidance("config.sample.guidance", result.sample.guidance, result.sample.steps)
    if guided(result.sample.guidance) and not result.teacher and not result.train.condition_dropout:
        raise UserError("config.sample.guidance needs a model trained with condition dropout: set config.train.condition_dropout to 0.1")
    return result


def _check_value(key: str, value) -> None:
    """UserError where a setting, or an element of it, lies outside its choices or its bounds."""
    if key in CHOICES and value not in CHOICES[key]:
        raise UserError(f"config.{key} is {value!r}: expected one of {', '.join(CHOICES[key])}")
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            continue
        if key in RANGES:
            low, high = RANGES[key]
            if not low <= number <= high:
                shown = "less than 1" if key == "optimizer.ema_decay" else f"at most {high}"
                raise UserError(f"config.{key} is {number}: expected at least {low} and {shown}")
            continue
        low = 0 if key in NON_NEGATIVE else None if key in ANY_SIGN else 1e-12
        if low is not None and number < low:
            raise UserError(f"config.{key} is {number}: expected {'a number that is not negative' if low == 0 else 'more than 0'}")
        largest = LARGEST_SIZE if isinstance(number, int) else LARGEST_FLOAT
        if abs(number) > largest:
            raise UserError(f"config.{key} is {number}: expected at most {largest}")


def _check_training(config: Config) -> None:
    train, optimizer, condition = config.train, config.optimizer, config.model.condition
    if train.condition_dropout >= 1 or (train.condition_dropout and condition == "none"):
        raise UserError(f"config.train.condition_dropout is {train.condition_dropout}: expected less than 1, and 0 where "
                        "config.model.condition is none")
    if optimizer.floor > optimizer.learning_rate:
        raise UserError(f"config.optimizer.floor is {optimizer.floor}: expected at most config.optimizer.learning_rate, "
                        f"{optimizer.learning_rate}, from which the rate falls to it")
    if config.model.transporter_text and condition != "text":
        raise UserError(f"config.model.transporter_text tells the transporter texts, and config.model.condition is {condition}: set that "
                        "to text, or transporter_text to False")
    if (train.objective == "denoiser") != bool(config.teacher):
        raise UserError(f"config.teacher is {config.teacher!r}, config.train.objective {train.objective}: a denoiser, and nothing else, "
                        "has a teacher; give --config.teacher=WORKDIR of the run to distil")
    if train.level_power and train.objective not in ("end_to_end", "pairwise"):
        raise UserError(f"config.train.level_power is {train.level_power}: it weighs a trajectory's factors, and "
                        f"config.train.objective={train.objective} has none; set it to 0")


def guided(guidance) -> bool:
    """Whether any step is guided."""
    return any(guidance) if isinstance(guidance, tuple) else bool(guidance)


def check_guidance(name: str, guidance, steps: int) -> None:
    """UserError where a schedule of guidance, called `name`, is not one scale for each of the steps."""
    if isinstance(guidance, tuple) and len(guidance) != steps:
        raise UserError(f"{name} has {len(guidance)} scales, and there are {steps} steps: give one scale, or {steps}, from pure noise down")


def _check_flow(config: Config) -> None:
    flow = config.train.objective == "flow_matching"
    if flow and (config.model.head != "posterior" or config.model.transporter_blocks):
        raise UserError(f"config.train.objective=flow_matching trains the backbone of config.model.head=posterior, found "
                        f"{config.model.head}, and of config.model.transporter_blocks=0, found {config.model.transporter_blocks}")
    if config.sample.decoder in SOLVERS and not flow:
        raise UserError(f"config.sample.decoder={config.sample.decoder} solves the ODE of a flow-matching model: expected "
                        "config.train.objective=flow_matching, or a decoder of inverse, score, denoiser")
    if config.train.align_weight and (config.model.head != "posterior" or flow or not config.init_from):
        raise UserError(f"config.train.align_weight is {config.train.align_weight}: it holds a model with config.model.head=posterior near "
                        "the flow-matching model that config.init_from names; give both, or align_weight 0")


def _check_levels(config: Config) -> None:
    c = config.trajectory
    low, high = c.t_min_range
    if not c.steps:
        raise UserError("config.trajectory.steps is empty: give the numbers of steps, such as (4,)")
    if not 0 <= low <= high < 1 or not 0 < c.t_min < 1:
        raise UserError(f"config.trajectory.t_min_range is {low, high} and t_min {c.t_min}: expected 0 <= lo <= hi < 1 and 0 < t_min < 1")
    if config.model.head != "direct" and low < 1e-3:
        raise UserError(f"config.trajectory.t_min_range starts at {low}: the {config.model.head} head's scale vanishes with t_min, so lo "
                        "must be at least 0.001 (or take config.model.head=direct)")
    if c.schedule == "shifted":
        shift = trajectory.default_shift(1) if c.shift is None else c.shift  # m grows with the number of tokens, and s_1 with m
        first = float(trajectory.level(1, max(c.steps), low, c.schedule, shift))
        if high >= first or c.t_min >= first:
            raise UserError(f"config.trajectory.t_min_range ends at {high}, t_min is {c.t_min}: both must lie below the first level "
                            f"{first:.4f} of {max(c.steps)} steps; lower them or raise config.trajectory.shift")


def flatten(values: dict, prefix: str = "") -> dict:
    """Nested dicts -> {"section.key": value}."""
    flat = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _defaults(cls, prefix: str = "") -> dict:
    """{"section.key": value} of the settings that may be left out."""
    found = {}
    for key, kind in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            found |= _defaults(kind, f"{prefix}{key}.")
    return found | {f"{prefix}{f.name}": f.default for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING}


def fixed(config: Config, spec: DataSpec) -> dict:
    """{"section.key": JSON value} of what a run is, which no resume may change: every setting but RESUMABLE, and the data's shape.

    Settings at their defaults are left out, so that a later version may add one.
    """
    defaults = _flat_defaults()
    return {key: value for key, value in flatten(_content(config, spec)).items()
            if not key.startswith(RESUMABLE) and (key not in defaults or defaults[key] != value)}


def differences(before: dict, now: dict) -> list[tuple]:
    """[(key, value before, value now)] of two flat dicts of settings, in which a default may be left out."""
    defaults = _flat_defaults()
    return [(key, one, other) for key in sorted(before | now)
            if (one := before.get(key, defaults.get(key))) != (other := now.get(key, defaults.get(key)))]


def _flat_defaults() -> dict:
    return files.plain(_defaults(Config) | _defaults(DataSpec, "spec."))


def claim(workdir: str, config: Config, spec: DataSpec) -> list[str]:
    """Finds whether the workdir holds a run of this configuration, or none; returns what was changed since it began, a line each.

    Where config.json is missing or damaged, the copy of the settings in the last checkpoint counts.

    Raises UserError, nothing written, where the run there differs in more than a resume may change.
    """
    path = epath.Path(workdir) / CONFIG
    damage, before = None, None
    if path.exists():
        try:
            before = flatten(files.read_json(path, DAMAGED))
        except UserError as error:
            damage = error
    mended = []
    if before is None:
        saved = checkpoint.saved_settings(workdir)
        if saved is None:
            return [f"{CONFIG} was damaged, and there is no checkpoint: the run starts anew"] if damage else []
        if not saved:
            raise damage or UserError(f"{workdir} holds checkpoints but no {CONFIG}: expected a run's folder or a new one; give another "
                                      "--workdir")
        before = saved | {key: value for key, value in flatten(_content(config, spec)).items() if key.startswith(RESUMABLE)}
        mended = [f"{CONFIG} was {'damaged' if damage else 'missing'} and is written anew: the last checkpoint has the same settings"]
    changed = differences(before, flatten(_content(config, spec)))
    for key, one, other in changed:
        if not key.startswith(RESUMABLE):
            raise UserError(f"{workdir} holds a run with {key} = {one!r}, and this one has {other!r}: give another --workdir to start "
                            "anew, or that value to resume")
    return mended + [f"changed since the run began: {key}: {one!r} -> {other!r}" for key, one, other in changed]


def write(workdir: str, config: Config, spec: DataSpec) -> None:
    """Writes workdir/config.json, sealed: the settings, and the shape of the data under `spec`."""
    folder = epath.Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(folder / CONFIG, _content(config, spec), sealed=True)


def load(workdir: str) -> tuple[Config, DataSpec]:
    """The configuration of the run in a workdir and the shape of its data, which need not be at hand.

    Raises UserError where there is none, or config.json was damaged or edited.
    """
    path = epath.Path(workdir) / CONFIG
    if not path.exists():
        raise UserError(f"{workdir} holds no run (no config.json there): give the --workdir that launch/train.py was given")
    content = files.read_json(path, DAMAGED)
    settings = {key: value for key, value in content.items() if key != "spec"}
    try:
        return read(settings), typed.read(DataSpec, content.get("spec"), "spec")
    except UserError as error:
        raise UserError(f"{path} cannot be used ({error}): {DAMAGED}") from None


def _content(config: Config, spec: DataSpec) -> dict:
    return files.plain(dataclasses.asdict(config) | {"spec": dataclasses.asdict(spec)})
