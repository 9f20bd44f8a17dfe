"""FLUX.2's transformer, a flow-matching backbone; flux2_weights.py reads its public weights.

The default sizes are those of klein 4B. Text and image are two streams that meet in the attention
of the double layers, and one sequence, text first, in the single layers. Source:
black-forest-labs/flux2, src/flux2/model.py, and diffusers' Flux2Transformer2DModel, without the
guidance embedding.

Symbols: B batch, N image tokens, D their channels, M text tokens, E their width, S = M + N tokens,
W = H C width, H heads, C head size.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from ntm_jax.backbones import Backbone
from ntm_jax.core.conditions import Text
from ntm_jax.core.config import ModelConfig
from ntm_jax.core.transformer import (
    dense,
    norm,
    partitioned,
    plain_attention,
    sinusoidal,
    stacked,
)
from ntm_jax.errors import UserError
from ntm_jax.projects.flux2 import weights as flux2_weights

TIME_FEATURES = 256  # cosines and sines of 1000 t that embed t


@dataclasses.dataclass(frozen=True)
class Flux2Config:
    """Sizes and choices of the network. Static: a change compiles again."""

    grid: tuple[int, int]  # image tokens by row and column
    dim: int = 128  # D
    text_width: int = 7680  # E
    heads: int = 24
    head_size: int = 128
    double_layers: int = 5
    single_layers: int = 20
    mlp_ratio: int = 3
    theta: int = 2000  # the lowest rotary frequency is almost 1/theta
    # Channels of a head that rotate with a token's time, row, column and position in the text, even
    # numbers of sum head_size.
    axes: tuple[int, int, int, int] = (32, 32, 32, 32)
    dtype: Any = jnp.bfloat16
    remat: str = "none"  # none, full, narrow, dots: see core.transformer.REMAT
    scan: bool = True

    @property
    def width(self) -> int:
        return self.heads * self.head_size


def rotary(config: Flux2Config, text_tokens: int):
    """Cosines and sines of the rotation angles of all tokens, [S, C/2] float32 each.

    Text token i has the position (0, 0, 0, i), an image token (0, row, column, 0). Computed in
    NumPy: float32 angles of hundreds of radians would be off by 1e-5.
    """
    positions = np.zeros((text_tokens + config.grid[0] * config.grid[1], 4))
    positions[:text_tokens, 3] = np.arange(text_tokens)
    rows, columns = np.indices(config.grid)
    positions[text_tokens:, 1], positions[text_tokens:, 2] = rows.ravel(), columns.ravel()
    frequencies = [float(config.theta) ** (-np.arange(0, size, 2) / size) for size in config.axes]
    angles = [positions[:, i, None] * f for i, f in enumerate(frequencies)]
    angles = np.concatenate(angles, 1)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotate(x, turn):
    """x [B, S, H, C] rotated by (cos, sin) [S, C/2]; channels 2i and 2i+1 are a pair.

    In core.transformer.rotate channels i and i + C/2 are.
    """
    cos, sin = (a[None, :, None] for a in turn)
    first, second = jnp.moveaxis(x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2), -1, 0)
    turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], -1)
    return turned.reshape(x.shape).astype(x.dtype)


# Without explicit layouts XLA's partitioner concatenates and splits tokens, and spreads
# modulations, over several mesh axes and gets them wrong: velocities are off by 0.02 to 1 on
# 2 x 2 x 2 devices.


def laid_out(x, *axes):
    """x [B, S, ...] laid out by examples, tokens and the logical axes of the other dimensions."""
    return nn.with_logical_constraint(x, ("batch", "tokens", *axes))


def joined(text, image, *axes):
    """Text tokens followed by image tokens, [B, S, ...]."""
    return laid_out(jnp.concatenate([text, image], 1), *axes)


def parted(x, text_tokens: int, *axes):
    """The inverse of `joined`."""
    return tuple(laid_out(part, *axes) for part in jnp.split(x, [text_tokens], 1))


class _Layer(nn.Module):
    """The parts of both kinds of layer.

    `stream` is the prefix of a stream's parameter names; it is empty with one stream.
    """

    config: Flux2Config
    attention: Callable

    def _norm(self, x, shift, scale, name: str):
        return norm(self.config.dtype, name)(x) * (1 + scale) + shift

    def _heads(self, x, stream: str):
        """x [B, S, W] -> queries, keys and values [B, S, H, C]; queries and keys are normalised."""
        c = self.config

        def heads(name):
            project = dense(
                c.width, ("embed", "heads"), c.dtype, f"{stream}{name}", bias=False)
            y = checkpoint_name(project(x), "narrow")
            return y.reshape(*x.shape[:-1], c.heads, c.head_size)

        q, k, v = heads("query"), heads("key"), heads("value")
        ones = partitioned((None,), nn.initializers.ones_init)
        q = nn.RMSNorm(dtype=c.dtype, scale_init=ones, name=f"{stream}query_norm")(q)
        k = nn.RMSNorm(dtype=c.dtype, scale_init=ones, name=f"{stream}key_norm")(k)
        return q, k, v

    def _attend(self, q, k, v, turn, keys):
        """The attention's output [B, S, W], before the output projection."""
        q, k = rotate(q, turn), rotate(k, turn)
        q = laid_out(q, "heads", None)
        k, v = (nn.with_logical_constraint(a, ("batch", "keys", "heads", None)) for a in (k, v))
        y = self.attention(q, k, v, causal=False, keys=keys)
        return checkpoint_name(y.reshape(*y.shape[:2], -1), "narrow")

    def _out(self, y, stream: str):
        c = self.config
        project = dense(c.width, ("heads", "embed"), c.dtype, f"{stream}out", bias=False)
        return checkpoint_name(project(y), "narrow")

    def _mlp(self, x, stream: str):
        c = self.config

        def wide(name):
            return dense(c.mlp_ratio * c.width, ("embed", "mlp"), c.dtype, f"{stream}{name}",
                         bias=False)(x)

        gate, up = wide("mlp_gate"), wide("mlp_up")
        h = laid_out(nn.silu(gate) * up, "mlp")
        down = dense(c.width, ("mlp", "embed"), c.dtype, f"{stream}mlp_down", bias=False)
        return checkpoint_name(down(h), "narrow")


