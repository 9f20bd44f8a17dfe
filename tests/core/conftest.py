"""Tiny models with random weights for the tests of core/.

Symbols: B batch, K levels, N tokens, D token channels.
"""

import dataclasses
import functools
import math
from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from ntm_jax.core.conditions import Text, Vector
from ntm_jax.core.config import ModelConfig
from ntm_jax.core.model import NTM
from ntm_jax.core.trajectory import Schedule
from ntm_jax.core.transporter import Block, Transporter
from ntm_jax.data.conditions.label import ClassCondition
from ntm_jax.data.conditions.text import TextCondition
from ntm_jax.data.conditions.vector import VectorCondition

TINY = {
    "grid": (2, 3), "dim": 2, "steps": (2,), "width": 16, "head_size": 8,
    "kv_heads": 2, "mlp_ratio": 2, "positions": "rotary", "transporter_width": 16,
    "transporter_blocks": 2, "transporter_layers": 1, "predictor_layers": 1,
    "head": "preconditioned", "log_scale_bound": 1.0, "data_std": 0.7, "dtype": jnp.float32,
    "transporter_dtype": jnp.float32, "remat": "none", "scan": False,
}

Inputs = namedtuple("Inputs", "xs t steps label")


def _inputs(config: ModelConfig, batch: int, steps: int | None = None, seed: int = 1) -> Inputs:
    """Random trajectories [B, K, N, D], their levels, the number of steps, and labels or text.

    Levels and labels differ between examples.
    """
    rng = np.random.default_rng(seed)
    steps = steps or config.steps[0]
    t = np.linspace([0.03] * batch, 1, steps + 1,
                    axis=1) + 0.01 * np.linspace(np.arange(batch), 0, steps + 1, axis=1)
    xs = rng.normal(size=(batch, steps + 1, config.tokens, config.dim))
    kind = config.condition
    y = np.arange(batch) % (kind.width + 1)
    if isinstance(kind, TextCondition):
        y = Text(rng.normal(size=(batch, 4, kind.width)).astype(np.float32),
                 np.ones((batch, 4), bool))
    if isinstance(kind, VectorCondition):
        y = Vector(rng.normal(size=(batch, kind.width)).astype(np.float32), np.arange(batch) != 1)
    return Inputs(xs.astype(np.float32), t.astype(np.float32), np.full(batch, steps), y)


@functools.cache
def _shapes(model: NTM):
    """The shapes of a model's weights."""
    return nn.unbox(jax.eval_shape(model.init, jax.random.key(0), *_inputs(model.config, 1)))[
        "params"]


def _alike(model: NTM) -> NTM:
    """The model whose weights' shapes are traced for all that differ in nothing else."""
    same = ["dtype", "transporter_dtype", "log_scale_bound", "data_std", "remat", "scan"]
    if model.config.positions == "rotary" and not getattr(model.config.condition, "shift", False):
        same.append("grid")
    return model.clone(config=dataclasses.replace(
        model.config, **{name: TINY[name] for name in same}))


@functools.cache
def _random_weights(model: NTM, seed: int):
    """Random weights, also where new ones are zero or one.

    A matrix keeps the size of its input. The last projections shrink it, so that log-scales stay
    within about 1 and a shift changes less than the tokens that it depends on; otherwise the
    inverse is a chaotic recursion.
    """
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        name = path[-1].key
        size = 0.3
        if name == "kernel":
            size = (0.3 if path[-2].key == "project" else 1) / math.sqrt(leaf.shape[-2])
        return ((name == "scale") + size * rng.normal(size=leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(fill, _shapes(_alike(model)))


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def noise_levels(steps: int, t_min, schedule: str = "linear", shift: float = 0.0):
    """All levels [B, steps + 1] of trajectories from t_min [B]."""
    return Schedule(schedule, shift).levels(steps, t_min)


@functools.cache
def compiled(module, method="__call__"):
    """module.apply of a method, compiled once for each module: ten times as fast as eager calls."""
    return jax.jit(
        module.init if method == "init" else functools.partial(module.apply, method=method))


def random_parameters(module, *args):
    """Random parameters of a module, so that tables which start at zero have an effect."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *args)
    leaves, tree = jax.tree.flatten(shapes)
    return jax.tree.unflatten(tree, [
        np.random.default_rng(i).normal(scale=0.3, size=leaf.shape).astype(np.float32)
        for i, leaf in enumerate(leaves)])


def _new_weights(model: NTM, seed: int):
    model = _alike(model)
    return jax.device_get(nn.unbox(compiled(model, "init")(jax.random.key(seed),
                                                           *_inputs(model.config, 1)))["params"])


class Bound:
    """A module with weights: `bound(x)` and `bound.method(x)` call the compiled module."""

    def __init__(self, module, weights):
        self.module, self.weights = module, weights

    def __call__(self, *args):
        return self._run("__call__", *args)

    def __getattr__(self, name):
        return functools.partial(self._run, name)

    def _run(self, method, *args):
        out = compiled(self.module, method)({"params": self.weights}, *args)
        # NumPy arrays where nothing is traced: eager jax operations compile one by one, which would
        # take most of a test's time.
        return jax.tree.map(lambda a: a if isinstance(a, jax.core.Tracer) else np.asarray(a), out)


class Tiny(Bound):
    """A tiny NTM with its inputs, its transporter and the transporter's blocks."""

    @property
    def config(self) -> ModelConfig:
        return self.module.config

    @property
    def params(self):
        return {"params": self.weights}

    @property
    def transporter(self) -> Bound:
        return Bound(Transporter(self.config), self.weights["transporter"])

    def block(self, index: int) -> Bound:
        block = Block(self.config, index % 2 == 1)
        return Bound(block, self.weights["transporter"][f"blocks_{index}"])

    def inputs(self, batch: int = 2, steps: int | None = None, seed: int = 1) -> Inputs:
        return _inputs(self.config, batch, steps, seed)


RICH = {"condition": ClassCondition(2, True), "steps": (2, 3), "transporter_blocks": 1}


@pytest.fixture(scope="session")
def random(tiny):
    """A model of two classes and two numbers of steps, with random weights."""
    return tiny(**RICH)


@pytest.fixture(scope="session")
def tiny():
    """tiny(**changes to TINY) -> a Tiny with random weights, or with initial ones for new=True."""

    def build(new: bool = False, seed: int = 2, **changes) -> Tiny:
        model = NTM(ModelConfig(**(TINY | changes)))
        return Tiny(model, _new_weights(model, seed) if new else _random_weights(model, seed))

    return build
