"""An experiment's settings as frozen dataclasses, read from its ConfigDict and checked.

A ConfigDict does not go below this file. experiments/default.py documents every setting; every key
is required but those with a default here, which older files lack, and unknown keys are errors. What
an objective requires of a configuration is checked by training.objectives.
"""

import dataclasses
import math

from ntm_jax import backbones, decoders, files, typed
from ntm_jax.core.config import HEADS, POSITIONS
from ntm_jax.core.trajectory import Schedule, default_shift, shifted
from ntm_jax.core.transformer.layers import REMAT
from ntm_jax.core.transporter import INVERSES
from ntm_jax.data import sources
from ntm_jax.data.sources import Source
from ntm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Data:
    """Where examples come from, and how they are batched."""

    source: str
    split: str
    batch_size: int
    patch_size: int
    image_size: int
    workers: int
    mock: str
    text: str = ""
    token_size: int = 1

    def open(self, split: str, setting: str = "") -> Source:
        """A split of the source. Raises UserError like sources.open_source.

        setting: the setting that names the split, which an error about it then names.
        """
        try:
            return sources.open_source(
                self.source, split, self.image_size, self.text, self.token_size)
        except sources.SplitError as error:
            raise UserError(f"{setting}: {error}" if setting else str(error)) from None


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """The noise levels; see core.trajectory.Schedule."""

    schedule: str
    shift: float | None
    steps: tuple[int, ...]
    t_min: float
    t_min_range: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Model:
    """Sizes and kinds of the networks; see core.config.ModelConfig."""

    width: int
    head_size: int
    kv_heads: int
    mlp_ratio: int
    positions: str
    transporter_width: int
    transporter_blocks: int
    transporter_layers: int
    predictor_layers: int
    head: str
    log_scale_bound: float
    data_std: float
    condition: str
    dtype: str
    remat: str
    scan: bool
    backbone: str = "transformer"
    double_layers: int = 0
    transporter_text: bool = False
    transporter_positions_std: float = 0.02
    condition_layers: int = 0
    condition_shift: bool = False


@dataclasses.dataclass(frozen=True)
class Train:
    """What is minimised, for how long, and what is reported and saved on the way."""

    objective: str
    steps: int
    save_every: int
    evaluate_every: int
    log_every: int
    keep: int
    accumulate: int
    condition_dropout: float
    align_weight: float = 0.0
    level_power: float = 0.0
    save_minutes: float = 10.0


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW with warm-up and cosine decay, and the decay of the parameters' moving average."""

    learning_rate: float
    floor: float
    warmup_steps: int
    weight_decay: float
    clip: float
    ema_decay: float


@dataclasses.dataclass(frozen=True)
class Mesh:
    """The sizes of the device mesh's axes; -1 infers one of them from the device count."""

    slices: int
    data: int
    fsdp: int
    tensor: int
    sequence: int


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """The held-out evaluation."""

    split: str
    trajectories: int
    batch_size: int
    images: int
    features: str = "none"


@dataclasses.dataclass(frozen=True)
class SampleOptions:
    """How images are made. Hashable, so that the jitted sampler takes it as a static argument."""

    steps: int  # T, or the steps of an ODE
    guidance: float | tuple[float, ...]  # one scale, or one for each step from pure noise down
    decoder: str
    inverse: str
    percentile: float


@dataclasses.dataclass(frozen=True)
class Sample:
    """How many images are made, and how."""

    num: int
    steps: int
    guidance: float | tuple[float, ...]
    decoder: str
    inverse: str = "auto"
    percentile: float = 100.0

    @property
    def options(self) -> SampleOptions:
        """How images are made, without their number, which must not recompile the sampler."""
        return SampleOptions(self.steps, self.guidance, self.decoder, self.inverse, self.percentile)


