"""The model of a configuration and its training state, born sharded; and both read back from a run."""

import dataclasses
import math
import os
import zlib

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ntm_jax.backbones.flux2 import Flux2, Flux2Config
from ntm_jax.core import trajectory
from ntm_jax.core.flow_matching import Velocity
from ntm_jax.core.layers import Text, plain_attention
from ntm_jax.core.model import NTM, ModelConfig
from ntm_jax.data.pipeline import DataSpec
from ntm_jax.errors import UserError
from ntm_jax.runtime import optimizer, sharding
from ntm_jax.runtime.checkpoint import Checkpoints
from ntm_jax.runtime.config import SOLVERS, Config


@flax.struct.dataclass
class State:
    """All that a step changes."""

    step: jax.Array  # int32 []
    params: dict
    opt_state: optax.OptState
    ema: dict


def make_model(config: Config, spec: DataSpec, attention=plain_attention) -> NTM:
    """The model of a configuration for data of a shape; UserError where they do not fit."""
    m = dataclasses.asdict(config.model)
    condition, dtype, backbone, doubles = m.pop("condition"), jnp.dtype(m.pop("dtype")), m.pop("backbone"), m.pop("double_layers")
    for kind, present, name in (("class", spec.num_classes, "labels"), ("text", spec.text_width, "text")):
        if condition == kind and not present:
            raise UserError(f"config.model.condition is {kind}, and {config.data.source} has no {name}: set it to none")
    rows, columns = (size // spec.patch_size for size in spec.image_shape[:2])
    try:
        model_config = ModelConfig(
            **m, grid=(rows, columns), dim=spec.dim, num_classes=spec.num_classes if condition == "class" else 0,
            text_width=spec.text_width if condition == "text" else 0, steps=config.trajectory.steps, dtype=dtype, transporter_dtype=dtype,
            flat=not config.model.scan and config.mesh.sequence == 1)
    except ValueError as error:
        raise UserError(f"config.{error}") from None
    if model_config.head != "posterior":
        return NTM(model_config, attention)
    return NTM(model_config, attention, Velocity(model_config, attention) if backbone == "transformer" else _flux2(
        model_config, doubles, attention))


def _flux2(c: ModelConfig, doubles: int, attention) -> Flux2:
    """FLUX.2's transformer in a model's sizes."""
    if not c.text_width or not doubles or c.head_size % 8:
        raise UserError(f"config.model.backbone=flux2 needs config.model.condition=text, double_layers > 0 and a multiple of 8 as "
                        f"head_size: found text states of width {c.text_width}, {doubles} and {c.head_size}")
    return Flux2(Flux2Config(
        grid=c.grid, dim=c.dim, text_width=c.text_width, heads=c.width // c.head_size, head_size=c.head_size, double_layers=doubles,
        single_layers=c.predictor_layers, mlp_ratio=c.mlp_ratio, axes=(c.head_size // 4,) * 4, dtype=c.dtype, remat=c.remat,
        scan=c.scan), attention)


def exact(model: NTM) -> NTM:
    """The same model, or denoiser, for reported likelihoods and exact inverses: float32 means float32."""
    return model.clone(config=model.config.exact())


def plain(model: NTM) -> NTM:
    """The same mathematics with nothing computed twice and nothing inside a kernel: for counting the model's own FLOPs."""
    backbone = getattr(model, "backbone", None)
    changes = {"backbone": plain(backbone)} if backbone else {}
    return model.clone(config=dataclasses.replace(model.config, remat="none"), attention=plain_attention, **changes)


def condition(model: NTM, batch: dict):
    """What the model is told of the examples of a batch: their text where it is trained on text, else their labels."""
    return Text(batch["text"], batch["text_mask"]) if model.config.text_width else batch["label"]


def levels(config: Config, model: NTM, steps: int, t_min):
    """Noise levels [B, steps + 1] of trajectories that start at t_min [B]."""
    return trajectory.levels(steps, t_min, config.trajectory.schedule, config.shift(model.config.tokens))


def levels_at(config: Config, model: NTM, share):
    """Levels t [B] that lie a share [B] of the way from clean to pure noise, in the steps of an unending trajectory."""
    return trajectory.level(share, 1, 0.0, config.trajectory.schedule, config.shift(model.config.tokens))


def evaluated_levels(config: Config, model: NTM) -> np.ndarray:
    """The levels [K] of evaluation, from config.trajectory.t_min to 1."""
    return np.asarray(levels(config, model, config.evaluation_steps, jnp.full(1, config.trajectory.t_min)))[0]


def sampled_levels(config: Config, model: NTM) -> np.ndarray:
    """The levels [K] of sampling: those of evaluation, or of an ODE, from 0 to 1."""
    ode = config.sample.decoder in SOLVERS
    return np.asarray(levels(config, model, config.sample.steps, jnp.zeros(1)))[0] if ode else evaluated_levels(config, model)


def _initial(config: Config, model: NTM, key):
    c, steps = model.config, config.trajectory.steps[0]
    t = levels(config, model, steps, jnp.full(1, config.trajectory.t_min))
    if isinstance(model, NTM):
        inputs = jnp.zeros((1, steps + 1, c.tokens, c.dim)), t
    else:  # a denoiser
        inputs = jnp.zeros((1, c.tokens, c.dim)), t[:, 0], jnp.zeros(1)
    text = Text(jnp.zeros((1, 1, c.text_width)), jnp.zeros((1, 1), bool))
    params = model.init(key, *inputs, jnp.full(1, steps), text if c.text_width else jnp.zeros(1, jnp.int32))
    opt_state = optimizer.make(config.optimizer, config.train.steps).init(params)
    return State(jnp.zeros((), jnp.int32), params, opt_state, jax.tree.map(jnp.copy, params))


def abstract(config: Config, model: NTM, mesh) -> State:
    """The state's shapes with their shardings: nothing is computed. Not to be called within sharding.use(mesh).

    UserError where the model does not divide over the mesh.
    """
    heads, parts = model.config.kv_heads, mesh.shape["tensor"]
    if heads % parts:  # keys and values are no parameters, and their widths may divide all the same
        raise UserError(f"config.model.kv_heads is {heads}: expected a multiple of {parts}, the mesh's tensor axis, which splits heads; "
                        "lower config.mesh.tensor or raise kv_heads")
    boxed = jax.eval_shape(lambda: _initial(config, model, jax.random.key(0)))
    tree = sharding.shardings(boxed, mesh)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), nn.unbox(boxed), tree)


