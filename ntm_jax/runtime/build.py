"""The model of a configuration, and its parameters: new, or as shapes with their shardings.

Symbols: B batch, K levels, N tokens, D token channels.
"""

import dataclasses
import functools
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from ntm_jax import backbones
from ntm_jax.core.config import ModelConfig
from ntm_jax.core.model import NTM
from ntm_jax.core.predictor import Predictor
from ntm_jax.core.transformer.arithmetic import PLAIN, Arithmetic
from ntm_jax.core.transformer.conditions import Text, Vector
from ntm_jax.data.pipeline import DataSpec
from ntm_jax.errors import UserError
from ntm_jax.runtime import sharding
from ntm_jax.runtime.config import Config


def make_model(config: Config, spec: DataSpec, arithmetic: Arithmetic = PLAIN) -> NTM:
    """The model of a configuration for data of a shape. Raises UserError where they do not fit."""
    settings = dataclasses.asdict(config.model)
    condition, dtype = settings.pop("condition"), jnp.dtype(settings.pop("dtype"))
    backbone = backbones.find(settings.pop("backbone"))
    for kind, present, name in (("class", spec.num_classes, "labels"),
                                ("text", spec.text_width, "text"),
                                ("vector", spec.condition_width, "vectors as conditions")):
        if condition == kind and not present:
            give = "give condition=..., or " if kind == "vector" else ""
            raise UserError(f"config.model.condition is {kind}, and {config.data.source} has no "
                            f"{name}: {give}set it to none")
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    rows, columns = (size // spec.patch_size for size in spec.image_shape[:2])
    try:
        model_config = ModelConfig(
            **{name: value for name, value in settings.items() if name in fields},
            grid=(rows, columns), dim=spec.dim, steps=config.trajectory.steps,
            num_classes=spec.num_classes if condition == "class" else 0,
            text_width=spec.text_width if condition == "text" else 0,
            condition_width=spec.condition_width if condition == "vector" else 0,
            dtype=dtype, transporter_dtype=dtype, arithmetic=arithmetic)
    except ValueError as error:
        raise UserError(f"config.{error}") from None
    if model_config.head != "posterior":
        return NTM(model_config)
    return NTM(model_config, backbone.build(model_config, settings, arithmetic.attention))


def plain(model):
    """The same model with plain arithmetic and no rematerialisation.

    Counting its FLOPs counts the model's own, and its exported program holds no custom kernel.
    """
    changes = {}
    if hasattr(getattr(model, "config", None), "remat"):
        changes["config"] = dataclasses.replace(model.config, remat="none")
    if isinstance(getattr(model, "config", None), ModelConfig):
        changes["config"] = dataclasses.replace(changes["config"], arithmetic=PLAIN)
    if hasattr(model, "attention"):  # a backbone's
        changes["attention"] = PLAIN.attention
    if getattr(model, "backbone", None):
        changes["backbone"] = plain(model.backbone)
    return model.clone(**changes)


def condition(model: NTM | Predictor, batch: dict):
    """The condition of a batch's examples: text or vectors as the model is trained, else labels."""
    if model.config.text_width:
        return Text(batch["text"], batch["text_mask"])
    if model.config.condition_width:
        return Vector(batch["condition"], jnp.ones(batch["condition"].shape[:1], bool))
    return batch["label"]


def condition_arrays(y) -> dict:
    """The arrays of a batch that hold the condition y: the inverse of `condition`."""
    if isinstance(y, Text):
        return {"text": y.states, "text_mask": y.mask}
    return {"condition": y.values} if isinstance(y, Vector) else {"label": y}


def initial_params(model: NTM | Predictor, key) -> dict:
    """New parameters, boxed with their logical axis names."""
    c, steps = model.config, model.config.steps[0]
    t = jnp.linspace(0.5, 1, steps + 1)[None]
    if isinstance(model, NTM):
        inputs = jnp.zeros((1, steps + 1, c.tokens, c.dim)), t
    else:  # a denoiser
        inputs = jnp.zeros((1, c.tokens, c.dim)), t[:, 0], jnp.zeros(1)
    text = Text(jnp.zeros((1, 1, c.text_width)), jnp.zeros((1, 1), bool))
    vector = Vector(jnp.zeros((1, c.condition_width)), jnp.ones(1, bool))
    y = text if c.text_width else vector if c.condition_width else jnp.zeros(1, jnp.int32)
    return cast(dict, model.init(key, *inputs, jnp.full(1, steps), y))


def abstract(initial, model: NTM | Predictor, mesh):
    """The shapes, with their shardings, of the arrays that initial() returns; computes nothing.

    Must be called outside sharding.use(mesh). Raises UserError if the model does not divide over
    the mesh.
    """
    heads, parts = model.config.kv_heads, mesh.shape["tensor"]
    if heads % parts:  # parameters may divide even where the heads of keys and values do not
        raise UserError(f"config.model.kv_heads is {heads}: expected a multiple of {parts}, the "
                        "mesh's tensor axis, which splits heads; lower config.mesh.tensor or raise "
                        "kv_heads")
    boxed = jax.eval_shape(initial)
    tree = sharding.shardings(boxed, mesh)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
                        nn.unbox(boxed), tree)


@functools.lru_cache(maxsize=4)
def abstract_params(model: NTM | Predictor, mesh) -> dict:
    """The shapes of a model's parameters with their shardings; see abstract."""
    return abstract(lambda: initial_params(model, jax.random.key(0)), model, mesh)
