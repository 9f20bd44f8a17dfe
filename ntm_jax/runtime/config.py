"""Every setting of an experiment, declared once, and the configuration that holds their values.

A section is a dataclass whose fields are settings: default, meaning and values that it takes. The
flags, --helpfull, the reference page and the checks are made from them. A config.json that lacks a
newer setting has its default: changing that changes such a run. What an objective requires of a
configuration is checked by training.objectives.
"""

import dataclasses
import functools
import typing
from typing import Any, NoReturn

from ntm_jax import backbones, files
from ntm_jax.core import pixels
from ntm_jax.core.trajectory import Schedule, default_shift, shifted
from ntm_jax.core.transformer import REMAT
from ntm_jax.core.transporter import INVERSES
from ntm_jax.data import conditions, sources
from ntm_jax.data.sources import Source
from ntm_jax.errors import UserError, abbreviate
from ntm_jax.registry import load, present
from ntm_jax.runtime import renamed
from ntm_jax.typed import parse_dataclass, setting

# Sections that projects declare, by name: MODULE:DATACLASS, imported when a configuration is made.
SECTIONS = {"reward": "ntm_jax.projects.reward.settings:Reward"}
AUTO = "auto"  # config.sample.decoder, until a run is made


@dataclasses.dataclass(frozen=True)
class Data:
    """Where examples come from, and how they are batched."""

    source: str = setting(
        "mock:8x8x1,levels=17,classes=10",
        "Data source: digits, folder:PATH, tfds:NAME, toy:NAME and others.")
    split: str = setting(
        "train",
        "Training split, with an optional slice such as train[:1350] or train[shuffled][:90%].")
    batch_size: int = setting(32, "Examples per step, over all devices and processes.", low=1)
    patch_size: int = setting(
        1, "Side of the square of pixels or latents that forms one token.", low=1)
    image_size: int = setting(
        0, "Resizes images to this side, in pixels; 0 keeps the stored size.", low=0)
    flip: bool = setting(
        False, "Mirrors every other training image, left to right; captions and labels stay, so "
        "not for digits, text or captions that say left or right.")
    workers: int = setting(
        0, "Processes that read data; 0 reads in the training process.", low=0, high=1024)
    mock: str = setting(
        "", "Made-up data of the same shape, for compiling where the source is absent.")
    text_encoder: str = setting(
        "", "Text encoder: words:M:VOCABULARY, minilm[:M], transformers:FOLDER or flux2:FOLDER.")
    token_size: int = setting(
        1, "Columns of an array [n, D] that form one token; divides their number.", low=1)

    def open(self, split: str, setting: str = "") -> Source:
        """A split of the source. Raises UserError like sources.open_source.

        setting: the setting that names the split, which an error about it then names.
        """
        try:
            source = sources.open_source(
                self.source, split, self.image_size, self.text_encoder, self.token_size)
        except sources.SplitError as error:
            raise UserError(f"{setting}: {error}" if setting else str(error)) from None
        if self.flip and not source.pixel_levels:
            raise UserError(f"config.data.flip mirrors images of pixels, and {self.source} has "
                            f"{'rows of numbers' if source.columns else 'latents'}: set it to "
                            "False")
        return source


