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
from ntm_jax.core.pixels import PixelLikelihood, PixelNetwork, new_noise_params
from ntm_jax.core.predictor import Predictor
from ntm_jax.core.transformer import PLAIN, Arithmetic
from ntm_jax.data import conditions
from ntm_jax.data.pipeline import DataSpec
from ntm_jax.errors import UserError
from ntm_jax.runtime import sharding
from ntm_jax.runtime.config import Config, Model


def make_model(config: Config, spec: DataSpec, arithmetic: Arithmetic = PLAIN) -> NTM:
    """The model of a configuration for data of a shape. Raises UserError where they do not fit."""
    settings = dataclasses.asdict(config.model)
    kind, dtype = conditions.find(settings.pop("condition"))(spec), jnp.dtype(settings.pop("dtype"))
    backbone = backbones.find(settings.pop("backbone"))
    if kind.needs and not kind.width:
        raise UserError(f"config.model.condition is {config.model.condition}, and "
                        f"{config.data.source} has no {kind.needs}: set it to none")
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    rows, columns = (size // spec.patch_size for size in spec.image_shape[:2])
    model_config = ModelConfig(
        **{name: value for name, value in settings.items() if name in fields},
        grid=(rows, columns), dim=spec.dim, steps=config.trajectory.steps,
        condition=kind.network(settings), dtype=dtype, transporter_dtype=dtype,
        learned_values=spec.pixel_levels if settings["pixel_likelihood"] == "learned" else 0,
        arithmetic=arithmetic)
    _check_heads(model_config)
    if model_config.head != "flow_matching":
        return NTM(model_config)
    return NTM(model_config, backbone.build(model_config, settings, arithmetic.attention))


def _check_heads(c: ModelConfig) -> None:
    for name in ("width", "transporter_width") if c.transporter_blocks else ("width",):
        width = getattr(c, name)
        if width % (c.head_size * c.kv_heads):
            raise UserError(f"config.model.{name} = {width} must be a multiple of "
                            f"head_size x kv_heads = {c.head_size} x {c.kv_heads}: change one "
                            "of them")


def pixel_likelihood(config: Config, spec: DataSpec, model) -> PixelLikelihood:
    """p(x | x_0) of a configuration's data.

    model: the run's, whose predictor's width the network has.
    """
    kind = config.model.pixel_likelihood if spec.pixel_levels else "density"
    if kind != "network":
        return PixelLikelihood(kind, spec.pixel_levels)
    sizes = dataclasses.replace(
        model.config, predictor_layers=1, dtype=jnp.float32, precision="highest", remat="none",
        condition=conditions.find(config.model.condition)(spec).network(vars(Model())))
    return PixelLikelihood(kind, spec.pixel_levels, PixelNetwork(sizes, spec.pixel_levels))


def initial_pixel_params(pixels: PixelLikelihood, spec: DataSpec, key) -> dict:
    """New parameters of p(x | x_0), the collection `pixels` of a model's, with a flat histogram."""
    found, shape = {}, (spec.tokens, spec.dim)
    if pixels.kind in ("histogram", "network", "learned"):
        found["log_prior"] = jnp.zeros((*shape, spec.pixel_levels))
    if pixels.network:
        y = _no_condition(pixels.network.config)
        variables = pixels.network.init(key, jnp.zeros((1, *shape)), jnp.full(1, 0.5), y)
        found["network"] = nn.unbox(variables["params"])
    return found


def reference_variant(model):
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
        changes["backbone"] = reference_variant(model.backbone)
    return model.clone(**changes)


def initial_params(model: NTM | Predictor, key) -> dict:
    """New parameters, boxed with their logical axis names."""
    c, steps = model.config, model.config.steps[0]
    t = jnp.linspace(0.5, 1, steps + 1)[None]
    if isinstance(model, NTM):
        inputs = jnp.zeros((1, steps + 1, c.tokens, c.dim)), t
    else:  # a denoiser
        inputs = jnp.zeros((1, c.tokens, c.dim)), t[:, 0], jnp.zeros(1)
    found = cast(dict, model.init(key, *inputs, jnp.full(1, steps), _no_condition(c)))
    if isinstance(model, NTM) and c.learned_values:
        found["params"]["pixels"] = new_noise_params(c.learned_values)
    return found


def _no_condition(c: ModelConfig):
    """A condition of one example, of zeros."""
    return c.condition.stack({name: jnp.zeros(a.shape, a.dtype)
                              for name, a in c.condition.shapes(1).items()})


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
