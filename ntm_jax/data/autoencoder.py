"""Images to latents and back, by autoencoders opened by name.

- `kl:FOLDER`: diffusers' AutoencoderKL, such as Stable Diffusion's or FLUX.1's, in JAX.
- `flux2:FOLDER`: FLUX.2's autoencoder, in JAX.

FOLDER is local and in diffusers' layout: it holds vae/, or config.json and
diffusion_pytorch_model.safetensors itself. n images; H, W image height and width; h, w, C latent
height, width, channels.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from ntm_jax.errors import UserError
from ntm_jax.registry import Registry

AUTOENCODERS: Registry[Callable[[str], "Autoencoder"]] = Registry("the autoencoder", {
    "kl:FOLDER": "ntm_jax.data.autoencoder_networks:open_kl",
    "flux2:FOLDER": "ntm_jax.projects.flux2.autoencoder:open_flux2"})


@dataclasses.dataclass(frozen=True, eq=False)
class Autoencoder:
    """An autoencoder; each is itself alone, so that compiled functions can be kept by it.

    name: what errors call it; as a rule the name that opens it.
    scale: pixels in a place of a latent, along a side.
    channels: C of latents.
    params: its parameters, a tree of float32 arrays.
    encode: encode(params, images [n, H, W, 3] uint8, or floats in [-1, 1]) -> latents [n, h, w, C]
      float32, h = H / scale, w = W / scale; a pure function that jax.jit compiles.
    decode: decode(params, latents) -> images [n, H, W, 3] float32, about -1 to 1; likewise.
    digest: SHA-256 of its files, '' without.
    """

    name: str
    scale: int
    channels: int
    params: Any
    encode: Callable[[Any, Any], Any]
    decode: Callable[[Any, Any], Any]
    digest: str = ""

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(h, w, C) of an image. UserError for sides that are not multiples of `scale`."""
        if height % self.scale or width % self.scale:
            raise UserError(f"images of {height}x{width} pixels cannot be encoded by {self.name}: "
                            f"expected multiples of {self.scale}; choose another --image_size")
        return height // self.scale, width // self.scale, self.channels


def scaled(images):
    """Images uint8 -> float32 in [-1, 1]; floats, which are taken to be so, stay. NumPy or JAX."""
    floats = images.astype(np.float32)
    return floats * 2 / 255 - 1 if images.dtype == np.uint8 else floats


def register(name: str, open_function: Callable[[str], Autoencoder]) -> None:
    """Registers an autoencoder, which `sample.autoencoder=name` or `name:ARGUMENT` opens.

    The programs register it with --import=MODULE, the module that calls this function.

    Args:
      open_function: open_function(argument) -> Autoencoder. `argument` is the text after the colon,
        '' without one. It is called once for each name and argument.
    Raises:
      UserError: the name is registered already.
    """
    AUTOENCODERS.register(name, open_function, "[:ARGUMENT]")


@functools.cache
def open_autoencoder(name: str) -> Autoencoder:
    """The autoencoder `name`, opened once. UserError if it is unknown, or its files do not fit."""
    open_function, argument = AUTOENCODERS.find(name)
    return open_function(argument)