@dataclasses.dataclass(frozen=True)
class Model:
    """Sizes and kinds of the networks; see core.config.ModelConfig."""

    width: int = setting(128, "Width of the predictor, a multiple of head_size x kv_heads.", low=1)
    head_size: int = setting(32, "Width of one attention head.", low=1)
    kv_heads: int = setting(
        4, "Key and value heads; divides the number of heads, width / head_size.", low=1)
    mlp_ratio: int = setting(
        4, "Hidden width of an MLP, in multiples of the layer's width.", low=1)
    positions: str = setting("learned", "Position encoding.", choices=("learned", "rotary"))
    transporter_width: int = setting(
        128, "Width of the transporter, a multiple of head_size x kv_heads.", low=1)
    transporter_blocks: int = setting(
        2, "Invertible blocks; 0 is Gaussian denoising without transporter.", low=0)
    transporter_layers: int = setting(2, "Transformer layers in each block.", low=1)
    transporter_condition: str = setting(
        "class", "What the transporter sees of the condition: class, or text as its mean token; "
        "it always sees vectors. Guidance is exact where it sees none, as in new experiments.",
        choices=("none", "class", "text"))
    transporter_positions_std: float = setting(
        0.02, "Initial std of the transporter's position table.", above=0)
    predictor_layers: int = setting(4, "Transformer layers of the predictor.", low=1)
    head: str = setting(
        "preconditioned", "Parametrisation of the Gaussian; flow_matching is over a backbone, "
        "standard is N(0, I) without a predictor.",
        choices=("direct", "preconditioned", "flow_matching", "standard"))
    pixel_likelihood: str = setting(
        "binned", "p(x | x_0) of pixels: the Gaussian of x over bins, or Bayes' rule with a flat "
        "prior, with a histogram of the training data, and times a small network; learned has the "
        "histogram and trains the noise of t_min with the model; uniform dequantises pixels in "
        "place of Gaussian noise.", choices=pixels.KINDS)
    log_scale_bound: float = setting(
        3.0, "Largest absolute log-scale of a transporter block.", above=0)
    data_std: float = setting(
        1.0, "Standard deviation of the data, for preconditioning.", above=0)
    condition: str = setting(
        "class", "What the model is conditioned on: none, class, text, vector or your own.")
    condition_layers: int = setting(
        0, "With condition=vector, residual MLPs that compute features of it.", low=0)
    condition_shift: bool = setting(
        False, "With condition=vector, first subtracts a linear function of it.")
    backbone: str = setting(
        "transformer", "Network of head=flow_matching: transformer, flow_map, flux2 or your own.")
    double_layers: int = setting(
        0, "Two-stream layers of backbone=flux2, before the predictor_layers.", low=0)
    dtype: str = setting(
        "float32", "Type of activations in training.", choices=("float32", "bfloat16"))
    remat: str = setting("none", "What the backward pass recomputes.", choices=tuple(REMAT))
    scan: bool = setting(
        False, "Scans stacked layers: compiles faster; small models on CPUs run slower.")


