"""Pixels to tokens and back: the scale of pixel values and the cut into patches.

H, W, C image height, width and channels; N tokens, D = patch * patch * C token channels; V pixel levels. No jax is imported: grain's
worker processes run this.
"""

import numpy as np


def scale(pixels, levels: int) -> np.ndarray:
    """Integer pixels [...] in 0..V-1 -> float32 [...] in [-1, 1]: 2 v / (V - 1) - 1, exactly -1 and 1 at the ends."""
    x = np.array(pixels, np.float32)
    x *= 2  # in place: three times as fast
    x /= levels - 1
    x -= 1
    return x


def unscale(x, levels: int) -> np.ndarray:
    """The inverse of `scale`: floats [...] (numpy or jax), rounded to the nearest level and clipped -> uint8 [...] in 0..V-1."""
    return np.rint((np.asarray(x, np.float32) + 1) * (levels - 1) / 2).clip(0, levels - 1).astype(np.uint8)


def patchify(image, patch: int):
    """Image [..., H, W, C] -> tokens [..., N, D], numpy or jax, any leading axes.

    Patches are row-major over the image, and a token's channels are its pixels in row-major order, colours innermost. `patch` must
    divide H and W (`pipeline.spec` checks it).
    """
    *batch, height, width, channels = image.shape
    rows, columns = height // patch, width // patch
    cut = image.reshape(*batch, rows, patch, columns, patch, channels).swapaxes(-4, -3)
    return cut.reshape(*batch, rows * columns, patch * patch * channels)


def unpatchify(tokens, image_shape: tuple[int, int, int], patch: int):
    """The inverse of `patchify`: tokens [..., N, D] and image_shape (H, W, C) -> image [..., H, W, C]."""
    *batch, _, _ = tokens.shape
    height, width, channels = image_shape
    cut = tokens.reshape(*batch, height // patch, width // patch, patch, patch, channels).swapaxes(-4, -3)
    return cut.reshape(*batch, height, width, channels)