def check_memory(tree: State, mesh) -> None:
    """UserError where a state's arrays alone do not fit in the memory of the mesh's devices; tree: its abstract arrays."""
    device = mesh.local_devices[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit is None and device.platform == "cpu" and hasattr(os, "sysconf"):  # devices of a CPU share the machine's memory
        limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(mesh.local_devices)
    needed = sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree))
    if limit and needed > limit:
        raise UserError(f"parameters and optimizer take {needed / 2**30:,.1f} GiB of a device, which has {limit / 2**30:,.1f}: lower "
                        "config.model.width or config.model.predictor_layers, or raise config.mesh.fsdp on more devices")


def initialize(config: Config, model: NTM, mesh) -> State:
    """A new state, each array made on the devices that hold it; the same numbers on any mesh."""
    out = jax.tree.map(lambda a: a.sharding, abstract(config, model, mesh))
    with sharding.use(mesh):
        return jax.jit(lambda key: nn.unbox(_initial(config, model, key)), out_shardings=out)(jax.random.key(config.seed))


def restore_params(workdir: str, config: Config, model: NTM, mesh, step: int | None = None, raw: bool = False,
                   settings: dict | None = None):
    """(step, parameters) of a run: its EMA, or the raw ones; the latest checkpoint unless `step` names another. settings: see
    Checkpoints."""
    which = "params" if raw else "ema"
    with Checkpoints(workdir, settings=settings) as checkpoints:
        step, found = checkpoints.restore_subtree(step, {which: getattr(abstract(config, model, mesh), which)})
        return step, found[which]


def example_keys(root, name: str, index):
    """Keys [B] for the draws called `name` of the examples `index` [B], under root."""
    named = jax.random.fold_in(root, zlib.crc32(name.encode()))
    return jax.vmap(lambda i: jax.random.fold_in(named, i))(index)
