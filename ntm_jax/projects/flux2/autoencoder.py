"""FLUX.2's autoencoder, `flux2:FOLDER`: AutoencoderKL whose latents are packed and normalised.

A latent is [H/16, W/16, 128] of mean 0 and variance 1: the means [H/8, W/8, 32], with 2 x 2
neighbours packed into one place and normalised by the autoencoder's batch-norm statistics. Records
hold latents with patch_size 1, because a place is a token of the pretrained network: its channels
run (channel, row, column), and `transforms.patchify` by 2 would order them (row, column, channel).
Source: diffusers' Flux2KleinPipeline. H, W image height and width.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from ntm_jax.data import autoencoder_networks as networks
from ntm_jax.data.autoencoder import Autoencoder
from ntm_jax.typed import setting

PATCH = 2  # neighbours a side in a place


@dataclasses.dataclass(frozen=True)
class Sizes(networks.Sizes):
    """Its keys of config.json."""

    patch_size: tuple[int, ...] = setting(
        (PATCH, PATCH), "Neighbours in a place.", low=PATCH, high=PATCH)
    batch_norm_eps: float = setting(1e-4, "Added to the variances.", low=0)
    decoder_block_out_channels: tuple[int, ...] | None = setting(
        None, "Widths of the decoder's blocks; the encoder's by default.", low=1)

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        return self.decoder_block_out_channels or self.block_out_channels

    @property
    def scale(self) -> int:
        return PATCH * super().scale

    @property
    def channels(self) -> int:
        return PATCH**2 * self.latent_channels


class Network(networks.Network):
    """AutoencoderKLFlux2."""

    def setup(self):
        super().setup()
        self.mean, self.variance = (
            self.param(f"bn.running_{name}", nn.initializers.ones, (self.sizes.channels,))
            for name in ("mean", "var"))

    def encode(self, images):
        mean, std = self._moments()
        return (pack(super().encode(images)) - mean) / std

    def decode(self, latents):
        mean, std = self._moments()
        return super().decode(unpack(latents * std + mean))

    def _moments(self):
        """The mean and standard deviation of latents, each [1, 1, 1, C]."""
        std = jnp.sqrt(self.variance + self.sizes.batch_norm_eps)
        return self.mean[None, None, None], std[None, None, None]


def open_flux2(folder: str) -> Autoencoder:
    """The autoencoder `flux2:FOLDER`. UserError as `autoencoder_networks.read`."""
    return networks.read("flux2", folder, "AutoencoderKLFlux2", Sizes, Network)


def pack(z):
    """[n, h, w, C] -> [n, h/2, w/2, 4 C], channels in the order (channel, row, column)."""
    count, height, width, channels = z.shape
    cut = z.reshape(count, height // PATCH, PATCH, width // PATCH, PATCH, channels)
    return cut.transpose(0, 1, 3, 5, 2, 4).reshape(count, height // PATCH, width // PATCH, -1)


def unpack(latents):
    """The inverse of `pack`."""
    count, height, width, channels = latents.shape
    cut = latents.reshape(count, height, width, channels // PATCH**2, PATCH, PATCH)
    return cut.transpose(0, 1, 4, 2, 5, 3).reshape(count, PATCH * height, PATCH * width, -1)
