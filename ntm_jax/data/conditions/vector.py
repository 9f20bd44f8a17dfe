"""Vectors as conditions: numbers in any units, standardised for the model.

Symbols: B batch, or n images; E the numbers of a vector; N tokens, D token channels, W width.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ntm_jax.core import conditions
from ntm_jax.core.trajectory import per_example
from ntm_jax.core.transformer import dense, norm, partitioned
from ntm_jax.data import transforms
from ntm_jax.data.conditions import Kind, stacked
from ntm_jax.errors import UserError, as_array


class VectorNetwork(nn.Module):
    """Features [B, width] of the values [B, E] of a Vector, by residual MLPs."""

    width: int
    layers: int

    @nn.compact
    def __call__(self, values):
        h = dense(self.width, (None, "embed"), jnp.float32, "in")(values)
        for i in range(self.layers):
            wide = norm(jnp.float32, f"norm_{i}")(h)
            wide = dense(4 * self.width, ("embed", "mlp"), jnp.float32, f"up_{i}")(wide)
            h += dense(self.width, ("mlp", "embed"), jnp.float32, f"down_{i}")(nn.silu(wide))
        return norm(jnp.float32, "norm")(h)


@dataclasses.dataclass(frozen=True)
class VectorCondition(conditions.Condition):
    """Vectors [B, E]; one that is not given has a learned embedding.

    layers: of a VectorNetwork, whose features the networks see in place of the vector; 0 for none.
    shift: the model is one of x - W y - b with W and b learned, which depends less on y.
    """

    layers: int = 0
    shift: bool = False

    def shapes(self, batch, tokens=1):
        return {"condition": jax.ShapeDtypeStruct((batch, self.width), jnp.float32)}

    def stack(self, arrays) -> conditions.Vector:
        values = arrays["condition"]
        return conditions.Vector(values, jnp.ones(values.shape[:1], bool))

    def arrays(self, y):
        return {"condition": y.values}

    def null_condition(self, y) -> conditions.Vector:
        return y._replace(given=jnp.zeros_like(y.given))

    def embed(self, module, y, total):
        inner = total.shape[-1]
        values = y.values if y.features is None else y.features
        h = nn.silu(dense(inner, (None, "embed"), jnp.float32, "vector_in")(values))
        h = dense(inner, ("embed", "embed_out"), jnp.float32, "vector_out")(h)
        init = partitioned(("embed_out",), nn.initializers.normal, 0.02 * math.sqrt(inner))
        nothing = module.param("null_vector", init, (inner,))
        return total + jnp.where(y.given[:, None], h, nothing[None])

    def networks(self, width, size):
        found = {}
        if self.shift:
            found["shift"] = dense(size, (None, None), jnp.float32, "shift", scale=0)
        if self.layers:
            found["features"] = VectorNetwork(min(width, 512), self.layers)
        return found

    def prepare(self, model, y):
        if not self.layers or y.features is not None:
            return y
        return y._replace(features=model.features(y.values))

    def centre(self, model, x, t, y):
        return x - self._offset(model, x, t, y) if self.shift else x

    def uncentre(self, model, x, t, y):
        return x + self._offset(model, x, t, y) if self.shift else x

    def _offset(self, model, like, t, y):
        """(1 - t) (W y + b), [B, N, D].

        Subtracting it from x_k gives the forward process of x - W y - b, which depends less on y.
        """
        return per_example((1 - t) * y.given, like) * model.shift(y.values).reshape(like.shape)


class Vector(Kind):
    """The vector of each image or row."""

    needs = "vectors as conditions (condition=... of arrays)"
    flag = "--condition"
    from_records = True
    shared = ("condition_width", "condition_mean", "condition_std")
    task = "other"

    @property
    def width(self):
        return self.spec.condition_width

    def network(self, settings):
        return VectorCondition(
            self.width, settings["condition_layers"], settings["condition_shift"])

    def describe(self):
        return f"vectors of {self.width} numbers"

    def validate(self, n, given):
        """A Vector of n standardised vectors. given: [E] or [n, E] numbers in their own units."""
        expected = f"{self.width} finite numbers [{self.width}]" + (
            f", or [{n}, {self.width}]" if n > 1 else "")
        if given is None:
            raise UserError("no condition is given, and the model is conditioned on vectors: "
                            f"expected {expected}")
        values = as_array("condition", given, expected)
        shapes = (self.width,), (1, self.width), (n, self.width)
        fits = values.dtype.kind in "fiub" and values.shape in shapes
        if not fits or not np.isfinite(values).all():
            raise UserError(f"condition is {values.dtype} {list(values.shape)}: expected "
                            f"{expected}")
        values = transforms.standardise(values, self.spec.condition_mean, self.spec.condition_std)
        return conditions.Vector(np.broadcast_to(values, (n, self.width)), np.ones(n, bool))

    def default(self, index, data, split):
        """The vectors of the split's records in turn."""
        values, = stacked(index, data, split, "condition")
        return conditions.Vector(values, np.ones(len(values), bool))

    def given(self, batch, captions):
        return list(self._own_units(batch["condition"]))

    def numbers(self, y):
        return self._own_units(y.values)

    def _own_units(self, values) -> np.ndarray:
        return transforms.unstandardise(values, self.spec.condition_mean, self.spec.condition_std)


def parse(texts) -> tuple[tuple[float, ...], ...] | None:
    """Texts such as 0.5,-1.2 -> vectors; None without texts. UserError for other texts."""
    try:
        return tuple(tuple(map(float, text.split(","))) for text in texts or ()) or None
    except ValueError:
        raise UserError("--condition takes numbers separated by commas, such as 0.5,-1.2") from None
