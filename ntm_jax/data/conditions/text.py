"""Texts as conditions: the states of their tokens, by a text encoder.

Symbols: B batch, or n images; M text tokens, E the width of their states; N image tokens, W width.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ntm_jax.core import conditions
from ntm_jax.core.transformer import dense, norm, partitioned
from ntm_jax.data.conditions import Kind, stacked
from ntm_jax.errors import UserError, abbreviate


@dataclasses.dataclass(frozen=True)
class TextCondition(conditions.Condition):
    """Text states of width E, whose tokens the predictor attends to.

    transporter: conditions the transporter on the pooled text, the mean of a function of each
    token, zero for the null caption.
    """

    transporter: bool = False

    def shapes(self, batch, tokens=1):
        return {"text": jax.ShapeDtypeStruct((batch, tokens, self.width), jnp.float16),
                "text_mask": jax.ShapeDtypeStruct((batch, tokens), jnp.bool_)}

    def stack(self, arrays) -> conditions.Text:
        return conditions.Text(arrays["text"], arrays["text_mask"])

    def arrays(self, y):
        return {"text": y.states, "text_mask": y.mask}

    def null_condition(self, y) -> conditions.Text:
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


class Text(Kind):
    """The text of each image."""

    needs = "text"
    flag = "--prompts"
    from_records = captioned = True
    shared = ("text",)
    task = "text-to-image"

    @property
    def width(self):
        return self.spec.text_width

    def network(self, settings):
        return TextCondition(self.width, settings["transporter_condition"] == "text")

    def describe(self):
        encoder = f" `{abbreviate(self.spec.text, str)}`" if self.spec.text else ""
        return f"the states of a text encoder{encoder}"

    def validate(self, n, given):
        """A Text of n texts. given: a Text of n texts, or of one for all."""
        if isinstance(given, conditions.Text):
            states, mask = np.asarray(given.states, np.float16), np.asarray(given.mask, bool)
            fits = states.ndim == 3 and len(states) in (1, n) and states.shape[2] == self.width
            if fits and mask.shape == states.shape[:2]:
                return conditions.Text(np.broadcast_to(states, (n, *states.shape[1:])),
                                       np.broadcast_to(mask, (n, mask.shape[1])))
        each = f", or one for each of the {n} images" if n > 1 else ""
        raise UserError("the model is conditioned on text: give label=run.text(captions), with one "
                        f"caption{each}, or your own Text(states [{n}, M, {self.width}], mask "
                        f"[{n}, M])")

    def default(self, index, data, split):
        """The texts of the split's records in turn."""
        return conditions.Text(*stacked(index, data, split, "text", "text_mask"))

    def given(self, batch, captions):
        if captions is None:
            return super().given(batch, captions)
        return [captions[int(i)] for i in batch["index"]]
