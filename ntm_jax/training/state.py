"""The training state: a new one, or its shapes with their shardings."""

import functools
from collections.abc import Callable

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from ntm_jax.runtime import build
from ntm_jax.runtime.config import Optimizer
from ntm_jax.runtime.run import Run
from ntm_jax.training import optimizers


@flax.struct.dataclass
class State:
    """All that a step changes. The names are keys in checkpoints."""

    step: jax.Array  # int32 []
    params: dict
    opt_state: optax.OptState
    ema: dict


def abstract(run: Run) -> State:
    """The shapes of a run's training state with their shardings; see build.abstract."""
    return _new(run.model, run.config.optimizer, run.config.train.steps, run.mesh)[0]


def initialize(run: Run) -> State:
    """A new state, each array made on the devices that hold it; the same numbers on any mesh."""
    make = _new(run.model, run.config.optimizer, run.config.train.steps, run.mesh)[1]
    return make(jax.random.key(run.config.seed))


@functools.lru_cache(maxsize=8)  # runs that differ in their seeds or data share one program
def _new(model, settings: Optimizer, steps: int, mesh) -> tuple[State, Callable]:
    """(the abstract state, a jitted function from the seed's key to a state)."""
    @jax.jit
    def initial(key) -> State:
        params = build.initial_params(model, key)
        opt_state = _named_as(params, optimizers.make(settings, steps).init(params))
        return State(jnp.zeros((), jnp.int32), params, opt_state, jax.tree.map(jnp.copy, params))

    shapes = build.abstract(lambda: initial(jax.random.key(0)), model, mesh)
    shardings = jax.tree.map(lambda a: a.sharding, shapes)
    return shapes, jax.jit(lambda key: nn.unbox(initial(key)), out_shardings=shardings)


def _named_as(params, opt_state):
    """An optimizer's state, with axis names for arrays of the shapes of the parameters alone.

    An optimizer may mask a parameter, or keep a smaller array for it, in the same box of names.
    """
    def named(node) -> bool:
        return isinstance(node, nn.LogicallyPartitioned)

    boxes = filter(named, jax.tree.leaves(params, is_leaf=named))
    known = {(box.names, box.value.shape) for box in boxes}
    return jax.tree.map(
        lambda node: node.value if named(node) and (
            node.names, getattr(node.value, "shape", None)) not in known else node,
        opt_state, is_leaf=named)