@dataclasses.dataclass(frozen=True)
class Train:
    """What is minimised, for how long, and what is reported and saved on the way."""

    objective: str = setting(
        "end_to_end", "What is minimised: end_to_end, pairwise, flow_matching, flow_map, denoiser, "
        "policy_gradient, preference or your own.")
    steps: int = setting(2000, "Optimizer steps.", low=1)
    distil_steps: int = setting(
        0, "Steps that then distil a denoiser of the trained NTM, in WORKDIR/denoiser; 0 distils "
        "none.", low=0)
    save_every: int = setting(500, "Steps between checkpoints.", low=1)
    save_minutes: float = setting(
        10.0, "Longest time between checkpoints; 0 saves by steps alone.", low=0)
    evaluate_every: int = setting(
        500, "Steps between held-out evaluations; 0 writes evaluation.json only.", low=0)
    score_every: int = setting(
        0, "Steps between scores of samples by evaluate.features, which go to the metrics; 0 "
        "scores at the end only.", low=0)
    log_every: int = setting(50, "Steps between lines of metrics.", low=1)
    rehearse: str = setting(
        "auto", "Whether to evaluate, draw and score one batch before the first step, so that what "
        "would fail later fails then: auto (jobs of several processes), true or false.",
        choices=("auto", "true", "false"))
    patience: int = setting(
        0, "Stops after so many evaluations without a better held-out figure, and ends with the "
        "best step; 0 never stops early.", low=0)
    keep: int = setting(
        0, "Also keeps every Nth step's checkpoint; 0 keeps the last three and the best.", low=0)
    accumulate: int = setting(
        1, "Parts into which a batch is split to save memory; the step is the same.", low=1)
    pixel_likelihood_steps: int = setting(
        600, "Most steps of batch_size with which model.pixel_likelihood=network is fitted, before "
        "the first; those that held-out training records do not gain by are left out.", low=1)
    condition_dropout: float = setting(
        0.1, "Probability of the null condition, needed for guidance.", low=0, below=1)
    align_weight: float = setting(
        0.0, "lambda, annealed to 0: keeps means near those of the init_from model.", low=0)
    level_weight_power: float = setting(
        0.0, "p: weights each level's loss by t_k^p; 0 weights all levels equally.", low=0)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """The optimizer, its learning rate, and the decay of the parameters' moving average.

    All settings apply to every optimizer; momentum is fixed, see training.optimizers.
    """

    name: str = setting(
        "adamw", "Optimizer: adamw, muon (of the layers' matrices; adamw of the rest), lion, sgd "
        "(with Nesterov momentum) or your own.")
    schedule: str = setting(
        "cosine", "Course of the learning rate after the warmup.",
        choices=("cosine", "constant", "linear"))
    learning_rate: float = setting(2e-3, "Peak learning rate, after the warmup.", above=0)
    min_learning_rate: float = setting(
        1e-6, "Learning rate at the end, at most the peak; not of schedule=constant.", low=0)
    warmup_steps: int = setting(100, "Steps from 0 to the peak.", low=0)
    weight_decay: float = setting(
        0.1, "Decoupled weight decay, of all parameters, times the learning rate.", low=0)
    clip: float = setting(
        1.0, "Largest global norm of the gradient, which is clipped before the optimizer.", above=0)
    ema_decay: float = setting(
        0.999, "Decay of the parameters' moving average.", low=0, below=1)


@dataclasses.dataclass(frozen=True)
class Mesh:
    """The sizes of the device mesh's axes; -1 infers one of them from the device count."""

    slices: int = setting(
        1, "TPU slices or NVLink domains; each holds 1/slices of the data axis.", low=1)
    data: int = setting(
        -1, "Devices that split the batch; -1 infers one axis from the device count.", low=-1)
    fsdp: int = setting(
        1, "Devices that split the batch, parameters and optimizer state.", low=-1)
    tensor: int = setting(1, "Devices that split heads and MLPs.", low=-1)
    sequence: int = setting(1, "Devices that split tokens.", low=-1)


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """The held-out evaluation."""

    split: str = setting("test", "Held-out split, with an optional slice.")
    trajectories: int = setting(
        8, "Trajectories per example, for the importance-weighted bound.", low=1, high=1_000_000)
    batch_size: int = setting(
        100, "Examples per evaluation step, over all devices and processes.", low=1)
    num_samples: int = setting(
        0, "Samples to score against the training images; 0 scores none.", low=0)
    features: str = setting(
        "none", "What scores compare.", choices=("none", "pixels", "cnn", "inception"))
    inception_weights: str = setting(
        "", "Inception's weights for features=inception, a file of torch-fidelity's.")
    reference: str = setting(
        "", "An .npz of feature statistics, mu and sigma, to compare samples with in place of the "
        "training images.")


