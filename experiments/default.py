"""The defaults that every experiment starts from, and what experiments have in common.

An experiment starts from get_config() and overrides what differs. runtime/config.py declares every
setting; each is a flag of the programs, --config.section.key=value. By itself this file is a small
class-conditional NTM of made-up data.
"""

import dataclasses
import pathlib
import types
from typing import Any

import ml_collections
from ml_collections import config_dict

from ntm_jax.runtime import config
from ntm_jax.typed import settings


def get_config() -> ml_collections.ConfigDict:
    """Returns all settings at their defaults, locked: unknown keys and other types are refused."""
    kind = config.config_class()
    values: Any = dataclasses.asdict(kind())
    for key, of, field in settings(kind):
        if isinstance(of, types.UnionType):  # several types, which config.read checks
            section, name = key.split(".")
            values[section][name] = ml_collections.FieldReference(field.default, object)
    return ml_collections.ConfigDict(values).lock()


def leave_open(c: ml_collections.ConfigDict, *keys: str):
    """Sets settings, given as section.key, to None: data/choices.py chooses them for the data."""
    for key in keys:
        section, name = key.split(".")
        values: Any = c[section]
        values[name] = config_dict.placeholder(values.get_type(name))


def check_variant(file: str, variant: str, *variants: str):
    """Raises ValueError if `variant`, given after a colon to an experiment's file, is unknown."""
    if variant not in variants:
        *names, last = [name for name in variants if name] + ["none"] * ("" in variants)
        expected = f"{', '.join(names)} or {last}" if names else last
        file = pathlib.Path(file).name
        raise ValueError(f"{file}:{variant} is not a variant: expected {expected}")


def shrink(c: ml_collections.ConfigDict, **model):
    """Shrinks a run to four steps of few examples and a tiny model: seconds on a CPU.

    model: settings of the section `model`.
    """
    c.update(
        data=dict(batch_size=8, workers=0, mock=""),
        model=dict(dtype="float32", remat="none", scan=False, transporter_blocks=1,
                   transporter_layers=1, **model),
        train=dict(steps=4, save_every=2, evaluate_every=0, log_every=1, keep=0),
        optimizer=dict(warmup_steps=1),
        mesh=dict(fsdp=1),
        evaluate=dict(split="test[:16]", trajectories=2, batch_size=16),
        sample=dict(num=16),  # as many as an evaluation draws: one program serves both
    )
