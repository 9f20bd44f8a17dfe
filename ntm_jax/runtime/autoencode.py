"""Runs an autoencoder on all devices of a mesh, split over examples.

Every call of one size runs one program: the last examples are padded. n images; H, W image height
and width; h, w, C latent height, width, channels.
"""

import functools
from typing import Any

import jax
import numpy as np

from ntm_jax.data import transforms
from ntm_jax.data.autoencoder import Autoencoder
from ntm_jax.runtime import sharding

IMAGES = 4  # decoded at a time on each device


def encode(autoencoder: Autoencoder, images: np.ndarray, mesh, batch: int) -> np.ndarray:
    """Images [n, H, W, 3] uint8 -> latents [n, h, w, C] float32, `batch` at a time in all.

    mesh: its processes give the same images. Raises UserError like Autoencoder.latent_shape.
    """
    autoencoder.latent_shape(*images.shape[1:3])
    return _in_batches(autoencoder, autoencoder.encode, images, mesh, batch)


def decode(autoencoder: Autoencoder, latents: np.ndarray, mesh) -> np.ndarray:
    """Latents [n, h, w, C] -> images [n, H, W, 3] uint8.

    mesh: its processes give the same latents, and all get the images.
    """
    images = _in_batches(autoencoder, autoencoder.decode, latents, mesh, IMAGES * mesh.size)
    return transforms.unscale(images, 256)


def _in_batches(autoencoder: Autoencoder, function, values: np.ndarray, mesh,
                batch: int) -> np.ndarray:
    """function(params, values) [n, ...], at least `batch` values at a time, in equal shards."""
    flat, params = _flat(mesh), _placed(autoencoder, mesh)
    size, compiled = -(-batch // flat.size) * flat.size, _compiled(function)
    parts = [sharding.to_host(compiled(params, sharding.place(values[index], flat)))
             for index in sharding.equal_batches(len(values), size)]
    return np.concatenate(parts)[: len(values)]


_compiled = functools.lru_cache(maxsize=4)(jax.jit)


@functools.lru_cache(maxsize=1)
def _placed(autoencoder: Autoencoder, mesh) -> Any:
    """The parameters on each device of the mesh."""
    everywhere = sharding.replicated(_flat(mesh))
    return jax.tree.map(
        lambda a: jax.make_array_from_callback(np.shape(a), everywhere, lambda i: np.asarray(a)[i]),
        autoencoder.params)


def _flat(mesh):
    """The mesh with all its devices along its first axis."""
    devices = mesh.devices.reshape(-1, *[1] * (len(mesh.axis_names) - 1))
    return jax.sharding.Mesh(devices, mesh.axis_names, axis_types=mesh.axis_types)


def abstract(autoencoder: Autoencoder, mesh, shape: tuple[int, ...]) -> tuple:
    """(the jitted decoder, abstract parameters, abstract latents of this shape) of `decode`."""
    flat = _flat(mesh)
    params = jax.tree.map(lambda a: jax.ShapeDtypeStruct(
        a.shape, a.dtype, sharding=sharding.replicated(flat)), autoencoder.params)
    latents = jax.ShapeDtypeStruct(shape, np.float32, sharding=sharding.batch_sharding(flat))
    return _compiled(autoencoder.decode), params, latents
