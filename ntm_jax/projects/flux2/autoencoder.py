"""Images to FLUX.2's latents and back, with diffusers' AutoencoderKLFlux2 in PyTorch.

A latent is [H/16, W/16, 128] float32 of mean 0 and variance 1: the autoencoder's [H/8, W/8, 32],
with 2 x 2 neighbours packed into one place and normalised by the autoencoder's batch-norm
statistics. Records hold latents with patch_size 1, because a place is a token of the pretrained
network: its channels run (channel, row, column), and `transforms.patchify` by 2 would order them
(row, column, channel). Source: diffusers' Flux2KleinPipeline. H, W image height and width.
"""

import numpy as np

from ntm_jax.data import pretrained, transforms
from ntm_jax.errors import UserError

_PIXEL_LEVELS = 256  # of the images
PATCH = 2  # neighbours a side in a place


def pack(z: np.ndarray) -> np.ndarray:
    """[n, C, h, w] -> [n, h/2, w/2, 4 C], channels in the order (channel, row, column)."""
    count, channels, height, width = z.shape
    cut = z.reshape(count, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return cut.transpose(0, 2, 4, 1, 3, 5).reshape(count, height // PATCH, width // PATCH, -1)


def unpack(latents: np.ndarray) -> np.ndarray:
    """The inverse of `pack`."""
    count, height, width, channels = latents.shape
    cut = latents.reshape(count, height, width, channels // PATCH**2, PATCH, PATCH)
    planes = cut.transpose(0, 3, 1, 4, 2, 5)
    return planes.reshape(count, channels // PATCH**2, PATCH * height, PATCH * width)


class Autoencoder:
    """FLUX.2's autoencoder in float32.

    Args:
      path: a local folder in diffusers' layout, which holds vae/ or is that folder itself.
      device: torch's name of a device.
    Raises:
      UserError: as `pretrained.load`.
    """

    def __init__(self, path: str, device: str = "cpu"):
        self._torch, self._device = pretrained.module("torch"), device
        self._model = pretrained.load("diffusers", "AutoencoderKLFlux2", path, "vae").to(device)
        statistics, config = self._model.bn, self._model.config
        self._mean = statistics.running_mean.cpu().numpy()
        variance = statistics.running_var.cpu().numpy()
        self._std = np.sqrt(variance + np.float32(config.batch_norm_eps))
        # Pixels in a place, along a side: 16.
        self.scale = PATCH * 2 ** (len(config.block_out_channels) - 1)

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Images [n, H, W, 3] uint8 -> the means of their latents [n, H/16, W/16, 128] float32.

        Raises UserError for sides that are not multiples of 16.
        """
        height, width = images.shape[1:3]
        if height % self.scale or width % self.scale:
            raise UserError(
                f"images of {height}x{width} pixels cannot be encoded: expected multiples of "
                f"{self.scale}"
            )
        x = transforms.scale(images, _PIXEL_LEVELS).transpose(0, 3, 1, 2)
        with self._torch.inference_mode():
            z = self._model.encode(self._tensor(x)).latent_dist.mode().cpu().numpy()
        return (pack(z) - self._mean) / self._std

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Latents [n, h, w, 128] -> images [n, 16 h, 16 w, 3] uint8."""
        z = unpack(latents * self._std + self._mean)
        with self._torch.inference_mode():
            x = self._model.decode(self._tensor(z)).sample.cpu().numpy()
        return transforms.unscale(x.transpose(0, 2, 3, 1), _PIXEL_LEVELS)

    def _tensor(self, array: np.ndarray):
        return self._torch.from_numpy(np.ascontiguousarray(array, np.float32)).to(self._device)