class DoubleLayer(_Layer):
    """Text and image streams with separate weights, which attend to each other."""

    @nn.compact
    def __call__(self, streams, modulations, turn, keys):
        """streams (text [B, M, W], image [B, N, W]), modulations [B, 6, W] of each -> streams."""
        names = ("text_", "image_")
        streams = [laid_out(x, "embed_activation") for x in streams]
        parts = [jnp.moveaxis(m[:, :, None].astype(self.config.dtype), 1, 0) for m in modulations]
        heads = [self._heads(self._norm(x, shift, scale, f"{name}norm_1"), name)
                 for name, x, (shift, scale, *_) in zip(names, streams, parts, strict=True)]
        q, k, v = (joined(*both, "heads", None) for both in zip(*heads, strict=True))
        seen = self._attend(q, k, v, turn, keys)
        done = []
        for name, x, y, (_, _, gate_1, shift_2, scale_2, gate_2) in zip(
                names, streams, parted(seen, streams[0].shape[1], "heads"), parts, strict=True):
            x = x + gate_1 * self._out(y, name)
            h = self._norm(x, shift_2, scale_2, f"{name}norm_2")
            done.append(x + gate_2 * self._mlp(h, name))
        return tuple(done), None


class SingleLayer(_Layer):
    """One sequence with attention and MLP in parallel."""

    @nn.compact
    def __call__(self, x, modulation, turn, keys):
        """x [B, M + N, W], modulation [B, 3, W] -> x."""
        shift, scale, gate = jnp.moveaxis(modulation[:, :, None].astype(self.config.dtype), 1, 0)
        x = laid_out(x, "embed_activation")
        h = self._norm(x, shift, scale, "norm")
        y = self._attend(*self._heads(h, ""), turn, keys)
        return x + gate * (self._out(y, "") + self._mlp(h, "")), None


