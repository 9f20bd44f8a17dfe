"""FLUX.2's transformer, whose public weights (klein 4B: the default sizes) flux2_weights.py reads: a flow-matching backbone.

A backbone is (tokens, t, condition) -> (velocity, last hidden states), for x_t = (1-t) x + t eps and v = eps - x (method, section 7).
Text and image are two streams that meet in the attention of the double layers, then one sequence, text in front, in the single layers.
Source: black-forest-labs/flux2, src/flux2/model.py, and diffusers' Flux2Transformer2DModel, without the guidance embedding.

Symbols: B batch, N image tokens, D their channels, M text tokens, E their width, W = H C width, H heads, C head size.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from ntm_jax.core import layers
from ntm_jax.core.config import ModelConfig
from ntm_jax.errors import UserError

TIME_FEATURES = 256  # t is told as cosines and sines of 1000 t


@dataclasses.dataclass(frozen=True)
class Flux2Config:
    """Sizes and choices of the network. Static: a change compiles anew."""

    grid: tuple[int, int]  # image tokens by row and column
    dim: int = 128  # D
    text_width: int = 7680  # E
    heads: int = 24
    head_size: int = 128
    double_layers: int = 5
    single_layers: int = 20
    mlp_ratio: int = 3
    theta: int = 2000  # the lowest rotary frequency is almost 1/theta
    axes: tuple[int, int, int, int] = (32, 32, 32, 32)  # channels of a head that turn with a token's time, row, column, place in the text
    dtype: Any = jnp.bfloat16
    remat: str = "none"  # none, full, narrow, dots: see layers.REMAT
    scan: bool = True

    def __post_init__(self):
        if self.remat not in layers.REMAT:
            raise ValueError(f"remat is {self.remat!r}: expected one of {', '.join(layers.REMAT)}")
        if sum(self.axes) != self.head_size or any(size % 2 for size in self.axes):
            raise ValueError(f"axes {self.axes} must be even and sum to head_size = {self.head_size}")

    @property
    def width(self) -> int:
        return self.heads * self.head_size


def rotary(config: Flux2Config, text_tokens: int):
    """Cosines and sines, [M + N, C/2] float32 each, of the angles of text tokens (0, 0, 0, i) and image tokens (0, row, column, 0).

    In NumPy: float32 angles of hundreds of radians would be off by 1e-5.
    """
    places = np.zeros((text_tokens + config.grid[0] * config.grid[1], 4))
    places[:text_tokens, 3] = np.arange(text_tokens)
    places[text_tokens:, 1], places[text_tokens:, 2] = (axis.ravel() for axis in np.indices(config.grid))
    angles = [places[:, i, None] * float(config.theta) ** (-np.arange(0, size, 2) / size) for i, size in enumerate(config.axes)]
    angles = np.concatenate(angles, 1)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotate(x, turn):
    """x [B, S, H, C] turned by (cos, sin) [S, C/2]: channels 2i and 2i+1 are a pair, unlike those of layers.rotate."""
    cos, sin = (a[None, :, None] for a in turn)
    first, second = jnp.moveaxis(x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2), -1, 0)
    return jnp.stack([first * cos - second * sin, second * cos + first * sin], -1).reshape(x.shape).astype(x.dtype)


# Left to itself, XLA's partitioner joins and parts tokens, and spreads modulations, over several mesh axes and gets them wrong, velocities
# off by 0.02 to 1 on 2 x 2 x 2 devices: the three are laid out by name wherever they are made.


def laid_out(x, *axes):
    """x [B, S, ...] by examples, tokens and the logical axes of the rest."""
    return nn.with_logical_constraint(x, ("batch", "tokens", *axes))


def joined(text, image, *axes):
    """Text in front of image tokens, [B, M + N, ...]."""
    return laid_out(jnp.concatenate([text, image], 1), *axes)


def parted(x, text_tokens: int, *axes):
    """The inverse of `joined`."""
    return tuple(laid_out(part, *axes) for part in jnp.split(x, [text_tokens], 1))


class _Layer(nn.Module):
    """What both kinds of layer are made of; `stream` begins the names of a stream's parameters, and is empty where there is one stream."""

    config: Flux2Config
    attention: Callable

    def _norm(self, x, shift, scale, name: str):
        return layers.norm(self.config.dtype, name)(x) * (1 + scale) + shift

    def _heads(self, x, stream: str):
        """x [B, S, W] -> queries, keys and values [B, S, H, C], queries and keys normalised by head."""
        c = self.config
        q, k, v = (
            checkpoint_name(layers.dense(c.width, ("embed", "heads"), c.dtype, f"{stream}{name}", bias=False)(x), "narrow")
            .reshape(*x.shape[:-1], c.heads, c.head_size) for name in ("query", "key", "value"))
        ones = nn.with_logical_partitioning(nn.initializers.ones, (None,))
        q, k = (nn.RMSNorm(dtype=c.dtype, scale_init=ones, name=f"{stream}{name}_norm")(a) for name, a in (("query", q), ("key", k)))
        return q, k, v

    def _attend(self, q, k, v, turn, keys):
        """-> [B, S, W], before the output projection."""
        q, k = rotate(q, turn), rotate(k, turn)
        q = laid_out(q, "heads", None)
        k, v = (nn.with_logical_constraint(a, ("batch", "keys", "heads", None)) for a in (k, v))
        y = self.attention(q, k, v, causal=False, keys=keys)
        return checkpoint_name(y.reshape(*y.shape[:2], -1), "narrow")

    def _out(self, y, stream: str):
        return checkpoint_name(
            layers.dense(self.config.width, ("heads", "embed"), self.config.dtype, f"{stream}out", bias=False)(y), "narrow")

    def _mlp(self, x, stream: str):
        c = self.config
        gate, up = (layers.dense(c.mlp_ratio * c.width, ("embed", "mlp"), c.dtype, f"{stream}{name}", bias=False)(x)
                    for name in ("mlp_gate", "mlp_up"))
        h = laid_out(nn.silu(gate) * up, "mlp")
        return checkpoint_name(layers.dense(c.width, ("mlp", "embed"), c.dtype, f"{stream}mlp_down", bias=False)(h), "narrow")


