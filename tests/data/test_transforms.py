"""Pixels to tokens and back."""

import jax.numpy as jnp
import numpy as np
import pytest

from ntm_jax.data.transforms import patchify, scale, unpatchify, unscale


@pytest.mark.parametrize("pixel_levels", [17, 256])
def test_every_pixel_level_returns_from_its_scaled_value(pixel_levels):
    pixels = np.arange(pixel_levels, dtype=np.uint8)
    x = scale(pixels, pixel_levels)
    assert (x.dtype, x[0], x[-1]) == (np.float32, -1, 1)
    step = 2 / (pixel_levels - 1)
    np.testing.assert_allclose(np.diff(x), step, rtol=1e-4)  # float32 at 1 against a step of 1/128
    for near in (x, jnp.asarray(x), x + 0.4 * step, x - 0.4 * step):  # rounded and clipped
        back = unscale(near, pixel_levels)
        assert back.dtype == np.uint8
        np.testing.assert_array_equal(back, pixels)
    np.testing.assert_array_equal(unscale(np.array([-9, 9]), pixel_levels), [0, pixels[-1]])


def test_patches_are_row_major_and_colours_innermost():
    image = np.arange(4 * 6 * 2).reshape(4, 6, 2)  # pixel (r, c), colour k holds 12 r + 2 c + k
    tokens = patchify(image, 2)
    assert tokens.shape == (6, 8)
    np.testing.assert_array_equal(tokens[0], [0, 1, 2, 3, 12, 13, 14, 15])
    np.testing.assert_array_equal(tokens[1], [4, 5, 6, 7, 16, 17, 18, 19])
    np.testing.assert_array_equal(tokens[3], [24, 25, 26, 27, 36, 37, 38, 39])


@pytest.mark.parametrize("module", [np, jnp])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_unpatchify_inverts_patchify(module, batch):
    image = module.asarray(
        np.random.default_rng(0).normal(size=(*batch, 6, 4, 3)).astype(np.float32)
    )
    tokens = patchify(image, 2)
    assert tokens.shape == (*batch, 6, 12)
    np.testing.assert_array_equal(unpatchify(tokens, (6, 4, 3), 2), image)
    assert isinstance(unpatchify(tokens, (6, 4, 3), 2), type(image))
