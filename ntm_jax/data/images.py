"""Image files to pixels: decoding and resizing.

H, W, C image height, width and channels. No jax is imported: grain's worker processes run this.
"""

import io
import warnings
from typing import cast

import numpy as np
from PIL import Image, ImageOps

# Decoding other formats, such as EPS, may start programs.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")


def decode(data: bytes, size: int = 0) -> np.ndarray:
    """The image in a file's bytes, [H, W, C] uint8; C is 1 if the file is grey, else 3.

    EXIF rotation is applied, transparent images are composited on white, 16-bit grey values are
    rounded to 8 bits, of 16-bit colours Pillow keeps the upper 8 bits, and of an animation the
    first frame is taken.

    Args:
      size: if positive, a JPEG may be decoded at a fraction of its size, with both sides still at
        least twice `size` if the original's are. 0 decodes at full size.
    Raises:
      PIL's errors if the bytes are not an image, are damaged, or hold too many pixels. ValueError
      for pixels of more than 16 bits.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        warnings.filterwarnings("ignore", "Palette images with Transparency")
        with Image.open(io.BytesIO(data), formats=_FORMATS) as file:
            if size:
                file.draft(None, (2 * size, 2 * size))
            image = ImageOps.exif_transpose(file)
    if image.mode.startswith("I"):
        low, high = cast(tuple[float, float], image.getextrema())  # of its one channel
        if low >= 0 and high < 1 << 16:
            image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    if image.mode[0] in "IF":
        raise ValueError("its pixels have more than 16 bits")
    mode = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    pixels = np.array(image.convert(mode))
    return pixels if mode == "RGB" else pixels[..., None]


def resize(image: np.ndarray, size: int, pixel_levels: int = 256) -> np.ndarray:
    """The central square of an image [H, W, C] uint8, resized to [size, size, C] with antialiasing.

    Values stay below `pixel_levels`, the number of values that a pixel of `image` can take.
    """
    height, width, channels = image.shape
    if height == width == size:
        return image
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    # Cropped first: PIL's own box lets pixels outside it bleed in.
    square = image[top : top + side, left : left + side]
    planes = (Image.fromarray(square[..., channel]) for channel in range(channels))
    small = [
        np.asarray(plane.resize((size, size), Image.Resampling.BICUBIC, reducing_gap=3.0))
        for plane in planes
    ]
    # Bicubic interpolation overshoots at edges, and PIL clips at 255, not at the last pixel level.
    return np.minimum(np.stack(small, axis=-1), np.uint8(pixel_levels - 1))
