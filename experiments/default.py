"""The defaults that every experiment starts from, and what experiments have in common.

An experiment starts from get_config() and overrides what differs. runtime/config.py declares every
setting; each is a flag of the programs, --config.section.key=value. By itself this file is a small
class-conditional NTM of made-up data.
"""

import dataclasses
import pathlib
import types
from collections.abc import Callable
from typing import Any

import ml_collections
from ml_collections import config_dict

from ntm_jax.runtime import config, renamed
from ntm_jax.typed import settings


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The get_config() of a shipped experiment: its variants, and a small run of each.

    The first variant is the default. `smoke` is a run of it within a minute on a CPU core, and
    `validation` one that leaves the test split unread; `VARIANT,smoke` and `VARIANT,validation` are
    those of another variant. smoke_source: the data of `smoke`, by default those of data.mock or
    data.source.
    """

    build: Callable[..., ml_collections.ConfigDict]
    variants: tuple[str, ...] = ("",)
    smoke_source: str = ""

    def __call__(self, variant: str = "") -> ml_collections.ConfigDict:
        variant = renamed.VARIANTS.get(variant, variant)
        name, _, kind = variant.rpartition(",")
        if kind not in ("smoke", "validation"):
            name, kind = variant, ""
        name = name or self.variants[0]
        if name not in self.variants:
            file = pathlib.Path(self.build.__code__.co_filename).name
            known = ", ".join(filter(None, (*self.variants, "smoke", "validation")))
            raise ValueError(f"{file}:{variant} is not a variant: expected one of {known}")
        c = self.build(name) if len(self.variants) > 1 else self.build()
        if kind == "validation":
            return _validated(c)
        return _shrunk(c, self.smoke_source) if kind else c


def variants(*names: str, smoke_source: str = "") -> Callable[[Callable], Experiment]:
    """Decorates a get_config() that takes one of these variants, or nothing where there is one."""
    return lambda build: Experiment(build, names, smoke_source)


@Experiment
def get_config() -> ml_collections.ConfigDict:
    """Returns all settings at their defaults, locked: unknown keys and other types are refused."""
    kind = config.config_class()
    values: Any = dataclasses.asdict(kind())
    for key, of, field in settings(kind):
        if isinstance(of, types.UnionType):  # several types, which config.read checks
            section, name = key.split(".")
            values[section][name] = ml_collections.FieldReference(field.default, object)
    values["model"]["transporter_condition"] = "none"  # files of earlier versions lack it: class
    return ml_collections.ConfigDict(values).lock()


def plain_flow(c: Any, mlp_ratio: int):
    """Makes the transporter alone, of a configuration, a flow of uniformly dequantised pixels.

    Such is TarFlow (arXiv 2412.06329). Its one latent is N(0, I), and the only noise level, which
    it is told, stands for none.
    """
    c.trajectory.update(steps=(1,), t_min=1e-6, t_min_range=(1e-6, 1e-6))
    c.model.update(head="standard", pixel_likelihood="uniform", transporter_blocks=4,
                   transporter_condition="class", mlp_ratio=mlp_ratio)
    c.train.condition_dropout = 0.0
    c.sample.update(steps=1, decoder="inverse")


def leave_open(c: ml_collections.ConfigDict, *keys: str):
    """Sets settings, given as section.key, to None: data/choices.py chooses them for the data."""
    for key in keys:
        section, name = key.split(".")
        values: Any = c[section]
        values[name] = config_dict.placeholder(values.get_type(name))


def _validated(c: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Trains on 90% of the training split and evaluates on the rest, or as much as of `test`."""
    most = c.evaluate.split.partition("[:")[2].rstrip("]")
    # shuffled: the records of a folder may be sorted by class
    c.evaluate.split = f"{c.data.split}[shuffled][{f'-{most}' if most else '90%'}:]"
    c.data.split += "[shuffled][:90%]"
    return c


def _shrunk(c: ml_collections.ConfigDict, source: str) -> ml_collections.ConfigDict:
    """A few steps of a tiny model of the same kind, from random weights."""
    steps = max(c.trajectory.steps)
    steps = steps if steps <= 4 else 1  # a toy's density is drawn at every level
    c.update(
        init_from="",
        data=dict(
            source=source or c.data.mock or c.data.source, mock="", batch_size=8, workers=0),
        trajectory=dict(steps=(steps,)),
        model=dict(
            width=64, head_size=32, kv_heads=2, predictor_layers=1, transporter_width=64,
            transporter_blocks=min(c.model.transporter_blocks, 1), transporter_layers=1,
            double_layers=min(c.model.double_layers, 1), dtype="float32", remat="none", scan=False),
        train=dict(
            steps=4, save_every=2, evaluate_every=0, log_every=1, keep=0, align_weight=0.0,
            pixel_likelihood_steps=4),
        optimizer=dict(warmup_steps=1),
        mesh=dict(fsdp=1, tensor=1),
        evaluate=dict(
            split="test[:16]", trajectories=2, batch_size=16, num_samples=0),
        sample=dict(  # inverse compiles in a third of the time
            num=20, steps=steps, decoder=c.sample.decoder.replace(config.AUTO, "inverse")),
    )
    return c
