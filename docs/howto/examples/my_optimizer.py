"""An optimizer: optimizer.name=adafactor."""

import optax

from ntm_jax.training import optimizers


def adafactor(settings, learning_rate):
    """Adafactor, whose state is a fraction of AdamW's."""
    return optax.adafactor(learning_rate, multiply_by_parameter_scale=False)


optimizers.register("adafactor", adafactor)
