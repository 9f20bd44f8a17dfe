"""A workdir's config.json: the settings of its run and the shape of its data.

The file is sealed with a checksum. Every checkpoint holds a copy of the settings that make a run
what it is, from which a lost or damaged config.json is written again.
"""

import copy
import dataclasses
import shlex

import jax
from etils import epath

from ntm_jax import files
from ntm_jax.data import choices
from ntm_jax.data.pipeline import DataSpec, changed_data, spec_from_json, spec_to_json
from ntm_jax.errors import UserError
from ntm_jax.registry import NotRegistered
from ntm_jax.runtime import checkpoint
from ntm_jax.runtime.config import Config, config_class, flatten, read
from ntm_jax.typed import settings

CONFIG = "config.json"
DAMAGED = ("give launch/train.py the run's own command, which writes it anew from the last "
           "checkpoint's copy of the settings")
RESUMABLE = (  # what a resumed run may change
    "mesh.", "data.workers", "data.mock", "train.steps", "train.accumulate", "train.save_every",
    "train.save_minutes", "train.evaluate_every", "train.log_every", "train.keep", "optimizer.",
    "evaluate.", "sample.", "spec.class_names", "spec.version")


def _flat_defaults() -> dict:
    """{"section.key": default} of the settings, and those of the data's shape under `spec`."""
    found = [*settings(config_class()), *settings(DataSpec, "spec.")]
    return files.plain({key: field.default for key, _, field in found
                        if field.default is not dataclasses.MISSING})


def _content(config: Config, spec: DataSpec) -> dict:
    return config.raw | {"spec": spec_to_json(spec)}


def fixed(config: Config, spec: DataSpec) -> dict:
    """{"section.key": JSON value} of the data's shape and the settings fixed when a run resumes."""
    return {key: value for key, value in flatten(_content(config, spec)).items()
            if not key.startswith(RESUMABLE)}


def differences(before: dict, now: dict) -> list[tuple]:
    """[(key, value before, value now)] of two flat dicts of settings.

    Those of an earlier version lack newer settings, which then have their defaults.
    """
    defaults = _flat_defaults()
    pairs = [(key, *(one.get(key, defaults.get(key)) for one in (before, now)))
             for key in sorted(before | now)]
    return [(key, one, other) for key, one, other in pairs if one != other]


def _recorded(workdir: str) -> tuple[dict | None, dict | None, UserError | None]:
    """The flat settings of the run in a workdir: (those of config.json, those of its checkpoint).

    The first are None if the file is missing or damaged, with the error for a damaged one. The
    second are those fixed when a run resumes, without defaults; None if there is no checkpoint.
    """
    path = epath.Path(workdir) / CONFIG
    saved = checkpoint.saved_settings(workdir)
    if saved is None or not path.exists():
        return None, saved, None
    try:
        return flatten(files.read_json(path, DAMAGED)), saved, None
    except UserError as error:
        return None, saved, error


def _before(workdir: str, config: Config, spec: DataSpec) -> tuple[dict | None, list[str]]:
    """(the flat settings of the run in a workdir, None without one; lines on what was damaged)."""
    written, saved, damage = _recorded(workdir)
    if saved is None or written is not None:
        return written, []
    if not saved:
        raise damage or UserError(f"{workdir} holds checkpoints but no {CONFIG}: expected a run's "
                                  "folder or a new one; give another --workdir")
    resumable = {key: value for key, value in flatten(_content(config, spec)).items()
                 if key.startswith(RESUMABLE)}
    return saved | resumable, [f"{CONFIG} was {'damaged' if damage else 'missing'} and is written "
                               "anew: the last checkpoint has the same settings"]


def claim(workdir: str, config: Config, spec: DataSpec) -> list[str]:
    """Checks that a workdir holds no run or one of this configuration; writes nothing.

    A run without a checkpoint does not count. Returns a line for each setting that changed since
    the run began. If config.json is missing or damaged, this uses the copy of the settings in the
    last checkpoint.

    Raises UserError where the run there differs in more than a resume may change.
    """
    before, lines = _before(workdir, config, spec)
    if before is None:
        return lines
    for key, one, other in differences(before, flatten(_content(config, spec))):
        if key == "spec.class_names" and not one:
            continue  # written before runs kept the names
        if key == "spec.version":
            lines += filter(None, [changed_data(config.data.source, one, other)])
            continue
        of_samples = config.reward.ahead and key == "sample.steps"  # which a checkpoint may hold
        if not key.startswith(RESUMABLE) or key == "spec.class_names" or of_samples:
            raise UserError(f"{workdir} holds a run with {key} = {one!r}, and this one has "
                            f"{other!r}: give another --workdir to start anew, or that "
                            "value to resume")
        lines.append(f"changed since the run began: {key}: {one!r} -> {other!r}")
    return lines


def _known(workdir: str, keys: list[str]) -> dict:
    """Those of the flat settings that a workdir's run is known to have; {} without a run."""
    known, saved, _ = _recorded(workdir) if workdir else (None, None, None)
    if known is None and saved:
        known = {key: value for key, value in (_flat_defaults() | saved).items()
                 if not key.startswith(RESUMABLE)}
    return {key: known[key] for key in keys if known and known.get(key) is not None}


def complete(values, workdir: str = "") -> tuple[Config, str]:
    """Reads an experiment whose settings may be left open (None), to be chosen for its data.

    values: a ConfigDict or a plain dict. workdir: its run's settings take the place of new choices.

    Returns the configuration, and a line on what was chosen, '' for nothing. Raises UserError; see
    config.read and choices.choose.
    """
    values = values.to_dict() if hasattr(values, "to_dict") else copy.deepcopy(values)
    flat = flatten(values)
    left_open = [key for key in choices.CHOICES if key in flat and flat[key] is None]
    if not left_open:
        return read(values), ""
    before = _known(workdir, left_open)
    chosen = before | choices.choose(flat | before, accelerator=jax.default_backend() != "cpu")
    whence = "chosen for the data" if len(before) < len(left_open) else "as the run there has them"
    for key, value in chosen.items():
        section, name = key.split(".")
        values[section][name] = value
    flags = " ".join(f"--config.{key}={shlex.quote(str(value))}" for key, value in chosen.items())
    return read(values), f"{whence}: {flags}"


def write(workdir: str, config: Config, spec: DataSpec) -> None:
    """Writes workdir/config.json, sealed: the settings, and the data's shape under `spec`."""
    folder = epath.Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(folder / CONFIG, _content(config, spec), sealed=True)


def load(workdir: str) -> tuple[Config, DataSpec]:
    """The configuration of the run in a workdir and the shape of its data, which are not opened.

    Raises UserError if there is none, or config.json was damaged or edited.
    """
    path = epath.Path(workdir) / CONFIG
    if not path.exists():
        raise UserError(f"{workdir} holds no run (no config.json there): give the --workdir that "
                        "launch/train.py was given")
    content = files.read_json(path, DAMAGED)
    settings = {key: value for key, value in content.items() if key != "spec"}
    try:
        return read(settings), spec_from_json(content.get("spec"))
    except NotRegistered:
        raise  # the file is whole, and the line names the remedy
    except UserError as error:
        raise UserError(f"{path} cannot be used ({error}): {DAMAGED}") from None
