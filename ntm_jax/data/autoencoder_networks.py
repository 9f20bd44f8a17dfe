"""AutoencoderKL in JAX, read from the folders that diffusers writes.

It has the encoder and the decoder of latent diffusion (arXiv 2112.10752), as diffusers implements
them (src/diffusers/models/autoencoders). A module's name is the beginning of its tensors' names in
the file. Everything is float32, with products at full precision: a GPU or a TPU would round the
factors otherwise.

n images; H, W, C image height, width, channels; s pixels in a place, along a side.
"""

import dataclasses
import functools
import hashlib
import re
from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from ntm_jax import files, typed
from ntm_jax.data import pretrained
from ntm_jax.data.autoencoder import Autoencoder, scaled
from ntm_jax.data.records import sha256
from ntm_jax.errors import UserError, abbreviate, few, first_line
from ntm_jax.typed import setting

_PRECISION = jax.lax.Precision.HIGHEST
_WEIGHTS = "diffusion_pytorch_model"
# Earlier names of an attention's tensors.
_EARLIER = {"to_q": ("query", "q"), "to_k": ("key", "k"), "to_v": ("value", "v"),
            "to_out.0": ("proj_attn", "proj_out")}
_DOWN = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")  # the second has attention
_UP = ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")
_SHOWN = 4  # tensors named in an error


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The keys of config.json that the networks depend on; diffusers' defaults."""

    in_channels: int = setting(3, "Channels of images.", low=3, high=3)
    out_channels: int = setting(3, "Channels of decoded images.", low=3, high=3)
    latent_channels: int = setting(4, "Channels of the mean.", low=1)
    down_block_types: tuple[str, ...] = setting(_DOWN[:1], "Blocks of the encoder.", choices=_DOWN)
    up_block_types: tuple[str, ...] = setting(_UP[:1], "Blocks of the decoder.", choices=_UP)
    block_out_channels: tuple[int, ...] = setting((64,), "Widths of the blocks.", low=1)
    layers_per_block: int = setting(1, "Residual layers in a block of the encoder.", low=1)
    norm_num_groups: int = setting(32, "Groups of a norm's channels.", low=1)
    act_fn: str = setting("silu", "Activation.", choices=("silu", "swish"))
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        """Widths of the decoder's blocks, in the order of the encoder's."""
        return self.block_out_channels

    @property
    def scale(self) -> int:
        """Pixels in a place of a latent, along a side."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def channels(self) -> int:
        """Channels of latents."""
        return self.latent_channels


@dataclasses.dataclass(frozen=True)
class KLSizes(Sizes):
    """With the scale of latents, (mean - shift_factor) * scaling_factor."""

    scaling_factor: float = setting(0.18215, "Factor of latents.", above=0)
    shift_factor: float | None = None


def _conv(x, width: int, name: str, size: int = 3):
    return nn.Conv(width, (size, size), padding=size // 2, precision=_PRECISION, name=name)(x)


def _norm(x, sizes: Sizes, name: str):
    return nn.GroupNorm(
        sizes.norm_num_groups, epsilon=1e-6, use_fast_variance=False, name=name)(x)


def _residual(x, width: int, sizes: Sizes, name: str):
    """Two convolutions, added to x."""
    h = _conv(nn.silu(_norm(x, sizes, f"{name}.norm1")), width, f"{name}.conv1")
    h = _conv(nn.silu(_norm(h, sizes, f"{name}.norm2")), width, f"{name}.conv2")
    return h + (x if x.shape[-1] == width else _conv(x, width, f"{name}.conv_shortcut", 1))


def _attention(x, sizes: Sizes, name: str):
    """Attention with one head between all places, added to x."""
    width = x.shape[-1]
    dense = functools.partial(nn.Dense, width, precision=_PRECISION)
    tokens = _norm(x, sizes, f"{name}.group_norm").reshape(len(x), -1, width)
    query, key, value = (dense(name=f"{name}.{part}")(tokens) for part in ("to_q", "to_k", "to_v"))
    scores = jnp.einsum("nqc,nkc->nqk", query * width**-0.5, key, precision=_PRECISION)
    mixed = jnp.einsum("nqk,nkc->nqc", nn.softmax(scores), value, precision=_PRECISION)
    return x + dense(name=f"{name}.to_out.0")(mixed).reshape(x.shape)


def _middle(x, sizes: Sizes):
    width = x.shape[-1]
    x = _residual(x, width, sizes, "mid_block.resnets.0")
    if sizes.mid_block_add_attention:
        x = _attention(x, sizes, "mid_block.attentions.0")
    return _residual(x, width, sizes, "mid_block.resnets.1")


def _block(x, width: int, layers: int, attends: bool, sizes: Sizes, name: str):
    for layer in range(layers):
        x = _residual(x, width, sizes, f"{name}.resnets.{layer}")
        if attends:
            x = _attention(x, sizes, f"{name}.attentions.{layer}")
    return x


class Encoder(nn.Module):
    """Images [n, H, W, C] in [-1, 1] -> mean and log-variance [n, H/s, W/s, 2 latent_channels]."""

    sizes: Sizes

    @nn.compact
    def __call__(self, x):
        sizes, widths = self.sizes, self.sizes.block_out_channels
        x = _conv(x, widths[0], "conv_in")
        for i, (width, kind) in enumerate(zip(widths, sizes.down_block_types, strict=True)):
            name = f"down_blocks.{i}"
            x = _block(x, width, sizes.layers_per_block, kind == _DOWN[1], sizes, name)
            if i + 1 < len(widths):  # padded at the end alone
                x = nn.Conv(width, (3, 3), 2, ((0, 1), (0, 1)), precision=_PRECISION,
                            name=f"{name}.downsamplers.0.conv")(x)
        x = nn.silu(_norm(_middle(x, sizes), sizes, "conv_norm_out"))
        return _conv(x, 2 * sizes.latent_channels, "conv_out")


class Decoder(nn.Module):
    """Means [n, h, w, latent_channels] -> images [n, s h, s w, C], about -1 to 1."""

    sizes: Sizes

    @nn.compact
    def __call__(self, z):
        sizes = self.sizes
        widths = sizes.decoder_widths[::-1]
        x = _middle(_conv(z, widths[0], "conv_in"), sizes)
        for i, (width, kind) in enumerate(zip(widths, sizes.up_block_types, strict=True)):
            name = f"up_blocks.{i}"
            x = _block(x, width, sizes.layers_per_block + 1, kind == _UP[1], sizes, name)
            if i + 1 < len(widths):
                x = x.repeat(2, 1).repeat(2, 2)
                x = _conv(x, width, f"{name}.upsamplers.0.conv")
        return _conv(nn.silu(_norm(x, sizes, "conv_norm_out")), sizes.out_channels, "conv_out")


class Network(nn.Module):
    """Both networks, with the linear maps next to the mean."""

    sizes: Any

    def setup(self):
        sizes = self.sizes
        self.encoder, self.decoder = Encoder(sizes), Decoder(sizes)
        one = functools.partial(nn.Conv, kernel_size=(1, 1), precision=_PRECISION)
        if sizes.use_quant_conv:
            self.quant_conv = one(2 * sizes.latent_channels)
        if sizes.use_post_quant_conv:
            self.post_quant_conv = one(sizes.latent_channels)

    def encode(self, images):
        """Images [n, H, W, 3], uint8 or in [-1, 1] -> means [n, H/s, W/s, latent_channels]."""
        moments = self.encoder(scaled(images))
        if self.sizes.use_quant_conv:
            moments = self.quant_conv(moments)
        return moments[..., : self.sizes.latent_channels]

    def decode(self, latents):
        """Means [n, h, w, latent_channels] -> images [n, s h, s w, 3]."""
        return self.decoder(
            self.post_quant_conv(latents) if self.sizes.use_post_quant_conv else latents)

    def __call__(self, images):
        return self.decode(self.encode(images))


class KL(Network):
    """AutoencoderKL, whose latents are the scaled means."""

    def encode(self, images):
        sizes = self.sizes
        return (super().encode(images) - (sizes.shift_factor or 0)) * sizes.scaling_factor

    def decode(self, latents):
        sizes = self.sizes
        return super().decode(latents / sizes.scaling_factor + (sizes.shift_factor or 0))


def open_kl(folder: str) -> Autoencoder:
    """The autoencoder `kl:FOLDER`. UserError as `read`."""
    return read("kl", folder, "AutoencoderKL", KLSizes, KL)


def read(name: str, folder: str, kind: str, sizes_class, network_class) -> Autoencoder:
    """The autoencoder `name:folder`, of diffusers' class `kind`, from safetensors.

    Raises UserError if there is none, or its files are of another class, have blocks that are not
    known here, or lack tensors, have others, or some of another shape.
    """
    path = pretrained.find(folder, "vae")
    sizes = _read_sizes(path / "config.json", kind, sizes_class)
    network, parts = network_class(sizes), _parts(path)
    image = jnp.zeros((1, sizes.scale, sizes.scale, sizes.in_channels))
    try:
        shapes = jax.eval_shape(network.init, jax.random.key(0), image)
    except ValueError as error:  # widths that do not go together
        raise UserError(f"{path}/config.json describes no autoencoder ({first_line(error)}): fetch "
                        "it again") from None
    params = _read_params(path, _read_tensors(parts), shapes)
    digest = hashlib.sha256(b"".join(bytes.fromhex(sha256(part)) for part in parts)).hexdigest()
    encode, decode = (functools.partial(network.apply, method=m) for m in ("encode", "decode"))
    return Autoencoder(
        f"{name}:{folder}", sizes.scale, sizes.channels, params, encode, decode, digest)


def _read_sizes(path: Path, kind: str, sizes_class) -> Any:
    if not path.exists():
        raise UserError(f"{path} is missing: give a folder in diffusers' layout, with vae/ or an "
                        f"autoencoder's config.json and {_WEIGHTS}.safetensors")
    values = files.read_json(path, "fetch it again")
    found = values.get("_class_name", kind)
    if found != kind:
        raise UserError(f"{path} is of a {abbreviate(found, str)}, expected {kind}: open it by the "
                        "name of its kind, such as kl:FOLDER or flux2:FOLDER")
    names = {field.name for field in dataclasses.fields(sizes_class)}
    return typed.parse_dataclass(
        sizes_class, {key: values[key] for key in values if key in names}, str(path))


def _parts(folder: Path) -> list[Path]:
    """The files of the weights in float32, or as they are where there is but one form."""
    whole = folder / f"{_WEIGHTS}.safetensors"
    parts = [whole] if whole.exists() else sorted(folder.glob(f"{_WEIGHTS}-*-of-*.safetensors"))
    if not parts:
        raise UserError(f"{folder} has no {_WEIGHTS}.safetensors, whole or in parts: fetch it; "
                        "pickled files are not opened")
    return parts


def _read_tensors(parts: list[Path]) -> dict[str, np.ndarray]:
    tensors = {}
    for part in parts:
        try:
            with safetensors.safe_open(files.regular(part), "np") as file:
                tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(f"{part} is not a complete safetensors file ({first_line(error)}): "
                            "fetch it again") from None
    return tensors


def _read_params(path: Path, tensors: dict[str, np.ndarray], shapes: dict) -> dict:
    """The parameters of these shapes, float32, from tensors in torch's layout."""
    found, missing, wrong = {}, [], []
    flat: dict[tuple, Any] = flax.traverse_util.flatten_dict(shapes)
    for place, leaf in flat.items():
        name = re.sub(r"\.(kernel|scale)$", ".weight", ".".join(place[1:]))
        tensor = next((tensors.pop(n) for n in _names(name) if n in tensors), None)
        if tensor is None:
            missing.append(name)
            continue
        if len(leaf.shape) == 2 and tensor.shape[2:] == (1, 1):  # an attention's, as a convolution
            tensor = tensor[:, :, 0, 0]
        expected = *leaf.shape[:-3:-1], *leaf.shape[:-2]  # [out, in, ...] of ours, [..., in, out]
        if tensor.shape != expected:
            wrong.append(f"{name} is {list(tensor.shape)}, expected {list(expected)}")
        axes = range(tensor.ndim)
        found[place] = np.ascontiguousarray(tensor.transpose(*axes[2:], *axes[1::-1]), np.float32)
    surplus = [name for name in tensors if not name.endswith("num_batches_tracked")]
    faults = [f"{what} {few(names, _SHOWN)}" for what, names in
              (("missing", missing), ("left over", surplus), ("wrong", wrong)) if names]
    if faults:
        raise UserError(f"the tensors of {path} are not those of its config.json: "
                        f"{'; '.join(faults)}: fetch both again")
    return flax.traverse_util.unflatten_dict(found)


def _names(name: str) -> list[str]:
    """The names that a tensor may have, the present one first."""
    return [name, *(name.replace(f".{part}.", f".{earlier}.") for part, others in _EARLIER.items()
                    if f".{part}." in name for earlier in others)]
