"""What a training step needs, found before the first one: memory and FLOPs."""

import dataclasses
import math
import pathlib

import jax

from ntm_jax.errors import UserError
from ntm_jax.runtime import build, flops, sharding
from ntm_jax.runtime.run import Run
from ntm_jax.training import state
from ntm_jax.training.objectives import Objective
from ntm_jax.training.step import make_step

MEMINFO = pathlib.Path("/proc/meminfo")  # of Linux


def check_state_fits(run: Run) -> None:
    """Raises UserError if a state's arrays alone do not fit in the memory of the mesh's devices."""
    arrays = jax.tree.leaves(state.abstract(run))
    _check_memory(
        run.mesh, "parameters and optimizer take {:,.1f} GiB of a device, and ",
        sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in arrays),
        "lower config.model.width or config.model.predictor_layers, or raise config.mesh.fsdp on "
        "more devices")


def compile_and_check_memory(run: Run, step, *arguments) -> None:
    """Compiles a step, which a call with the same shapes then finds, and estimates its memory.

    Raises UserError where that exceeds what a device, or for CPUs the machine, has left: the kernel
    would end the run without a word.
    """
    with sharding.use(run.mesh):
        memory = step.lower(*arguments).compile().memory_analysis()
    if memory is not None:
        _check_memory(
            run.mesh, "a step needs about {:,.1f} GiB more, and ", memory.temp_size_in_bytes
            + memory.output_size_in_bytes - memory.alias_size_in_bytes,
            "lower config.data.batch_size, raise config.train.accumulate, or set "
            "config.model.scan=True and config.model.remat=full")


def _check_memory(mesh, what: str, needed: int, remedy: str) -> None:
    free = free_bytes(mesh)
    if free and needed > free:
        raise UserError(f"{what.format(needed / 2**30)}{free / 2**30:,.1f} GiB are free: "
                        f"{remedy}")


def free_bytes(mesh) -> int:
    """The memory that each of this process's devices has left; 0 if that is not known.

    CPU devices share what the machine has.
    """
    device = mesh.local_devices[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    if device.platform != "cpu" or not MEMINFO.exists():
        return 0
    lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
    return 1024 * int(lines["MemAvailable"].split()[0]) // len(mesh.local_devices)


def flops_of_step(run: Run, objective: Objective, teacher: Run | None, step, *arguments) -> int:
    """The model's FLOPs in a step on these arguments, on all devices, without recomputation.

    step: make_step's for the same run, objective and teacher. It is counted itself where it
    recomputes nothing and has no kernels: on CPUs, whose arithmetic has the products of plain
    jax.numpy.
    """
    runs = [run, teacher] if teacher else [run]
    on_cpus = run.mesh.devices.flat[0].platform == "cpu"
    if not on_cpus or any(r.config.model.remat != "none" for r in runs):
        plain = [dataclasses.replace(r, model=build.reference_variant(r.model)) for r in runs]
        step = make_step(plain[0], objective, *plain[1:])
    with sharding.use(run.mesh):
        return flops.of_jaxpr(step.trace(*arguments).jaxpr.jaxpr)
