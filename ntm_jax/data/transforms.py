"""Pixels to tokens and back: the scale of pixel values and the cut into patches.

H, W, C image height, width and channels; N tokens; D = patch * patch * C token channels; V pixel
levels. No jax is imported: grain's worker processes run this.
"""

import numpy as np


def scale(pixels, pixel_levels: int) -> np.ndarray:
    """Integer pixels v [...] in 0..V-1 -> 2 v / (V - 1) - 1, float32 [...] in [-1, 1].

    The ends are exactly -1 and 1.
    """
    x = np.array(pixels, np.float32)
    x *= 2  # in place: three times as fast
    x /= pixel_levels - 1
    x -= 1
    return x


def unscale(x, pixel_levels: int) -> np.ndarray:
    """The inverse of `scale`: floats [...] (NumPy or JAX) -> uint8 [...] in 0..V-1.

    Values are rounded to the nearest pixel level and clipped.
    """
    top = pixel_levels - 1
    return np.rint((np.asarray(x, np.float32) + 1) * top / 2).clip(0, top).astype(np.uint8)


def standardise(values, mean, std) -> np.ndarray:
    """(values - mean) / std, float32, of numbers [..., D] by column."""
    return ((np.asarray(values, np.float64) - np.array(mean)) / np.array(std)).astype(np.float32)


def unstandardise(values, mean, std) -> np.ndarray:
    """The inverse of `standardise`: values * std + mean, float64, of numbers [..., D] by column."""
    return np.asarray(values, np.float64) * np.array(std) + np.array(mean)


def patchify(image, patch: int):
    """Image [..., H, W, C] -> tokens [..., N, D], NumPy or JAX, any leading axes.

    Patches are row-major over the image, and a token's channels are its pixels in row-major order,
    colours innermost. `patch` must divide H and W (`pipeline.spec` checks it).
    """
    *batch, height, width, channels = image.shape
    rows, columns = height // patch, width // patch
    cut = image.reshape(*batch, rows, patch, columns, patch, channels).swapaxes(-4, -3)
    return cut.reshape(*batch, rows * columns, patch * patch * channels)


def unpatchify(tokens, image_shape: tuple[int, int, int], patch: int):
    """The inverse of `patchify`: tokens [..., N, D] -> image [..., H, W, C]."""
    *batch, _, _ = tokens.shape
    height, width, channels = image_shape
    cut = tokens.reshape(*batch, height // patch, width // patch, patch, patch, channels)
    return cut.swapaxes(-4, -3).reshape(*batch, height, width, channels)
