"""The source `mock:SHAPE`, random records of any shape.

`mock:16x16x32` has 10,000 latents in train and 1,000 in test, the same in every run. Options follow
the shape: `,levels=256` for pixels, `,classes=1000`, `,count=10000` and `,text=128x2048` (M x E).

H, W, C image height, width, channels; V pixel levels; M, E text tokens and width. No jax is
imported: grain's worker processes run this.
"""

import dataclasses
from typing import Any

import numpy as np

from ntm_jax.data.sources.source import Source, check_split
from ntm_jax.data.text import pad_text
from ntm_jax.errors import UserError

_SPLITS = ("train", "test")


@dataclasses.dataclass(frozen=True)
class _RandomRecords:
    """Random records, each a function of `stream` and its index alone."""

    stream: int
    count: int
    shape: tuple[int, int, int]
    pixel_levels: int
    classes: int
    text: tuple[int, int]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        random = np.random.default_rng((self.stream, index))
        if self.pixel_levels:
            image = random.integers(self.pixel_levels, size=self.shape, dtype=np.uint8)
        else:
            image = random.standard_normal(self.shape, np.float32)
        label = int(random.integers(self.classes)) if self.classes else -1
        record = {"image": image, "label": label}
        tokens, width = self.text
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
        levels, classes, count, text = given.values()  # too many if a key is unknown
        tokens, text_width = map(int, text.split("x"))
        shape = (height, width, channels)
        records = _RandomRecords(
            _SPLITS.index(split), 1000 if split == "test" else int(count), shape, int(levels),
            int(classes), (tokens, text_width)
        )
    except ValueError:
        raise UserError(
            f"data.source mock:{where} is not understood: expected HxWxC and after it any of "
            ",levels=V ,classes=K ,count=N ,text=MxE"
        ) from None
    return Source(
        records,
        shape,
        pixel_levels=records.pixel_levels,
        num_classes=records.classes,
        version="1",
        text_tokens=tokens,
        text_width=text_width,
    )
