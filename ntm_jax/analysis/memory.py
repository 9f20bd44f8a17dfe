"""The memory of a training step: the compiler's report, and advice where it does not fit."""

import math
import re

import jax
import jax.numpy as jnp

from ntm_jax.errors import UserError
from ntm_jax.runtime import sharding
from ntm_jax.runtime.config import Config
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


def saved_per_token(config: Config, width: int, remat: str) -> int:
    """Numbers per token that a layer of a width keeps for the backward pass.

    See core.transformer.layers.REMAT. The figure for remat "none" is an estimate.
    """
    m = config.model
    keys, wide = 2 * m.kv_heads * m.head_size, m.mlp_ratio * width
    return {"full": width, "narrow": 5 * width + keys, "dots": 4 * width + keys + wide,
            "none": 8 * width + 2 * keys + 3 * wide}[remat]


def saved(run: Run, levels: int, remat: str) -> float:
    """Bytes of activations that a chip keeps for the backward pass of one part of a batch.

    levels: the number of levels of an example that a step holds at once.
    """
    config, mesh, spec, m = run.config, run.mesh, run.spec, run.config.model
    shards = sharding.batch_shards(mesh)
    examples = config.data.batch_size * levels / shards / config.train.accumulate
    examples /= mesh.shape["sequence"]
    layers = m.transporter_blocks * m.transporter_layers
    transporter = spec.tokens * layers * saved_per_token(config, m.transporter_width, remat)
    tokens = spec.tokens + spec.text_tokens
    predictor = tokens * m.predictor_layers * saved_per_token(config, m.width, remat)
    return examples * (transporter + predictor) * jnp.dtype(m.dtype).itemsize


def advice(run: Run, levels: int, memory: dict) -> str:
    """The smallest change that should make a training step fit, in words.

    It tries the remat policy, then accumulation, then more chips. levels: as in `saved`. memory:
    bytes of a compiled step, "arguments", "peak" and "hbm".
    """
    # A layer's working set is what the compiler needed beyond the state and saved activations. It
    # grows by what a layer recomputes and its gradient, and shrinks with the batch's parts. The
    # state is 16 bytes per parameter over fsdp and tensor, gradients 4 more. A quarter of the
    # memory stays free: the compiler can take a third more than this estimate.
    config, mesh = run.config, run.mesh
    order = ["none", "dots", "narrow", "full"]
    policies = order[order.index(config.model.remat):]
    now, fixed = saved(run, levels, config.model.remat), memory["arguments"] * 1.25
    working = max(memory["peak"] - fixed - now, 0)
    m = config.model
    layers = m.predictor_layers + m.transporter_blocks * m.transporter_layers
    share = config.data.batch_size // sharding.batch_shards(mesh) // config.train.accumulate
    limit = 0.75 * memory["hbm"]

    def need(policy, parts):
        kept = saved(run, levels, policy)
        accumulated = memory["arguments"] / 4 if parts > 1 else 0  # gradients
        return fixed + (working + 2 * (now - kept) / layers + kept) / parts + accumulated

    powers = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    for parts in sorted({n for n in powers if share % n == 0} | {share}):
        for policy in policies:
            if need(policy, parts) < limit:
                return _change(config, policy, parts, need(policy, parts), memory["hbm"])
    shards, lowest = mesh.shape["fsdp"] * mesh.shape["tensor"], need("full", share)
    least = 2 ** math.ceil(math.log2(shards * lowest / limit))
    return (f"recomputing and accumulating as far as they go, it needs about {lowest / 2**30:.1f} "
            f"GiB, above three quarters of {memory['hbm'] / 2**30:.1f}: raise config.mesh.fsdp x "
            f"tensor from {shards} to {least}"
            + (f", on at least {least} chips" if least > mesh.size else ""))


def _change(config: Config, policy: str, parts: int, need: float, hbm: float) -> str:
    change = [f"config.model.remat={policy}"] if policy != config.model.remat else []
    change += [f"config.train.accumulate={config.train.accumulate * parts}"] if parts > 1 else []
    if not change:
        return f"it nearly fits: try config.train.accumulate={config.train.accumulate * 2}"
    return f"set {' and '.join(change)}: about {need / 2**30:.1f} GiB of {hbm / 2**30:.1f}"


def check_fits(report: dict) -> None:
    """Raises UserError, with advice, if a report's program does not fit."""
    if not report["fits"]:
        memory = report["bytes_per_chip"]
        several = {"rollout": "config.reward.samples or config.data.batch_size",
                   "evaluate": "config.evaluate.batch_size"}
        remedy = report.get("advice", f"make {several.get(report['program'], 'config.sample.num')} "
                            "smaller, or config.mesh.fsdp larger")
        raise UserError(f"the {report['program']} program needs {gib(memory['peak'])} a "
                        f"{report.get('unit', 'chip')} of "
                        f"{report['topology']}, which has {gib(memory['hbm'])}: {remedy}")


def gib(value) -> str:
    """Bytes in GiB, as "1.50 GiB"; "unknown" for None."""
    return "unknown" if value is None else f"{value / 2**30:.2f} GiB"
