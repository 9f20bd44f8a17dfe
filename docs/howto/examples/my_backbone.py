"""A flow-matching network: model.backbone=mixer."""

import flax.linen as nn
import jax.numpy as jnp

from ntm_jax import backbones
from ntm_jax.core.config import ModelConfig


class Mixer(nn.Module):
    """Mixes all numbers of an example in one hidden layer."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x, t, y):
        c = self.config
        inputs = jnp.concatenate([x.reshape(len(x), -1), t[:, None]], 1)
        hidden = nn.gelu(nn.Dense(c.tokens * c.width)(inputs)).reshape(len(x), c.tokens, c.width)
        return nn.Dense(c.dim)(hidden).astype(jnp.float32), hidden


backbones.register("mixer", backbones.Backbone(lambda config, extra, attention: Mixer(config)))
