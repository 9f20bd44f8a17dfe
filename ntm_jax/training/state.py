"""The training state: new, on the devices that hold it, or as shapes with their shardings."""

import functools
import math
import pathlib

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from ntm_jax.errors import UserError
from ntm_jax.runtime import build
from ntm_jax.runtime.config import Optimizer
from ntm_jax.runtime.run import Run
from ntm_jax.training import optimizer

MEMINFO = pathlib.Path("/proc/meminfo")  # of Linux


@flax.struct.dataclass
class State:
    """All that a step changes."""

    step: jax.Array  # int32 []
    params: dict
    opt_state: optax.OptState
    ema: dict


@flax.struct.dataclass
class StateWithSamples(State):
    """A state that is saved with the next batch's arrays of an extension; see extension.py."""

    samples: dict  # the key in checkpoints

    def without_samples(self) -> State:
        """The state that a step changes."""
        return State(self.step, self.params, self.opt_state, self.ema)


def with_samples(state: State, samples: dict) -> StateWithSamples:
    """A state and an extension's arrays of the next batch, as they are saved."""
    return StateWithSamples(state.step, state.params, state.opt_state, state.ema, samples)


@functools.lru_cache(maxsize=8)
def _initial_program(model, settings: Optimizer, steps: int):
    """A jitted function of the seed's key, which is traced once for its shapes and its numbers."""
    @jax.jit
    def initial(key) -> State:
        params = build.initial_params(model, key)
        opt_state = optimizer.make(settings, steps).init(params)
        return State(jnp.zeros((), jnp.int32), params, opt_state, jax.tree.map(jnp.copy, params))

    return initial


@functools.lru_cache(maxsize=8)  # tracing takes a while, and several parts of a run ask for it
def _abstract(model, settings: Optimizer, steps: int, mesh) -> State:
    program = _initial_program(model, settings, steps)
    return build.abstract(lambda: program(jax.random.key(0)), model, mesh)


def abstract(run: Run) -> State:
    """The shapes of a run's training state with their shardings; see build.abstract."""
    return _abstract(run.model, run.config.optimizer, run.config.train.steps, run.mesh)


def check_state_fits(run: Run) -> None:
    """Raises UserError if a state's arrays alone do not fit in the memory of the mesh's devices."""
    needed = sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize
                 for a in jax.tree.leaves(abstract(run)))
    free = free_bytes(run.mesh)
    if free and needed > free:
        raise UserError(f"parameters and optimizer take {needed / 2**30:,.1f} GiB of a device, "
                        f"and {free / 2**30:,.1f} GiB are free: lower config.model.width or "
                        "config.model.predictor_layers, or raise config.mesh.fsdp on more devices")


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


def initialize(run: Run) -> State:
    """A new state, each array made on the devices that hold it; the same numbers on any mesh."""
    config = run.config
    make = _initializer(run.model, config.optimizer, config.train.steps, run.mesh)
    return make(jax.random.key(config.seed))


@functools.lru_cache(maxsize=8)  # runs that differ in their seeds or data share one program
def _initializer(model, settings: Optimizer, steps: int, mesh):
    shardings = jax.tree.map(lambda a: a.sharding, _abstract(model, settings, steps, mesh))
    program = _initial_program(model, settings, steps)
    return jax.jit(lambda key: nn.unbox(program(key)), out_shardings=shardings)
