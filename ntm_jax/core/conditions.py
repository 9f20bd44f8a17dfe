"""The condition of a model beside noise levels and the number of steps: none, or one kind.

The kinds are in data.conditions, one file each, with what users and data sources give for them.

Symbols: B batch, N tokens, D token channels, M text tokens, E width of their states or of a vector,
W width.
"""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp


class Text(NamedTuple):
    """A condition: states [B, M, E] of text tokens, and the mask [B, M] of real tokens.

    An empty mask is the null caption.
    """

    states: Any  # a jax or NumPy array, or a ShapeDtypeStruct
    mask: Any


class Vector(NamedTuple):
    """A condition of continuous numbers: values [B, E], standardised, and whether they are given.

    given: bool [B]; False is the null condition. features: [B, W], what a network of the
    model computes of the values, if it has one; the model itself adds them.
    """

    values: Any  # a jax or NumPy array, or a ShapeDtypeStruct
    given: Any
    features: Any = None


@dataclasses.dataclass(frozen=True)
class Condition:
    """What a model is conditioned on, and how it enters the networks: here nothing.

    A kind of condition is a subclass; it is frozen, as a part of a model's static configuration. A
    condition y of B examples is a tree of arrays [B, ...], here labels [B] that no network reads.

    Methods with `module` run in a compact method of that Flax module, Modulation in `embed` and
    Trunk in `prepend`: parameters and layers that they make are its own. Methods with `model` get
    the NTM, which has `networks` as attributes. The embeddings [B, V] have the width V of `total`,
    which is at most 512.

    width: the size of one condition, 0 for nothing: the number of classes, or E.
    """

    width: int = 0

    def shapes(self, batch, tokens: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """The arrays of a batch that hold its conditions, by name. tokens: M of a text."""
        return {"label": jax.ShapeDtypeStruct((batch,), jnp.int32)}

    def stack(self, arrays) -> Any:
        """The condition y of a batch, from its arrays by name."""
        return arrays["label"]

    def arrays(self, y) -> dict:
        """The arrays of a batch that hold the condition y by name, the inverse of `stack`."""
        return {"label": y}

    def null_condition(self, y) -> Any:
        """The null condition of guidance and dropout: arrays of the shapes and dtypes of y."""
        return jnp.full_like(y, self.width)

    def embed(self, module: nn.Module, y, total):
        """Adds the embedding of y to `total` [B, V], the predictor's embeddings of noise levels."""
        return total

    def embed_in_transporter(self, module: nn.Module, y, total):
        """Adds the embedding of y to `total` [B, V], the transporter's embeddings of levels."""
        return self.embed(module, y, total)

    def prepend(self, module, y, hidden, angles):
        """Puts tokens of y before hidden [B, N, W] and before the angles of its positions, if any.

        Returns both with the mask [B, M + N] of tokens that may be attended to, or None for all.
        """
        return hidden, angles, None

    def networks(self, width: int, size: int) -> dict[str, nn.Module]:
        """Networks that an NTM has for this kind, by name; width: W, size: N D.

        The names are attributes of the NTM, beside predictor, transporter, backbone and config.
        """
        return {}

    def prepare(self, model, y):
        """y with all that is computed of it once for all levels; returns a prepared y as it is."""
        return y

    def centre(self, model, x, t, y):
        """x [B, N, D] at levels t [B] less an offset that depends on t and y, and is 0 at t = 1.

        It does not depend on x, so that the log-determinant is 0.
        """
        return x

    def uncentre(self, model, x, t, y):
        """The inverse of `centre`."""
        return x


NOTHING = Condition()
