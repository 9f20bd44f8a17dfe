"""A workdir's config.json: the settings of its run and the shape of its data.

The file ends in a checksum of its content. Every checkpoint holds a copy of the settings that make
a run what it is, which a resume compares with its own.
"""

import copy
import dataclasses
import re
import shlex
from typing import Any

import jax
from etils import epath

from ntm_jax import files
from ntm_jax.data import choices
from ntm_jax.data.pipeline import DataSpec, changed_data, spec_from_json, spec_to_json
from ntm_jax.errors import UserError
from ntm_jax.runtime import checkpoint, renamed
from ntm_jax.runtime.config import Config, config_class, flatten, read
from ntm_jax.typed import settings

CONFIG = "config.json"
DAMAGED = "give ntm-jax train the run's own flags, which writes it anew"
RESUMABLE = (  # what a resumed run may change
    "mesh.", "data.source", "data.workers", "data.mock", "train.steps", "train.distil_steps",
    "train.accumulate", "train.save_every", "train.save_minutes", "train.evaluate_every",
    "train.score_every", "train.log_every", "train.rehearse", "train.keep", "train.patience",
    "optimizer.schedule",
    "optimizer.learning_rate", "optimizer.min_learning_rate", "optimizer.warmup_steps",
    "optimizer.weight_decay", "optimizer.clip", "optimizer.ema_decay", "evaluate.", "sample.",
    "spec.class_names", "spec.version")


def _flat_defaults() -> dict:
    """{"section.key": default} of the settings, and those of the data's shape under `spec`."""
    found = [*settings(config_class()), *settings(DataSpec, "spec.")]
    return files.to_json({key: field.default for key, _, field in found
                        if field.default is not dataclasses.MISSING})


def _content(config: Config, spec: DataSpec) -> dict:
    return config.raw | {"spec": spec_to_json(spec)}


def fixed(config: Config, spec: DataSpec) -> dict:
    """{"section.key": JSON value} of the data's shape and the settings fixed when a run resumes."""
    return {key: value for key, value in flatten(_content(config, spec)).items()
            if not key.startswith(RESUMABLE)}


def _recorded(workdir: str) -> dict | None:
    """The flat settings of the run in a workdir; None without a checkpoint.

    {} if config.json is missing or damaged: restoring checks the settings against the checkpoint's.
    """
    if checkpoint.latest_step(workdir) is None:
        return None
    try:
        return flatten(renamed.current(files.read_json(epath.Path(workdir) / CONFIG, DAMAGED)))
    except (FileNotFoundError, UserError):
        return {}


def check_resumable(workdir: str, config: Config, spec: DataSpec) -> list[str]:
    """Checks that a workdir holds no run or one of this configuration.

    A run without a checkpoint does not count. Returns a line for each setting that changed since
    the run began.

    Raises UserError where the run there differs in more than a resume may change.
    """
    before = _recorded(workdir)
    if before is None:
        return []
    if not before:
        return [f"{CONFIG} was missing or damaged and is written anew: the last checkpoint has the "
                "same settings"]
    # A run of an earlier version lacks newer settings, which then have their defaults.
    before, now = (_flat_defaults() | flat for flat in (before, flatten(_content(config, spec))))
    lines = []
    for key in sorted(before | now):
        one: Any = before.get(key)
        other: Any = now.get(key)
        if one == other or (key == "spec.class_names" and not one):
            continue  # earlier versions wrote no names of classes
        may = _same_content(before, now) if key == "data.source" else (
            key.startswith(RESUMABLE) and key != "spec.class_names")
        if key == "spec.version":
            lines += filter(None, [changed_data(config.data.source, one, other)])
        elif may:
            lines.append(f"changed since the run began: {key}: {one!r} -> {other!r}")
        else:
            raise UserError(f"{workdir} holds a run with {key} = {one!r}, and this one has "
                            f"{other!r}: give another --workdir to start anew, or that "
                            "value to resume")
    return lines


def _same_content(before: dict, now: dict) -> bool:
    """Whether two runs' data are the same in another place: of one version, which is a digest."""
    version = now.get("spec.version") or ""
    return before.get("spec.version") == version and bool(re.fullmatch("[0-9a-f]{16}", version))


def complete(values, workdir: str = "") -> Config:
    """Reads an experiment whose settings may be left open (None), to be chosen for its data.

    values: a ConfigDict or a plain dict. workdir: its run's settings take the place of new choices.

    The first process prints what was chosen. Raises UserError; see config.read and choices.choose.
    """
    values = values.to_dict() if hasattr(values, "to_dict") else copy.deepcopy(values)
    flat = flatten(values)
    left_open = [key for key in choices.CHOICES if key in flat and flat[key] is None]
    if not left_open:
        return read(values)
    recorded = (_recorded(workdir) if workdir else None) or {}
    # what an earlier version did not record is at its default
    known = {key: field.default for key, _, field in settings(config_class())} | recorded
    before = {key: known[key] for key in left_open if recorded and known[key] is not None}
    new, remark = choices.choose(flat | before, accelerator=jax.default_backend() != "cpu")
    chosen = before | new
    whence = "chosen for the data" if len(before) < len(left_open) else "as the run there has them"
    for key, value in chosen.items():
        section, name = key.split(".")
        values[section][name] = value
    flags = " ".join(f"--config.{key}={shlex.quote(str(value))}" for key, value in chosen.items())
    config = read(values)
    if not jax.process_index():
        print(f"{whence}: {flags}" + (f" ({remark})" if remark else ""), flush=True)
    return config


def write(workdir: str, config: Config, spec: DataSpec) -> None:
    """Writes workdir/config.json: the settings, the data's shape under `spec`, a checksum."""
    folder, content = epath.Path(workdir), _content(config, spec)
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(folder / CONFIG, content | {files.SEAL: files.digest(content)})


def load(workdir: str) -> tuple[Config, DataSpec]:
    """The configuration of the run in a workdir and the shape of its data, which are not opened.

    Raises UserError if there is none, or config.json was damaged or edited.
    """
    path = epath.Path(workdir) / CONFIG
    if not path.exists():
        raise UserError(f"{workdir} holds no run (no config.json there): give the --workdir that "
                        "ntm-jax train was given")
    content = files.read_json(path, DAMAGED)
    spec = content.pop("spec", None)
    return read(content), spec_from_json(spec)
