"""Pretrained flow-matching networks: the table that config.model.backbone chooses from.

A backbone is a flax module from (x_t [B, N, D], t [B], condition y) to (velocity [B, N, D] in
float32, last hidden states [B, N, W]); see core.flow_matching. A new one is a file for its network,
a file for the reader of its public checkpoints, and one entry here or a call of `register`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from ntm_jax.core.config import ModelConfig
from ntm_jax.core.flow_matching import Velocity
from ntm_jax.registry import Registry


@dataclasses.dataclass(frozen=True)
class Backbone:
    """One kind of flow-matching network.

    build(config, extra, attention) makes the module; `extra` holds the settings of config.model
    that ModelConfig does not have, such as double_layers. It raises UserError where sizes do not
    fit. read(path, parameters) reads a public checkpoint into the structure, shapes, dtypes and
    shardings of the abstract `parameters`; None where there is no public checkpoint.
    """

    build: Callable[[ModelConfig, Mapping[str, Any], Callable], Any]
    read: Callable[[str, Any], Any] | None = None


def _transformer(config: ModelConfig, extra: Mapping[str, Any], attention: Callable) -> Velocity:
    return Velocity(config)


BACKBONES: Registry[Backbone] = Registry("config.model.backbone", {
    "transformer": Backbone(_transformer),
    "flow_map": "ntm_jax.projects.densities.flow_map:BACKBONE",
    "flux2": "ntm_jax.projects.flux2.network:BACKBONE"})


def register(name: str, backbone: Backbone) -> None:
    """Adds a backbone for config.model.backbone=name. Raises UserError if the name is taken."""
    BACKBONES.register(name, backbone)


def find(name: str) -> Backbone:
    """The backbone of a name. Raises UserError if there is none."""
    return BACKBONES.find(name)[0]
