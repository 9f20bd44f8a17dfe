"""What a model is conditioned on: noise levels, the number of steps, and one kind of condition.

A kind says how it enters the networks; what users and data sources give for it is in
data.conditions.

Symbols: B batch, N tokens, D token channels, M text tokens, E width of their states or of a vector,
W width.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ntm_jax.core.trajectory import per_example
from ntm_jax.core.transformer.layers import dense, norm, partitioned


class Text(NamedTuple):
    """A condition: states [B, M, E] of text tokens, and the mask [B, M] of real tokens.

    An empty mask is the null caption.
    """

    states: Any  # a jax or NumPy array, or a ShapeDtypeStruct
    mask: Any


class Vector(NamedTuple):
    """A condition of continuous numbers: values [B, E], standardised, and whether they are given.

    given: bool [B]; False is the null condition. features: [B, W], what VectorNetwork computes of
    the values, for a model that has one; the model itself adds them.
    """

    values: Any  # a jax or NumPy array, or a ShapeDtypeStruct
    given: Any
    features: Any = None


def sinusoidal(t, width: int):
    """Features [..., width] of t [...]: cosines and sines at `width`/2 frequencies.

    The frequencies fall geometrically from 1 to 1/10,000.
    """
    frequencies = jnp.exp(-math.log(10_000) * jnp.arange(width // 2) / (width // 2))
    angles = jnp.multiply.outer(t, frequencies)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)


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
class Condition:
    """What a model is conditioned on, and how it enters the networks: here nothing.

    A kind of condition is a subclass; it is frozen, as a part of a model's static configuration. A
    condition y of B examples is a tree of arrays [B, ...], here labels [B] that no network reads.

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

    def null(self, y) -> Any:
        """The null condition of guidance and dropout, in the shape of y."""
        return jnp.full_like(y, self.width)

    def embed(self, module: nn.Module, y, total):
        """The embeddings [B, W] of a predictor's levels plus that of y."""
        return total

    def embed_in_transporter(self, module: nn.Module, y, total):
        """The embeddings [B, W] of a transporter's levels plus that of y."""
        return self.embed(module, y, total)

    def prepend(self, module, y, hidden, angles):
        """Puts tokens of y before hidden [B, N, W] and before the angles of its positions, if any.

        Returns both with the mask [B, M + N] of tokens that may be attended to, or None for all.
        """
        return hidden, angles, None

    def networks(self, width: int, size: int) -> dict[str, nn.Module]:
        """The networks of this kind that an NTM of width W and N D numbers has, by name."""
        return {}

    def prepare(self, model, y):
        """y with all that is computed of it once for every level; model has the networks."""
        return y

    def centre(self, model, x, t, y):
        """x [B, N, D] at levels t [B] less what the model knows of it from y."""
        return x

    def uncentre(self, model, x, t, y):
        """The inverse of `centre`."""
        return x


NOTHING = Condition()


class ClassCondition(Condition):
    """A class: labels [B] in 0..width; the label width is the null class."""

    def embed(self, module, y, total):
        inner = total.shape[-1]
        init = partitioned((None, "embed"), nn.initializers.normal, 0.02 * math.sqrt(inner))
        return total + nn.Embed(self.width + 1, inner, embedding_init=init, name="class")(y)