class Flux2(nn.Module):
    """The network. attention: a function like plain_attention."""

    config: Flux2Config
    attention: Callable = plain_attention

    @nn.compact
    def __call__(self, x, t, y: Text):
        """x [B, N, D] at levels t [B] in [0, 1], text y -> (velocity, hidden states).

        velocity: [B, N, D] float32, a linear projection of the hidden states [B, N, W] in the
        compute dtype. y: states [B, M, E], mask [B, M]; no token attends to text tokens outside the
        mask. FLUX.2's own pipeline masks none of its 512 tokens, padding included, so text for the
        pretrained network has a mask that is True everywhere. A mask that is False everywhere is
        the null caption.
        """
        c = self.config
        vector = self._time(t)
        text = dense(c.width, (None, "embed"), c.dtype, "text_in", bias=False)(y.states)
        image = dense(c.width, (None, "embed"), c.dtype, "image_in", bias=False)(x)
        turn = rotary(c, text.shape[1])
        keys = jnp.concatenate([y.mask.astype(bool), jnp.ones(x.shape[:2], bool)], 1)
        modulations = tuple(self._modulation(vector, 6, f"double_{stream}")
                            for stream in ("text", "image"))
        double = self._stack(DoubleLayer, c.double_layers, "double")
        (text, image), _ = double((text, image), modulations, turn, keys)
        hidden = joined(text, image, "embed_activation")
        single = self._stack(SingleLayer, c.single_layers, "single")
        hidden, _ = single(hidden, self._modulation(vector, 3, "single"), turn, keys)
        shift, scale = (self._modulation(vector, 1, f"final_{name}").astype(c.dtype)
                        for name in ("shift", "scale"))
        _, hidden = parted(hidden, text.shape[1], "embed_activation")
        hidden = norm(c.dtype, "norm")(hidden)
        hidden = laid_out(hidden * (1 + scale) + shift, "embed_activation")
        velocity = dense(c.dim, ("embed", None), c.dtype, "project", bias=False)(hidden)
        return velocity.astype(jnp.float32), hidden

    def _time(self, t):
        """t [B] -> silu of its embedding, [B, W] float32, from which modulations are projected."""
        width, features = self.config.width, sinusoidal(1000 * t, TIME_FEATURES)
        h = dense(width, (None, "embed"), jnp.float32, "time_in", bias=False)(features)
        out = dense(width, ("embed", "embed_out"), jnp.float32, "time_out", bias=False)
        h = out(nn.silu(h))
        return nn.with_logical_constraint(nn.silu(h), ("batch", "embed_activation"))

    def _modulation(self, vector, parts: int, name: str):
        """The modulation that the layers of a stack share, [B, parts, W] float32."""
        width = self.config.width
        project = dense(
            parts * width, ("embed", "mlp"), jnp.float32, f"{name}_modulation", bias=False)
        out = project(vector).reshape(-1, parts, width)
        return nn.with_logical_constraint(out, ("batch", None, "embed_activation"))

    def _stack(self, layer, depth: int, name: str):
        """`depth` layers of a class, scanned or unrolled."""
        c = self.config
        stack = stacked(layer, depth, c.remat, c.scan, 3, self.is_initializing())
        return stack(c, self.attention, name=name)


def build(c: ModelConfig, double_layers: int, attention) -> Flux2:
    """FLUX.2's transformer with a model's sizes. Raises UserError for sizes that it cannot have."""
    if "text" not in c.condition.shapes(1) or not double_layers or c.head_size % 8:
        raise UserError("config.model.backbone=flux2 needs config.model.condition=text, "
                        "double_layers > 0 and a multiple of 8 as head_size: found text states of "
                        f"width {c.condition.width}, {double_layers} and {c.head_size}")
    quarter = c.head_size // 4
    return Flux2(Flux2Config(
        grid=c.grid, dim=c.dim, text_width=c.condition.width, heads=c.width // c.head_size,
        head_size=c.head_size, double_layers=double_layers, single_layers=c.predictor_layers,
        mlp_ratio=c.mlp_ratio, axes=(quarter, quarter, quarter, quarter), dtype=c.dtype,
        remat=c.remat, scan=c.scan), attention)


BACKBONE = Backbone(
    lambda config, extra, attention: build(config, extra["double_layers"], attention),
    flux2_weights.read)