class DoubleLayer(_Layer):
    """Text and image with weights of their own, attending to each other."""

    @nn.compact
    def __call__(self, streams, modulations, turn, keys):
        """streams (text [B, M, W], image [B, N, W]), modulations [B, 6, W] of each -> streams: the form that nn.scan takes."""
        names = ("text_", "image_")
        streams = [laid_out(x, "embed_activation") for x in streams]
        parts = [jnp.moveaxis(m[:, :, None].astype(self.config.dtype), 1, 0) for m in modulations]
        heads = [self._heads(self._norm(x, shift, scale, f"{name}norm_1"), name)
                 for name, x, (shift, scale, *_) in zip(names, streams, parts, strict=True)]
        seen = self._attend(*(joined(*both, "heads", None) for both in zip(*heads, strict=True)), turn, keys)
        done = []
        for name, x, y, (_, _, gate_1, shift_2, scale_2, gate_2) in zip(
                names, streams, parted(seen, streams[0].shape[1], "heads"), parts, strict=True):
            x = x + gate_1 * self._out(y, name)
            done.append(x + gate_2 * self._mlp(self._norm(x, shift_2, scale_2, f"{name}norm_2"), name))
        return tuple(done), None


class SingleLayer(_Layer):
    """One sequence, whose attention and MLP stand side by side."""

    @nn.compact
    def __call__(self, x, modulation, turn, keys):
        """x [B, M + N, W], modulation [B, 3, W] -> x."""
        shift, scale, gate = jnp.moveaxis(modulation[:, :, None].astype(self.config.dtype), 1, 0)
        x = laid_out(x, "embed_activation")
        h = self._norm(x, shift, scale, "norm")
        y = self._attend(*self._heads(h, ""), turn, keys)
        return x + gate * (self._out(y, "") + self._mlp(h, "")), None


