"""The source `mock:SHAPE`, random records of any shape.

`mock:16x16x32` has 10,000 latents in train and 1,000 in test, the same in every run. Options follow
the shape: `,levels=256` for pixels, `,classes=1000`, `,count=10000` and `,text=128x2048` (M x E).

H, W, C image height, width, channels; V pixel levels; M, E text tokens and width. No jax is
imported: grain's worker processes run this.
"""

import functools
from typing import Any

import numpy as np

from ntm_jax.data.sources.source import Lazy, Source, check_split
from ntm_jax.data.text import pad_text
from ntm_jax.errors import UserError

_SPLITS = ("train", "test")


def _record(stream: int, shape: tuple[int, int, int], pixel_levels: int, classes: int,
            tokens: int, width: int, index: int) -> dict[str, Any]:
    """A random record. The same stream and index give the same."""
    random = np.random.default_rng((stream, index))
    if pixel_levels:
        image = random.integers(pixel_levels, size=shape, dtype=np.uint8)
    else:
        image = random.standard_normal(shape, np.float32)
    record = {"image": image, "label": int(random.integers(classes)) if classes else -1}
    if not tokens:
        return record
    # Random signs and mantissas, of magnitude 0.5 to 1: normal numbers would take ten times as
    # long.
    size = (random.integers(1, tokens + 1), width)
    bits = random.integers(1 << 16, size=size, dtype=np.uint16) & 0x83FF | 0x3800
    return record | pad_text(bits.view(np.float16), tokens)


def open_mock(where: str, split: str) -> Source:
    """Opens a split of the random records that `where`, HxWxC with options, describes."""
    check_split(f"mock:{where}", split, _SPLITS)
    size, *options = where.split(",")
    given = {"levels": "0", "classes": "0", "count": "10000", "text": "0x0"}
    try:
        height, width, channels = map(int, size.split("x"))
        for option in options:
            key, value = option.split("=")
            given |= {key: value}
        text = given.pop("text")
        levels, classes, count = map(int, given.values())  # too many if a key is unknown
        tokens, text_width = map(int, text.split("x"))
    except ValueError:
        raise UserError(
            f"data.source mock:{where} is not understood: expected HxWxC and after it any of "
            ",levels=V ,classes=K ,count=N ,text=MxE"
        ) from None
    shape = height, width, channels
    make = functools.partial(
        _record, _SPLITS.index(split), shape, levels, classes, tokens, text_width)
    return Source(
        Lazy(make, range(1000 if split == "test" else count)),
        shape,
        pixel_levels=levels,
        num_classes=classes,
        version="1",
        text_tokens=tokens,
        text_width=text_width,
    )
