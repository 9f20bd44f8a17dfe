"""AdamW with warm-up and cosine decay, gradient clipping, and the parameters' moving average.

Source: docs/concepts.md, section 5.
"""

import jax
import jax.numpy as jnp
import optax

from ntm_jax.runtime.config import Optimizer


def schedule(settings: Optimizer, steps: int):
    """The learning rate by step.

    It rises linearly to settings.learning_rate over settings.warmup_steps, then falls along a
    cosine to settings.min_learning_rate at `steps`.
    """
    return optax.warmup_cosine_decay_schedule(
        0.0, settings.learning_rate, settings.warmup_steps, max(steps, settings.warmup_steps + 1),
        end_value=settings.min_learning_rate)


def make(settings: Optimizer, steps: int) -> optax.GradientTransformation:
    """AdamW with b1 = 0.9 and b2 = 0.95, after clipping gradients by their global norm."""
    return optax.chain(
        optax.clip_by_global_norm(settings.clip),
        optax.adamw(schedule(settings, steps), b1=0.9, b2=0.95, weight_decay=settings.weight_decay),
    )


def update_ema(ema, params, step, decay: float):
    """The moving average (EMA) of parameters after step n = `step`, counted from 0.

    The decay warms up as min(decay, (1 + n) / (10 + n)).
    """
    n = step.astype(jnp.float32)
    warmed = jnp.minimum(decay, (1 + n) / (10 + n))
    return jax.tree.map(lambda average, value: warmed * average + (1 - warmed) * value, ema, params)
