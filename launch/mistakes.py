"""What programs say of a mistake or a fault: the line for an error of flags, files or memory."""

import dataclasses
import errno
import os
import re
import sys

from absl import flags

from ntm_jax import registry
from ntm_jax.errors import (
    MachineFault,
    UserError,
    first_line,
    from_object_storage,
    of_storage,
)

_INTACT = "what was written before is intact, and the same command goes on once that is mended"
LESS_MEMORY = (
    "lower config.data.batch_size, config.evaluate.batch_size or --batch, raise "
    "config.train.accumulate, or set config.model.remat=full")


def of_flags(error) -> str:
    """Returns what flags and config_flags say of a mistake as one line."""
    while isinstance(error.args[0] if error.args else None, Exception):
        error = error.args[0]  # absl's AttributeError(KeyError(...))
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if "Failed loading config file" in text:
        return (f"{_config_flag()} cannot be read: expected an experiment file, such as "
                "--config=experiments/digits.py")
    if "Traceback" in text:  # an exception that get_config() raised
        return f"{_config_flag()}: {text.strip().splitlines()[-1].partition(': ')[2]}"
    unknown = re.match(r"""'(\w+)'\s*(?:Did you mean "(\w+)")?""", text)
    if unknown:
        from ntm_jax.runtime.config import SECTIONS

        place = SECTIONS.get(unknown[1])
        if place and not registry.present(place):
            return registry.absent(place)
        meant = f", did you mean {unknown[2]}?" if unknown[2] else ""
        wrong = rf"--?(no)?config\..*\b{unknown[1]}\b"
        full = next((a for a in sys.argv if re.match(wrong, a)), unknown[1])
        return f"{full} is not a setting of the experiment: there is no {unknown[1]}{meant}"
    added = re.match(r'Key "(\w+)" does not exist .*?(Did you mean "\w+"|$)', text, re.S)
    if added:  # by get_config() itself
        return f"{_config_flag()} sets {added[1]}, which is not a setting. {added[2]}"
    if isinstance(error, flags.UnrecognizedFlagError) and "config" in flags.FLAGS:
        from ntm_jax.runtime.config import config_class

        name = error.flagname
        if name.split(".")[0] in {field.name for field in dataclasses.fields(config_class())}:
            return f"--{name} is not a flag: did you mean --config.{name}?"
    missing = re.findall(r"--(\w+)=None: Flag", text)
    if missing:
        return " and ".join(f"--{name}" for name in missing) + " must be given: --help lists all"
    return re.sub(r"^(FATAL Flags parsing error:|flag)\s*", "", text)


def _config_flag() -> str:
    return next((a for a in sys.argv if re.match(r"--?config=", a)), "--config")


def of_a_program(error: Exception) -> UserError | MachineFault | None:
    """What a program ends with: a mistake or too little memory, or storage that fails.

    None for another error, which is a bug.
    """
    if isinstance(error, UserError | MachineFault):
        return error
    if os.strerror(errno.EMFILE) in str(error):  # of any kind, as libraries wrap it
        line = f"this process may not open more files ({first_line(error)}): raise ulimit -n"
    elif isinstance(error, OSError) and error.errno:
        return of_storage(error, f"{error.filename or 'a file'}: {error.strerror}: {_INTACT}")
    elif from_object_storage(error):
        return of_storage(error, f"object storage failed ({first_line(error)}): {_INTACT}")
    elif isinstance(error, MemoryError):
        line = f"this machine's memory is full ({error or 'no details'}): {LESS_MEMORY}"
    elif type(error).__name__ == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" in str(error):
        line = f"a device's memory is full ({str(error).splitlines()[0][:200]}): {LESS_MEMORY}"
    elif (isinstance(error, RuntimeError | AssertionError) and "JAX_PLATFORMS" in os.environ
          and not _has_devices()):
        said = f" ({error})" if str(error) else ""
        line = (f"JAX_PLATFORMS={os.environ['JAX_PLATFORMS']} names devices that jax does not find "
                f"here{said}: unset it, set JAX_PLATFORMS=cpu to compute on the CPU, or install "
                "the extra [cuda] or [tpu] where there are such devices")
    else:
        return None
    return UserError(line)


def _has_devices() -> bool:
    import jax

    try:
        return bool(jax.devices())
    except (RuntimeError, AssertionError):  # the latter without a text
        return False
