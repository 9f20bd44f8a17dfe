"""Finds the devices of a topology by its name: absent TPUs and GPUs, or this machine's devices."""

import contextlib
import dataclasses
import importlib.util
import re
from collections.abc import Callable

import jax

from ntm_jax.errors import UserError, first_line
from ntm_jax.tools.pods import gpu, tpu
from ntm_jax.tools.pods.chips import TPUS, UNKNOWN_CHIP, PodChip

EXAMPLES = ("v5p:8x8x8, v5e:16x16, v6e:16x16, v4:4x4x4, tpu7x:4x4x4, h100:8x1x8, h200:8x1x8, "
            "b200:8x1x8, cpu:8 or local")


@dataclasses.dataclass(frozen=True)
class Topology:
    """The devices of a topology, of which each chip has chip.cores.

    domains: equal runs of devices whose links are fast: the slices of TPUs, or NVLink domains.
    tracing: a context for tracing programs, and compiler_options for compiling them.
    """

    devices: list
    chip: PodChip
    domains: int
    tracing: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    compiler_options: dict[str, str] | None = None


def find(name: str, slices: int = 1) -> Topology:
    """The topology of a name such as v5p:8x8x8 or h100:8x1x8, which need not exist.

    "local" stands for this machine's devices, and cpu:N for N of its simulated ones. slices:
    config.mesh.slices. Raises UserError for any other name, without the compiler that it needs, and
    where slices are not the NVLink domains.
    """
    if name == "local":
        return Topology(jax.devices(), UNKNOWN_CHIP, slices)
    simulated = re.fullmatch(r"cpu:([1-9]\d*)", name)
    if simulated:
        return Topology(jax.devices("cpu")[: int(simulated[1])], UNKNOWN_CHIP, slices)
    of_tpus, of_gpus = tpu.NAME.fullmatch(name), gpu.NAME.fullmatch(name)
    if not of_tpus and not of_gpus:
        raise UserError(f"--topology={name} is not known: expected {EXAMPLES}")
    if of_gpus and slices != int(of_gpus[2]):
        raise UserError(f"config.mesh.slices is {slices}: expected {of_gpus[2]}, the NVLink "
                        f"domains of --topology={name}")
    compiler, extra = ("libtpu", "tpu") if of_tpus else ("jax_cuda13_plugin", "cuda13-compile")
    if importlib.util.find_spec(compiler) is None:
        raise UserError(f"--topology={name} needs the compiler {compiler}, which is not installed: "
                        f"pip install -e '.[{extra}]'")
    try:
        devices = tpu.devices(name, slices) if of_tpus else gpu.devices(name)
    except Exception as error:  # compilers raise several kinds
        raise UserError(f"--topology={name} is refused by {compiler} ({first_line(error)}): "
                        f"expected {EXAMPLES}, and a compiler of jax's version") from None
    kind = name.split(":")[0]
    if of_tpus:
        return Topology(devices, TPUS[kind], slices)
    return Topology(devices, gpu.chip(kind), slices, gpu.cudnn_assumed, gpu.COMPILER_OPTIONS)