class Flux2(nn.Module):
    """The network. attention: called as layers.plain_attention is."""

    config: Flux2Config
    attention: Callable = layers.plain_attention

    @nn.compact
    def __call__(self, x, t, y: layers.Text):
        """x [B, N, D] at levels t [B] in [0, 1], y Text (states [B, M, E], mask [B, M]).

        -> (velocity [B, N, D] float32, hidden [B, N, W] in the compute dtype, whose linear projection the velocity is).

        No token sees a text token where the mask is False. Its own pipeline masks none: it shows the network all 512 places, those of
        padding too, so the pretrained network's text has a mask that is True throughout. One that is False throughout is no text at all.
        """
        c = self.config
        vector = self._time(t)
        text = layers.dense(c.width, (None, "embed"), c.dtype, "text_in", bias=False)(y.states)
        image = layers.dense(c.width, (None, "embed"), c.dtype, "image_in", bias=False)(x)
        turn = rotary(c, text.shape[1])
        keys = jnp.concatenate([y.mask.astype(bool), jnp.ones(x.shape[:2], bool)], 1)
        modulations = tuple(self._modulation(vector, 6, f"double_{stream}") for stream in ("text", "image"))
        (text, image), _ = self._stack(DoubleLayer, c.double_layers, "double")((text, image), modulations, turn, keys)
        hidden = joined(text, image, "embed_activation")
        hidden, _ = self._stack(SingleLayer, c.single_layers, "single")(hidden, self._modulation(vector, 3, "single"), turn, keys)
        shift, scale = (self._modulation(vector, 1, f"final_{name}").astype(c.dtype) for name in ("shift", "scale"))
        hidden = layers.norm(c.dtype, "norm")(parted(hidden, text.shape[1], "embed_activation")[1])
        hidden = laid_out(hidden * (1 + scale) + shift, "embed_activation")
        velocity = layers.dense(c.dim, ("embed", None), c.dtype, "project", bias=False)(hidden)
        return velocity.astype(jnp.float32), hidden

    def _time(self, t):
        """t [B] -> silu of its embedding, [B, W] float32: what every modulation is a projection of."""
        width = self.config.width
        h = layers.dense(width, (None, "embed"), jnp.float32, "time_in", bias=False)(layers.sinusoidal(1000 * t, TIME_FEATURES))
        h = layers.dense(width, ("embed", "embed_out"), jnp.float32, "time_out", bias=False)(nn.silu(h))
        return nn.with_logical_constraint(nn.silu(h), ("batch", "embed_activation"))

    def _modulation(self, vector, parts: int, name: str):
        """-> [B, parts, W] float32; the layers of a stack share it."""
        width = self.config.width
        out = layers.dense(parts * width, ("embed", "mlp"), jnp.float32, f"{name}_modulation", bias=False)(vector)
        return nn.with_logical_constraint(out.reshape(-1, parts, width), ("batch", None, "embed_activation"))

    def _stack(self, layer, depth: int, name: str):
        """`depth` layers, parameters stacked along a leading axis whether scanned or unrolled."""
        c = self.config
        layer = layer if layers.REMAT[c.remat] is None else nn.remat(layer, prevent_cse=False, policy=layers.REMAT[c.remat])
        return nn.scan(
            layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=depth, unroll=1 if c.scan else depth,
            in_axes=(nn.broadcast,) * 3, metadata_params={nn.PARTITION_NAME: "layers"})(c, self.attention, name=name)


def build(c: ModelConfig, double_layers: int, attention) -> Flux2:
    """FLUX.2's transformer with a model's sizes. Raises UserError for sizes that it cannot have."""
    if not c.text_width or not double_layers or c.head_size % 8:
        raise UserError("config.model.backbone=flux2 needs config.model.condition=text, double_layers "
                        "> 0 and a multiple of 8 as head_size: found text states of width "
                        f"{c.text_width}, {double_layers} and {c.head_size}")
    return Flux2(Flux2Config(
        grid=c.grid, dim=c.dim, text_width=c.text_width, heads=c.width // c.head_size,
        head_size=c.head_size, double_layers=double_layers, single_layers=c.predictor_layers,
        mlp_ratio=c.mlp_ratio, axes=(c.head_size // 4,) * 4, dtype=c.dtype, remat=c.remat,
        scan=c.scan), attention)
