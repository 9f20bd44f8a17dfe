"""Optimizers: the table that config.optimizer.name chooses from, and the learning rate by step.

A new optimizer is one entry here, or a call of `register` in a module that --import names. Source
of the defaults: docs/concepts.md, section 5.
"""

from collections.abc import Callable

import jax
import optax
from optax import contrib

from ntm_jax.registry import Registry
from ntm_jax.runtime.config import Optimizer


def learning_rate(settings: Optimizer, steps: int) -> optax.Schedule:
    """The learning rate by step.

    It rises linearly to settings.learning_rate over settings.warmup_steps. Then it stays, or falls
    to settings.min_learning_rate at `steps`, along a cosine or a line; see settings.schedule.
    """
    peak, end, warmup = settings.learning_rate, settings.min_learning_rate, settings.warmup_steps
    rest = max(steps - warmup, 1)
    after = {"cosine": optax.cosine_decay_schedule(peak, rest, end / peak),
             "constant": optax.constant_schedule(peak),
             "linear": optax.linear_schedule(peak, end, rest)}[settings.schedule]
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def make(settings: Optimizer, steps: int) -> optax.GradientTransformation:
    """The optimizer of these settings, after clipping gradients by their global norm.

    Raises UserError for a name that is not in the table.
    """
    build, _ = OPTIMIZERS.find(settings.name)
    return optax.chain(optax.clip_by_global_norm(settings.clip),
                       build(settings, learning_rate(settings, steps)))


def adamw(settings: Optimizer, rate: optax.Schedule) -> optax.GradientTransformation:
    """AdamW with b1 = 0.9 and b2 = 0.95."""
    return optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=settings.weight_decay)


def muon(settings: Optimizer, rate: optax.Schedule) -> optax.GradientTransformation:
    """Muon of the layers' matrices; AdamW of all other parameters, with b1 = 0.9 and b2 = 0.95.

    Momentum is Nesterov's, of 0.95 in Muon. A matrix's update has the root mean square 0.2, as is
    usual of AdamW's, so one learning rate suits both (arXiv 2502.16982).
    """
    def matrices(params):
        # Layers are stacked, [layers, in, out]; each is a matrix of its own. Embeddings, the first
        # and last projection and the networks of conditions have no such axis.
        def one(path, array):
            stacked = array.ndim == 3 and any(getattr(key, "key", "") == "kernel" for key in path)
            return contrib.MuonDimensionNumbers(1, 2) if stacked else None

        return jax.tree_util.tree_map_with_path(one, params)

    return contrib.muon(
        rate, weight_decay=settings.weight_decay, adam_b2=0.95,
        adam_weight_decay=settings.weight_decay, muon_weight_dimension_numbers=matrices,
        consistent_rms=0.2)


def lion(settings: Optimizer, rate: optax.Schedule) -> optax.GradientTransformation:
    """Lion with b1 = 0.9 and b2 = 0.99."""
    return optax.lion(rate, b1=0.9, b2=0.99, weight_decay=settings.weight_decay)


def sgd(settings: Optimizer, rate: optax.Schedule) -> optax.GradientTransformation:
    """Nesterov momentum of 0.9, with decoupled weight decay."""
    return optax.chain(optax.trace(0.9, nesterov=True),
                       optax.add_decayed_weights(settings.weight_decay),
                       optax.scale_by_learning_rate(rate))


# {name: function (settings, learning rate by step) -> optax.GradientTransformation}
OPTIMIZERS: Registry[Callable[[Optimizer, optax.Schedule], optax.GradientTransformation]] = (
    Registry("config.optimizer.name", {"adamw": adamw, "muon": muon, "lion": lion, "sgd": sgd}))
register = OPTIMIZERS.register
