"""The training state and its optimizer, AdamW: a new state, or its shapes with their shardings.

Source of the optimizer: docs/concepts.md, section 5.
"""

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


@flax.struct.dataclass
class State:
    """All that a step changes. The names are keys in checkpoints."""

    step: jax.Array  # int32 []
    params: dict
    opt_state: optax.OptState
    ema: dict


def learning_rate(settings: Optimizer, steps: int):
    """The learning rate by step.

    It rises linearly to settings.learning_rate over settings.warmup_steps, then falls along a
    cosine to settings.min_learning_rate at `steps`.
    """
    return optax.warmup_cosine_decay_schedule(
        0.0, settings.learning_rate, settings.warmup_steps, max(steps, settings.warmup_steps + 1),
        end_value=settings.min_learning_rate)


def optimizer(settings: Optimizer, steps: int) -> optax.GradientTransformation:
    """AdamW with b1 = 0.9 and b2 = 0.95, after clipping gradients by their global norm."""
    return optax.chain(
        optax.clip_by_global_norm(settings.clip),
        optax.adamw(learning_rate(settings, steps), b1=0.9, b2=0.95,
                    weight_decay=settings.weight_decay),
    )


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
        opt_state = optimizer(settings, steps).init(params)
        return State(jnp.zeros((), jnp.int32), params, opt_state, jax.tree.map(jnp.copy, params))

    shapes = build.abstract(lambda: initial(jax.random.key(0)), model, mesh)
    shardings = jax.tree.map(lambda a: a.sharding, shapes)
    return shapes, jax.jit(lambda key: nn.unbox(initial(key)), out_shardings=shardings)
