"""Finds the devices of a topology by its name: absent TPUs and GPUs, or this machine's devices."""

import contextlib
import dataclasses
import re
from collections.abc import Callable

import jax

from ntm_jax.errors import UserError
from ntm_jax.runtime.chips import gpu, tpu
from ntm_jax.runtime.chips.chip import CPU, UNKNOWN_CHIP, Chip

EXAMPLES = f"{tpu.EXAMPLES}, {gpu.EXAMPLES}, cpu:8 or local"


@dataclasses.dataclass(frozen=True)
class Topology:
    """The devices of a topology, of which each chip has chip.cores.

    domains: equal runs of devices whose links are fast: the slices of TPUs, or NVLink domains.
    tracing: a context for tracing programs, and compiler_options for compiling them.
    """

    devices: list
    chip: Chip
    domains: int
    tracing: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    compiler_options: dict[str, str] | None = None


def chip_of(device) -> Chip:
    """The figures of a device, present or of a topology.

    Those of a CPU core for CPUs; of an H100 for GPUs and of a v5p for TPUs that are not known.
    """
    kind = device.device_kind
    if device.platform == "tpu":
        return tpu.CHIPS[tpu.KINDS.get(kind, "v5p")]
    if device.platform in ("gpu", "cuda"):
        card = next((name for name in gpu.CARDS if name.upper() in kind), "h100")
        return gpu.CARDS[card].chip
    return CPU


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
    if tpu.NAME.fullmatch(name):
        return Topology(tpu.devices(name, slices), tpu.CHIPS[name.split(":")[0]], slices)
    if gpu.NAME.fullmatch(name):
        if slices != gpu.domains(name):
            raise UserError(f"config.mesh.slices is {slices}: expected {gpu.domains(name)}, the "
                            f"NVLink domains of --topology={name}")
        return Topology(gpu.devices(name), gpu.CARDS[name.split(":")[0]].chip, slices,
                        gpu.cudnn_assumed, gpu.COMPILER_OPTIONS)
    raise UserError(f"--topology={name} is not known: expected {EXAMPLES}")