@dataclasses.dataclass(frozen=True)
class TextCondition(Condition):
    """Text states of width E, whose tokens the predictor attends to.

    transporter: conditions the transporter on the pooled text, the mean of a function of each
    token, zero for the null caption.
    """

    transporter: bool = False

    def shapes(self, batch, tokens=1):
        return {"text": jax.ShapeDtypeStruct((batch, tokens, self.width), jnp.float16),
                "text_mask": jax.ShapeDtypeStruct((batch, tokens), jnp.bool_)}

    def stack(self, arrays) -> Text:
        return Text(arrays["text"], arrays["text_mask"])

    def arrays(self, y):
        return {"text": y.states, "text_mask": y.mask}

    def null(self, y) -> Text:
        return y._replace(mask=jnp.zeros_like(y.mask))

    def embed_in_transporter(self, module, y, total):
        if not self.transporter:
            return total
        inner = total.shape[-1]
        states = norm(jnp.float32, "text_norm")(y.states)
        h = nn.silu(dense(inner, (None, "embed"), jnp.float32, "text_in")(states))
        count = jnp.maximum(jnp.sum(y.mask, 1, keepdims=True), 1)
        mean = jnp.sum(h, 1, where=y.mask[..., None]) / count
        return total + dense(inner, ("embed", "embed_out"), jnp.float32, "text_out")(mean)

    def prepend(self, module, y, hidden, angles):
        """See Condition. A text without tokens, the null caption, is one learned token."""
        dtype, width = module.config.dtype, hidden.shape[-1]
        states = norm(dtype, "text_norm")(y.states)
        states = dense(width, (None, "embed"), dtype, "text")(states)
        nothing = module.param(
            "null_text", partitioned(("embed",), nn.initializers.normal, 0.02), (width,))
        first = jnp.arange(y.mask.shape[1])[None] == 0
        empty = ~jnp.any(y.mask, 1, keepdims=True) & first
        states = jnp.where(empty[..., None], nothing.astype(states.dtype)[None, None], states)
        present = y.mask.astype(bool) | empty
        keys = jnp.concatenate([present, jnp.ones(hidden.shape[:2], bool)], 1)
        if angles is not None:  # the text states hold their own positions
            angles = jnp.concatenate([jnp.zeros((y.mask.shape[1], angles.shape[1])), angles])
        return jnp.concatenate([states.astype(hidden.dtype), hidden], 1), angles, keys


@dataclasses.dataclass(frozen=True)
class VectorCondition(Condition):
    """Vectors [B, E]; one that is not given has a learned embedding.

    layers: of a VectorNetwork, whose features the networks see in place of the vector; 0 for none.
    shift: the model is one of x - W y - b with W and b learned, which depends less on y.
    """

    layers: int = 0
    shift: bool = False

    def shapes(self, batch, tokens=1):
        return {"condition": jax.ShapeDtypeStruct((batch, self.width), jnp.float32)}

    def stack(self, arrays) -> Vector:
        values = arrays["condition"]
        return Vector(values, jnp.ones(values.shape[:1], bool))

    def arrays(self, y):
        return {"condition": y.values}

    def null(self, y) -> Vector:
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
        """(1 - t) (W y + b), [B, N, D]: x_k less this is the forward process of x - W y - b."""
        return per_example((1 - t) * y.given, like) * model.shift(y.values).reshape(like.shape)


class Modulation(nn.Module):
    """Embeds noise levels, step count and the condition into the modulation of all layers.

    The modulation is [B, rows, W] (docs/concepts.md, section 4). Embeddings are summed at a width
    of at most 512.
    """

    width: int
    embed_steps: bool  # the step count, where it varies
    embed: Callable = NOTHING.embed  # adds the condition; see Condition
    rows: int = 6

    @nn.compact
    def __call__(self, times, steps, y):
        """-> [B, rows, W]. times: noise levels, a tuple of [B]; steps [B]; y: the condition."""
        inner = min(self.width, 512)
        scalars = {f"level_{i}": 1000 * t for i, t in enumerate(times)}
        if self.embed_steps:
            scalars["steps"] = 10 * steps
        total = 0
        for name, value in scalars.items():
            features = sinusoidal(value, min(inner, 256))
            h = dense(inner, (None, "embed"), jnp.float32, f"{name}_in")(features)
            total += dense(inner, ("embed", "embed_out"), jnp.float32, f"{name}_out")(nn.silu(h))
        total = self.embed(self, y, total)
        # Without this constraint XLA's partitioner splits the sum over two mesh axes and gets the
        # loss wrong by 1e-4 and gradients by half.
        total = nn.with_logical_constraint(total, ("batch", "embed_activation"))
        project = dense(self.rows * self.width, ("embed", "mlp"), jnp.float32, "modulation",
                        scale=0)
        modulation = project(nn.silu(total))
        return modulation.reshape(-1, self.rows, self.width)