@dataclasses.dataclass(frozen=True)
class Reward:
    """Post-training on a reward; see training/reward."""

    name: str = ""
    samples: int = 8
    updates: int = 1
    ahead: bool = False
    clip: float = 0.2
    kl: float = 0.0
    novelty: float = 0.0
    diversity: float = 0.0
    normalise: bool = True
    anchor: float = 0.5
    trains: str = "predictor"
    levels: tuple[int, ...] = ()
    workers: int = 0


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of one experiment by section; see experiments/default.py."""

    seed: int
    data: Data
    trajectory: Trajectory
    model: Model
    train: Train
    optimizer: Optimizer
    mesh: Mesh
    evaluate: Evaluate
    sample: Sample
    reward: Reward = Reward()
    teacher: str = ""
    init_from: str = ""

    @property
    def raw(self) -> dict:
        """The same as plain JSON values."""
        return files.plain(dataclasses.asdict(self))

    @property
    def evaluation_steps(self) -> int:
        """The steps T of evaluated trajectories, those of sampling unless an ODE is sampled."""
        solves_ode = decoders.find(self.sample.decoder).solves_ode
        return max(self.trajectory.steps) if solves_ode else self.sample.steps

    def schedule(self, tokens: int) -> Schedule:
        """The noise levels for a sequence of `tokens` tokens."""
        c = self.trajectory
        shift = default_shift(tokens) if c.shift is None else c.shift
        return Schedule(c.schedule, shift, c.steps, c.t_min, c.t_min_range)

    def with_sampling(self, **settings) -> "Config":
        """The configuration with other settings of its section `sample`."""
        return dataclasses.replace(self, sample=dataclasses.replace(self.sample, **settings))

    def with_evaluation(self, **settings) -> "Config":
        """The configuration with other settings of its section `evaluate`."""
        return dataclasses.replace(self, evaluate=dataclasses.replace(self.evaluate, **settings))


CHOICES = {
    "trajectory.schedule": ("linear", "shifted"),
    "model.positions": POSITIONS,
    "model.head": HEADS,
    "model.condition": ("none", "class", "text", "vector"),
    "model.dtype": ("float32", "bfloat16"),
    "model.remat": tuple(REMAT),
    "sample.inverse": ("auto", *INVERSES),
    "reward.trains": ("predictor", "transporter", "both"),
    "evaluate.features": ("none", "pixels", "cnn", "inception"),
}
NON_NEGATIVE = (
    "train.keep", "train.save_minutes", "train.condition_dropout", "train.align_weight",
    "train.level_power", "train.evaluate_every", "optimizer.floor", "optimizer.warmup_steps",
    "optimizer.weight_decay", "evaluate.images", "sample.guidance", "sample.num",
    "trajectory.t_min", "trajectory.t_min_range", "reward.anchor", "reward.kl",
    "reward.novelty", "reward.diversity")
ANY_SIGN = ("mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.sequence")
LARGEST_SIZE = 2**31 - 1  # sizes and indices of arrays are int32
LARGEST_FLOAT = 3e38  # numbers are float32
SMALLEST_LAST_STEP = 1e-5  # of noise levels up to 1; below it, rounding moves scales by percents
RANGES = {  # the least and the largest value of settings with bounds of their own
    "seed": (0, 2**32 - 1),  # a jax key takes 32 bits: a larger seed would repeat a smaller one
    "optimizer.ema_decay": (0, math.nextafter(1, 0)),
    "data.workers": (0, 1024),
    "data.image_size": (0, 65_536),
    "evaluate.trajectories": (1, 1_000_000),
    "trajectory.steps": (1, 10_000),
    "trajectory.shift": (-50, 50),  # beyond, its exponential leaves float32
    "sample.steps": (1, 100_000),
    "sample.percentile": (0, 100),
    "reward.samples": (2, 65_536),
    "reward.workers": (0, 1024),
    "reward.levels": (0, 100_000),
    "reward.clip": (1e-6, 1),
    "model.predictor_layers": (1, 1000),
    "model.double_layers": (0, 1000),
    "model.condition_layers": (0, 100),
    "model.transporter_layers": (1, 1000),
    "model.transporter_blocks": (0, 100),
}


def read(config) -> Config:
    """A ConfigDict or a plain dict -> Config.

    Raises UserError that names the key, what was found and what was expected.
    """
    values = config.to_dict() if hasattr(config, "to_dict") else config
    result = typed.read(Config, values, "config")
    for key, value in flatten(result.raw).items():
        check_value(key, value)
    backbones.find(result.model.backbone)
    decoders.find(result.sample.decoder)
    _check_levels(result)
    _check_training(result)
    _check_sampling(result)
    return result


def check_value(key: str, value) -> None:
    """Raises UserError where a setting, or an element of it, lies outside its choices or bounds."""
    if key in CHOICES and value not in CHOICES[key]:
        raise UserError(f"config.{key} is {value!r}: expected one of {', '.join(CHOICES[key])}")
    for number in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            continue
        if key in RANGES:
            low, high = RANGES[key]
            if not low <= number <= high:
                most = "less than 1" if key == "optimizer.ema_decay" else f"at most {high}"
                raise UserError(f"config.{key} is {number}: expected at least {low} and {most}")
            continue
        low = 0 if key in NON_NEGATIVE else None if key in ANY_SIGN else 1e-12
        if low is not None and number < low:
            expected = "a number that is not negative" if low == 0 else "more than 0"
            raise UserError(f"config.{key} is {number}: expected {expected}")
        largest = LARGEST_SIZE if isinstance(number, int) else LARGEST_FLOAT
        if abs(number) > largest:
            raise UserError(f"config.{key} is {number}: expected at most {largest}")


def _check_training(config: Config) -> None:
    train, optimizer, condition = config.train, config.optimizer, config.model.condition
    dropout = train.condition_dropout
    if dropout >= 1 or (dropout and condition == "none"):
        raise UserError(f"config.train.condition_dropout is {dropout}: expected less than 1, and 0 "
                        "where config.model.condition is none")
    if optimizer.floor > optimizer.learning_rate:
        raise UserError(f"config.optimizer.floor is {optimizer.floor}: expected at most "
                        f"config.optimizer.learning_rate, {optimizer.learning_rate}, from which "
                        "the rate falls to it")
    if config.model.condition_layers and condition != "vector":
        raise UserError("config.model.condition_layers compute features of a vector, and "
                        f"config.model.condition is {condition}: set it to vector, or leave them "
                        "at 0")
    if config.model.condition_layers and config.model.head == "posterior":
        raise UserError("config.model.condition_layers compute features, which the velocity of "
                        "config.model.head=posterior does not take: leave them at 0, or take "
                        "another head")
    if config.model.condition_shift and condition != "vector":
        raise UserError("config.model.condition_shift subtracts a function of a vector, and "
                        f"config.model.condition is {condition}: set it to vector, or leave it "
                        "out")
    if config.model.transporter_text and condition != "text":
        raise UserError("config.model.transporter_text conditions the transporter on text, and "
                        f"config.model.condition is {condition}: set that to text, or "
                        "transporter_text to False")


def _check_sampling(config: Config) -> None:
    if decoders.find(config.sample.decoder).needs_denoiser and not config.teacher:
        raise UserError(f"config.sample.decoder={config.sample.decoder} needs a learned denoiser: "
                        "train one with config.train.objective=denoiser and --config.teacher")
    check_guidance("config.sample.guidance", config.sample.guidance, config.sample.steps)
    dropout = config.train.condition_dropout
    if guided(config.sample.guidance) and not config.teacher and not dropout:
        raise UserError("config.sample.guidance needs a model trained with condition dropout: set "
                        "config.train.condition_dropout to 0.1")


def guided(guidance) -> bool:
    """Whether any step is guided."""
    return any(guidance) if isinstance(guidance, tuple) else bool(guidance)


def check_guidance(name: str, guidance, steps: int) -> None:
    """Raises UserError where guidance, called `name`, is a tuple of another length than `steps`."""
    if isinstance(guidance, tuple) and len(guidance) != steps:
        raise UserError(f"{name} has {len(guidance)} scales, and there are {steps} steps: give one "
                        f"scale, or {steps}, from pure noise down")


def _check_levels(config: Config) -> None:
    c = config.trajectory
    low, high = c.t_min_range
    if not c.steps:
        raise UserError("config.trajectory.steps is empty: give the numbers of steps, such as (4,)")
    if not 0 <= low <= high < 1 or not 0 < c.t_min < 1:
        raise UserError(f"config.trajectory.t_min_range is {low, high} and t_min {c.t_min}: "
                        "expected 0 <= lo <= hi < 1 and 0 < t_min < 1")
    if config.model.head != "direct" and low < 1e-3:
        raise UserError(f"config.trajectory.t_min_range starts at {low}: the {config.model.head} "
                        "head's scale vanishes with t_min, so lo must be at least 0.001 (or take "
                        "config.model.head=direct)")
    most = max(c.steps)
    first = _shifted_level(c, 1, most)
    if c.schedule == "shifted" and high >= first:
        raise UserError(f"config.trajectory.t_min_range ends at {high}: it must lie below the "
                        f"first level {first:.4f} of {most} steps; lower it or raise "
                        "config.trajectory.shift")
    check_steps("config.trajectory.steps", most, c)
    check_steps("config.sample.steps", config.evaluation_steps, c)


def _shifted_level(trajectory: Trajectory, k: int, steps: int) -> float:
    """Level k > 0 of the shifted schedule of so many steps.

    The default shift, and so this level, grows with the number of tokens: it is that of one token.
    """
    shift = default_shift(1) if trajectory.shift is None else trajectory.shift
    return shifted(steps / k, shift)


def check_steps(name: str, steps: int, trajectory: Trajectory) -> None:
    """Raises UserError where so many steps, called `name`, have levels that do not ascend.

    Levels that float32 does not tell apart do not ascend.
    """
    if trajectory.schedule != "shifted":
        return
    first, t_min = _shifted_level(trajectory, 1, steps), trajectory.t_min
    if t_min >= first:
        raise UserError(f"{name} is {steps}: the first level of so many steps, {first:.4f}, does "
                        f"not lie above config.trajectory.t_min, {t_min}; take fewer steps, or "
                        "train with a lower t_min or a higher config.trajectory.shift")
    last_step = 1 - _shifted_level(trajectory, steps - 1, steps) if steps > 1 else 1
    if last_step < SMALLEST_LAST_STEP:
        raise UserError(f"{name} is {steps}: the last of so many steps goes up to level 1 by "
                        f"{last_step:.1e}, too little for float32; take fewer steps, or train with "
                        "a lower config.trajectory.shift")


def flatten(values: dict, prefix: str = "") -> dict:
    """Nested dicts -> {"section.key": value}."""
    flat = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat
