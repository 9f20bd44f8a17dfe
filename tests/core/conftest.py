"""Tiny models with random weights for the tests of core/. Symbols as there: B batch, K levels, N tokens, D token channels."""

import functools
import math
from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from ntm_jax.core import trajectory
from ntm_jax.core.model import NTM, ModelConfig

TINY = {
    "grid": (2, 3), "dim": 2, "num_classes": 0, "steps": (2,), "width": 16, "head_size": 8, "kv_heads": 2, "mlp_ratio": 2,
    "positions": "rotary", "transporter_width": 16, "transporter_blocks": 2, "transporter_layers": 1, "predictor_layers": 1,
    "head": "preconditioned", "log_scale_bound": 1.0, "data_std": 0.7, "dtype": jnp.float32, "transporter_dtype": jnp.float32,
    "remat": "none", "scan": False,
}

Inputs = namedtuple("Inputs", "xs t steps label")


def _inputs(config: ModelConfig, batch: int, steps: int | None = None, seed: int = 1) -> Inputs:
    """Random trajectories [B, K, N, D] with levels that differ between examples, the number of steps, and labels that differ too."""
    rng = np.random.default_rng(seed)
    steps = steps or config.steps[0]
    t = trajectory.levels(steps, jnp.linspace(0.03, 0.05, batch, dtype=jnp.float32), "linear", 0.0)
    xs = jnp.asarray(rng.normal(size=(batch, steps + 1, config.tokens, config.dim)), jnp.float32)
    return Inputs(xs, t, jnp.full(batch, steps), jnp.arange(batch) % (config.num_classes + 1))


def _module_and_shapes(config: ModelConfig):
    model = NTM(config)
    return model, nn.unbox(jax.eval_shape(model.init, jax.random.key(0), *_inputs(config, 1)))


@functools.cache
def _random_parameters(config: ModelConfig, seed: int):
    """Every weight random, the ones that start at zero or one included: a matrix keeps the size of its input, the rest is of size 0.3."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        name = path[-1].key
        size = 1 / math.sqrt(leaf.shape[-2]) if name == "kernel" else 0.3
        return jnp.asarray((name == "scale") + size * rng.normal(size=leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(fill, _module_and_shapes(config)[1])


class Tiny:
    """A tiny model with its parameters: `tiny.predict(...)` is `NTM.predict` under them, `tiny(...)` is the trajectory's terms."""

    def __init__(self, config, params):
        self.config, self.model, self.params = config, NTM(config), params

    def inputs(self, batch: int = 2, steps: int | None = None, seed: int = 1) -> Inputs:
        return _inputs(self.config, batch, steps, seed)

    def __call__(self, *args):
        return self.model.apply(self.params, *args)

    def __getattr__(self, name):
        return functools.partial(self.model.apply, self.params, method=getattr(NTM, name))


@pytest.fixture(scope="session")
def tiny():
    """tiny(**changes to TINY) -> a Tiny with random weights; new=True: as initialised."""

    def build(new: bool = False, seed: int = 0, **changes) -> Tiny:
        config = ModelConfig(**(TINY | changes))
        if new:
            return Tiny(config, nn.unbox(jax.jit(NTM(config).init)(jax.random.key(seed), *_inputs(config, 1))))
        return Tiny(config, _random_parameters(config, seed))

    return build
