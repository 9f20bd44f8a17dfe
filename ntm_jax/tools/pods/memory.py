"""The memory of a training step: the compiler's report, and advice where it does not fit."""

import math
import re

import jax

from ntm_jax.errors import UserError
from ntm_jax.runtime import sharding
from ntm_jax.runtime.run import Run

UNITS = {"B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_TEMPORARIES = re.compile(
    r"temporaries \(([\d.]+)([BKMGT])\) exceeds available HBM \(([\d.]+)([BKMGT])\)")
_TOTAL = re.compile(r"Used ([\d.]+)([BKMGT]) of ([\d.]+)([BKMGT]) hbm")


def bytes_per_chip(a) -> int:
    """Bytes of an abstract array's shard on one chip; a random key takes two words."""
    shape = a.sharding.shard_shape(a.shape) if a.sharding else a.shape
    is_key = jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key)
    return math.prod(shape) * (8 if is_key else a.dtype.itemsize)


def out_of_memory(error, arguments: float) -> dict:
    """{"temporaries", "peak", "hbm"}: bytes that the compiler needed and has, from its error.

    arguments: bytes of the program's arguments. Raises the error again if it is of another kind.
    """
    temporaries = _TEMPORARIES.search(str(error))
    found = temporaries or _TOTAL.search(str(error))
    if not found:
        raise error
    used, hbm = (float(found[i]) * UNITS[found[i + 1]] for i in (1, 3))
    if temporaries:
        return {"temporaries": used, "peak": used + arguments, "hbm": hbm}
    return {"temporaries": used - arguments, "peak": used, "hbm": hbm}


def advice(run: Run, memory: dict) -> str:
    """The settings to compile next for a training step that does not fit.

    memory: its "temporaries", "peak" and "hbm", bytes of a device. Temporaries shrink about as the
    parts of a batch do; with more recomputation they should fit.
    """
    config, parts = run.config, run.config.train.accumulate
    free = memory["hbm"] - (memory["peak"] - memory["temporaries"])
    examples = config.data.batch_size // sharding.batch_shards(run.mesh) // parts
    if free <= 0 or examples < 1:
        return "split the state over more devices: config.mesh.fsdp"
    fewer = min((n for n in range(1, examples + 1)
                 if not examples % n and n >= memory["temporaries"] / free), default=examples)
    recompute = "--config.model.remat=full " if config.model.remat != "full" else ""
    return f"give {recompute}--config.train.accumulate={parts * fewer}, or more devices"


def check_fits(report: dict) -> None:
    """Raises UserError, with advice, if a report's program does not fit."""
    if not report["fits"]:
        memory = report["bytes_per_chip"]
        remedy = report.get("advice", "make its batch smaller, or config.mesh.fsdp larger")
        raise UserError(f"the {report['program']} program needs {gib(memory['peak'])} a "
                        f"{report['unit']} of {report['topology']}, which has "
                        f"{gib(memory['hbm'])}: {remedy}")


def gib(value) -> str:
    """Bytes in GiB, as "1.50 GiB"; "unknown" for None."""
    return "unknown" if value is None else f"{value / 2**30:.2f} GiB"