@dataclasses.dataclass(frozen=True)
class Sample:
    """How images are made, and how many.

    Static: all but `num` and `autoencoder` tell compiled samplers apart.
    """

    num: int = setting(100, "Images of a grid or a call of launch.sample.", low=0, compare=False)
    steps: int = setting(
        4, "Step count T, or steps of a flow-matching model's ODE solver.", low=1, high=100_000)
    guidance: float | tuple[float, ...] = setting(
        0.0, "Scale w, or one per step from noise down: (1.0, 0.5, 0.0, 0.0).", low=0)
    decoder: str = setting(
        AUTO, "Last step: inverse, score, denoiser, or auto, which is the run's own denoiser "
        "(train.distil_steps), else inverse with pixel_likelihood=learned, else score; ODE of flow "
        "matching: euler or heun.")
    inverse: str = setting(
        "auto", "How the transporter is inverted.", choices=("auto", *INVERSES))
    percentile: float = setting(
        100.0, "Clips the gradient of decoder=score at this percentile; 100 clips none.", low=0,
        high=100)
    autoencoder: str = setting(
        "", "Autoencoder that makes images of latents: kl:FOLDER, flux2:FOLDER or your own.",
        compare=False)


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of one experiment by section; `read` adds the sections of projects."""

    seed: int = setting(
        0, "Seed of parameters, data order, noise and samples.", low=0, high=2**32 - 1)
    init_from: str = setting(
        "", "Starting point: run, WORKDIR/checkpoints/STEP, export, hf://OWNER/NAME or weights.")
    teacher: str = setting(
        "", "Run that objective=denoiser distils: its folder or WORKDIR/checkpoints/STEP; .. is "
        "the folder that holds the denoiser's.")
    data: Data = Data()
    trajectory: Schedule = dataclasses.field(default_factory=Schedule)
    model: Model = Model()
    train: Train = Train()
    optimizer: Optimizer = Optimizer()
    mesh: Mesh = Mesh()
    evaluate: Evaluate = Evaluate()
    sample: Sample = Sample()

    if typing.TYPE_CHECKING:

        def __getattr__(self, section: str) -> Any: ...  # a project's, such as config.reward

    @property
    def raw(self) -> dict:
        """The same as plain JSON values."""
        return files.to_json(dataclasses.asdict(self))

    @property
    def evaluation_steps(self) -> int:
        """The steps T of evaluated trajectories, those of sampling unless an ODE is sampled."""
        solves_ode = decoder(self.sample.decoder).solves_ode
        return max(self.trajectory.steps) if solves_ode else self.sample.steps

    def schedule(self, tokens: int) -> Schedule:
        """The noise levels for a sequence of `tokens` tokens, which a shift of None depends on."""
        if self.trajectory.shift is not None:
            return self.trajectory
        return dataclasses.replace(self.trajectory, shift=default_shift(tokens))

    def without_auto(self) -> "Config":
        """The configuration with the decoder that `auto` is in a run without a denoiser."""
        if self.sample.decoder != AUTO:
            return self
        learned = self.model.pixel_likelihood == "learned"
        return self.with_sampling(decoder="inverse" if learned else "score")

    def with_sampling(self, **settings) -> "Config":
        """The configuration with other settings of its section `sample`."""
        return dataclasses.replace(self, sample=dataclasses.replace(self.sample, **settings))

    def with_evaluation(self, **settings) -> "Config":
        """The configuration with other settings of its section `evaluate`."""
        return dataclasses.replace(self, evaluate=dataclasses.replace(self.evaluate, **settings))


def decoder(name: str) -> Any:
    """The decoder of this name, from the table of sampling.decoders; UserError if there is none.

    auto needs no more than inverse does.
    """
    return load("ntm_jax.sampling.decoders:find")("inverse" if name == AUTO else name)


def config_class() -> type[Config]:
    """Config with the sections of the projects that are installed as further fields."""
    return _with_sections(tuple(item for item in SECTIONS.items() if present(item[1])))


@functools.cache
def _with_sections(sections: tuple[tuple[str, str], ...]) -> type[Config]:
    fields = []
    for name, place in sections:
        section = load(place)
        fields.append((name, section, section()))
    made = dataclasses.make_dataclass("Config", fields, bases=(Config,), frozen=True)
    for field in dataclasses.fields(made):
        if dataclasses.is_dataclass(field.type):
            _explain_assignment(field.type, f"{field.name}.")
    return _explain_assignment(made)


def _explain_assignment(section, prefix: str = ""):
    """The frozen dataclass, whose error at an assignment says how to change the setting."""
    def refuse(self, name: str, value) -> NoReturn:
        raise dataclasses.FrozenInstanceError(
            f"config.{prefix}{name} cannot be assigned: give it as ntm_jax.experiment(..., "
            f"**{{'{prefix}{name}': {abbreviate(value)}}}), or copy with dataclasses.replace")

    section.__setattr__ = refuse
    return section


def read(config) -> Config:
    """A ConfigDict or a plain dict -> Config.

    Raises UserError that names the key, what was found and what was expected.
    """
    values = config.to_dict() if hasattr(config, "to_dict") else config
    result = parse_dataclass(config_class(), renamed.current(values), "config")
    backbones.find(result.model.backbone)
    conditions.find(result.model.condition)
    _check_levels(result)
    _check_conditions(result)
    _check_patience(result)
    if decoder(result.sample.decoder).needs_denoiser and not result.teacher:
        raise UserError(f"config.sample.decoder={result.sample.decoder} needs a learned denoiser: "
                        "set config.train.distil_steps and config.sample.decoder=auto, or train "
                        "one with config.train.objective=denoiser and --config.teacher")
    return result


def _check_patience(config: Config) -> None:
    if not config.train.patience:
        return
    if not config.train.evaluate_every:
        raise UserError("config.train.patience counts evaluations during training, and "
                        "config.train.evaluate_every is 0: set it to a number of steps")
    if config.evaluate.split.partition("[")[0] == "test":
        raise UserError(
            f"config.train.patience chooses a step on config.evaluate.split={config.evaluate.split}"
            ", whose figures would then be too good: hold out training records, with the variant "
            ":validation of the experiment, or --config.data.split=train[:90%] and "
            "--config.evaluate.split=train[90%:]")


def _check_conditions(config: Config) -> None:
    model, dropout = config.model, config.train.condition_dropout
    if dropout and model.condition == "none":
        raise UserError(f"config.train.condition_dropout is {dropout}: expected 0 where "
                        "config.model.condition is none")
    for name, kind in conditions.SETTINGS.items():
        if getattr(model, name) and model.condition != kind:
            raise UserError(f"config.model.{name} is {getattr(model, name)}: it needs "
                            f"config.model.condition={kind}, which is {model.condition}")
    check_guidance("config.sample.guidance", config.sample.guidance, config.sample.steps)
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
        raise UserError("config.trajectory.steps is (): expected one or more step counts, as (4,)")
    if low > high:
        raise UserError(f"config.trajectory.t_min_range is {low, high}: expected lo <= hi")
    if config.model.head not in ("direct", "standard") and low < 1e-3:
        raise UserError(f"config.trajectory.t_min_range starts at {low}: the {config.model.head} "
                        "head's scale vanishes with t_min, so lo must be at least 0.001 (or take "
                        "config.model.head=direct)")
    if config.model.pixel_likelihood == "uniform" and c.steps != (1,):
        raise UserError("config.model.pixel_likelihood=uniform is a plain flow's, whose "
                        f"config.trajectory.steps is (1,), found {c.steps}")
    check_steps("config.trajectory.steps", max(c.steps), c, max(high, c.t_min))
    check_steps("config.sample.steps", config.evaluation_steps, c, c.t_min)


def check_steps(name: str, steps: int, trajectory: Schedule, t_min: float) -> None:
    """Raises UserError where levels of so many steps, called `name`, do not ascend from t_min."""
    # The default shift, and so level 1, grows with the number of tokens: it is that of one token.
    shift = default_shift(1) if trajectory.shift is None else trajectory.shift
    first = shifted(steps, shift) if trajectory.schedule == "shifted" else 1.0
    if t_min >= first:
        raise UserError(f"{name} is {steps}: level 1 of so many steps, {first:.4f}, is not "
                        f"above level 0, {t_min}; take fewer steps, or train with a "
                        "higher config.trajectory.shift or a lower t_min and t_min_range")


def flatten(values: dict, prefix: str = "") -> dict:
    """Nested dicts -> {"section.key": value}."""
    flat = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat
