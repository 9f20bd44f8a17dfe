"""A kind of condition: model.condition=grade."""

import jax.numpy as jnp

from ntm_jax.core.conditions import Condition
from ntm_jax.core.transformer import dense, sinusoidal
from ntm_jax.data import conditions
from ntm_jax.data.conditions.label import Label


class Ordered(Condition):
    """Labels [B] in an order, such as grades, as numbers; the null condition is `width`."""

    def embed(self, module, y, total):
        features = sinusoidal(1000 * y / self.width, 64)
        return total + dense(total.shape[-1], (None, "embed_out"), jnp.float32, "grade")(features)


class Grade(Label):
    """One grade of each image, given and stored as a class is."""

    def network(self, settings):
        return Ordered(self.width)


conditions.register("grade", Grade)
