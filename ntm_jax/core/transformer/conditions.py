"""What a model is conditioned on: noise levels, the number of steps, a class, text, a vector.

Symbols: B batch, M text tokens, E width of their states or of a vector, W width.
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

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


def null(y, num_classes: int):
    """The null condition for guidance and dropout, in the shape of y: labels [B], Text, Vector."""
    if isinstance(y, Text):
        return y._replace(mask=jnp.zeros_like(y.mask))
    if isinstance(y, Vector):
        return y._replace(given=jnp.zeros_like(y.given))
    return jnp.full_like(y, num_classes)


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


class Condition(nn.Module):
    """Embeds noise levels, step count, class, text and vector into the modulation of all layers.

    The modulation is [B, rows, W] (docs/concepts.md, section 4). Embeddings are summed at a width
    of at most 512. The pooled text is the mean of a function of each token, zero for the null
    caption. A vector that is not given has a learned embedding.
    """

    width: int
    num_classes: int  # 0: no class; the label num_classes is the null class of guidance
    embed_steps: bool  # the step count, where it varies
    rows: int = 6
    embed_text: bool = False
    vector_width: int = 0  # E of a Vector

    @nn.compact
    def __call__(self, times, steps, y):
        """-> [B, rows, W]. times: noise levels, a tuple of [B]; steps [B]; y: the condition.

        y is labels [B] in 0..num_classes, Text or Vector; a network without any ignores it.
        """
        inner = min(self.width, 512)
        scalars = {f"level_{i}": 1000 * t for i, t in enumerate(times)}
        if self.embed_steps:
            scalars["steps"] = 10 * steps
        total = 0
        for name, value in scalars.items():
            features = sinusoidal(value, min(inner, 256))
            h = dense(inner, (None, "embed"), jnp.float32, f"{name}_in")(features)
            total += dense(inner, ("embed", "embed_out"), jnp.float32, f"{name}_out")(nn.silu(h))
        if self.num_classes:
            std = 0.02 * math.sqrt(inner)
            init = partitioned((None, "embed"), nn.initializers.normal, std)
            total += nn.Embed(self.num_classes + 1, inner, embedding_init=init, name="class")(y)
        if self.embed_text:
            states = norm(jnp.float32, "text_norm")(y.states)
            h = nn.silu(dense(inner, (None, "embed"), jnp.float32, "text_in")(states))
            count = jnp.maximum(jnp.sum(y.mask, 1, keepdims=True), 1)
            mean = jnp.sum(h, 1, where=y.mask[..., None]) / count
            total += dense(inner, ("embed", "embed_out"), jnp.float32, "text_out")(mean)
        if self.vector_width:
            total += self._vector(y, inner)
        # Without this constraint XLA's partitioner splits the sum over two mesh axes and gets the
        # loss wrong by 1e-4 and gradients by half.
        total = nn.with_logical_constraint(total, ("batch", "embed_activation"))
        project = dense(self.rows * self.width, ("embed", "mlp"), jnp.float32, "modulation",
                        scale=0)
        modulation = project(nn.silu(total))
        return modulation.reshape(-1, self.rows, self.width)

    def _vector(self, y: Vector, inner: int):
        """The embedding [B, inner] of a vector."""
        values = y.values if y.features is None else y.features
        h = nn.silu(dense(inner, (None, "embed"), jnp.float32, "vector_in")(values))
        h = dense(inner, ("embed", "embed_out"), jnp.float32, "vector_out")(h)
        std = 0.02 * math.sqrt(inner)
        init = partitioned(("embed_out",), nn.initializers.normal, std)
        nothing = self.param("null_vector", init, (inner,))
        return jnp.where(y.given[:, None], h, nothing[None])
