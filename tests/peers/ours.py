"""Ours: the train step of an NTM of four steps, and the inverse of its transporter.

The step takes a quarter of the images of a peer's, with four levels each, through 2 blocks and a
predictor as deep as both, so that as many tokens go through as many layers.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ntm_jax import host_memory
from ntm_jax.core.model import NTM, full_precision
from ntm_jax.data import pipeline
from ntm_jax.experiments import default
from ntm_jax.runtime import config_file, sharding
from ntm_jax.runtime.run import untrained
from ntm_jax.tools.rates import rows
from ntm_jax.training import state
from tests.peers import jax_cpu
from tests.peers.work import Sizes, Work

host_memory.keep_freed()  # as our programs do
STEPS = 4  # T
products = jax_cpu.products


def _setting(sizes: Sizes, **overrides) -> rows.BenchmarkInput:
    values = default.get_config()
    values.update_from_flattened_dict({
        "data.source": f"mock:{sizes.side}x{sizes.side}x3,levels=256",
        "data.patch_size": sizes.patch, "trajectory.steps": (STEPS,),
        "model.width": sizes.width, "model.transporter_width": sizes.width,
        "model.head_size": sizes.head, "model.kv_heads": sizes.width // sizes.head,
        "model.transporter_layers": sizes.layers, "model.condition": "none",
        "train.condition_dropout": 0.0, "optimizer.warmup_steps": 0} | overrides)
    config = config_file.complete(values)
    source = config.data.open(config.data.split)
    run = untrained(config, pipeline.spec(source, sizes.patch), sharding.make_mesh(config.mesh))
    return rows.BenchmarkInput(run, sizes.images, source, source)


def train_step(sizes: Sizes) -> Work:
    """A step of end-to-end training, with its noise, gradient clipping and EMA."""
    half = sizes.blocks // 2
    setting = _setting(sizes, **{
        "data.batch_size": sizes.images // STEPS, "model.transporter_blocks": half,
        "model.predictor_layers": half * sizes.layers})
    case = rows.TRAINING["train step"](setting)
    count = 3 * sizes.forward_flops(ends=3 * (half + 1) * sizes.dim * sizes.width)
    return Work(lambda: jax.block_until_ready(case.once()), count)


def inverse(sizes: Sizes, how: str) -> Work:
    """The inverse of a transporter whose last projections are random."""
    setting = _setting(sizes, **{"data.batch_size": 1, "model.predictor_layers": 1,
                                 "model.transporter_blocks": sizes.blocks})
    model = full_precision(setting.run.model)
    params = jax.tree_util.tree_map_with_path(
        _act, state.initialize(dataclasses.replace(setting.run, model=model)).params)
    t, steps, y = jnp.full(sizes.images, 0.5), jnp.full(sizes.images, STEPS), jnp.zeros((), int)
    x = jax_cpu.noise(sizes, sizes.tokens, sizes.dim)
    return jax_cpu.inverting(
        lambda params, x: model.apply(params, x, t, steps, y, method=NTM.transport)[0],
        lambda params, u: model.apply(params, u, t, steps, y, how, method=NTM.invert)[0],
        params, x, sizes.forward_flops())


def _act(path, leaf):
    names = [key.key for key in path]
    if "transporter" in names and names[-2:] == ["project", "kernel"]:
        return jax_cpu.ends(jax.random.key(len(str(path))), leaf)
    return leaf
