"""The source `mock:SHAPE`, random records of any shape.

`mock:16x16x32` has 10,000 latents in train and 1,000 in test, the same in every run. Options follow
the shape: `,levels=256` for pixels, `,classes=1000`, `,count=10000` and `,text=128x2048` (M x E).

H, W, C image height, width, channels; V pixel levels; M, E text tokens and width. No jax is
imported: grain's worker processes run this.
"""

import dataclasses
import re
from typing import Any

import numpy as np

from ntm_jax.data.records import pad_text
from ntm_jax.data.sources.source import Source, check_split
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
    name = f"mock:{where}"
    check_split(name, split, _SPLITS)
    given = _mock_options(where)
    (pixel_levels,), (classes,), (count,) = given["levels"], given["classes"], given["count"]
    shape, (tokens, text_width) = given["shape"], given["text"]
    count = 1000 if split == "test" else count
    return Source(
        _RandomRecords(_SPLITS.index(split), count, shape, pixel_levels, classes, given["text"]),
        shape,
        pixel_levels=pixel_levels,
        num_classes=classes,
        version="1",
        text_tokens=tokens,
        text_width=text_width,
    )


def _mock_options(where: str) -> dict[str, Any]:
    """The numbers of each option and of "shape" in the text after `mock:`."""
    number = "([1-9][0-9]{0,8})"
    syntax = {
        "shape": f"{number}x{number}x{number}",
        "levels": number,
        "classes": number,
        "count": number,
        "text": f"{number}x{number}",
    }
    given: dict[str, Any] = {"count": (10_000,), "levels": (0,), "classes": (0,), "text": (0, 0)}
    for option in f"shape={where}".split(","):
        key, _, value = option.partition("=")
        match = re.fullmatch(syntax.get(key, "(?!)"), value)
        if not match:
            wrong = option.removeprefix("shape=")
            raise UserError(
                f"data.source mock:{where} is not understood at {wrong!r}: expected HxWxC and "
                "after it any of ,levels=V ,classes=K ,count=N ,text=MxE"
            )
        given[key] = tuple(map(int, match.groups()))
    return given
