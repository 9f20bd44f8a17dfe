"""What the comparison with other flows passes around: sizes, work to time, and peers."""

import dataclasses
import importlib.util
import math
import pathlib
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of a flow of transformer blocks, and of its batch."""

    images: int  # sequences in a batch
    tokens: int  # N, the square of a whole number
    width: int  # W
    head: int  # width of an attention head
    blocks: int  # invertible blocks
    layers: int  # transformer layers in each block
    patch: int = 4  # a token is a patch x patch square of RGB pixels

    @property
    def dim(self) -> int:
        """D, the numbers of a token."""
        return 3 * self.patch**2

    @property
    def side(self) -> int:
        """The side of an image in pixels."""
        return math.isqrt(self.tokens) * self.patch

    def forward_flops(self, ends: int | None = None) -> int:
        """FLOPs of the matrix products of one pass over the batch, 2 per multiply-add.

        A layer has 12 W^2 weights and attends to all N tokens. ends: numbers of all weights from
        tokens to the width and back; D W + 2 D W in each block by default.
        """
        ends = 3 * self.blocks * self.dim * self.width if ends is None else ends
        layer = 12 * self.width**2 + 2 * self.tokens * self.width
        return 2 * self.images * self.tokens * (self.blocks * self.layers * layer + ends)


@dataclasses.dataclass(frozen=True)
class Work:
    """Something to time: once() does it and returns when it is done."""

    once: Callable[[], Any]
    flops: int
    error: Callable[[], float] | None = None  # an inverse's largest |x - inverse(forward(x))|
    note: str = ""  # what a reader of its row has to know


@dataclasses.dataclass(frozen=True)
class Peer:
    """A public implementation of a flow.

    module: has train_step(Sizes) -> Work, inverse(Sizes, how) -> Work or None, and products(), a
    function that measures the FLOP/s of large matrix products in the peer's framework.
    """

    name: str  # of the checkout, in the folder of peers
    module: str
    url: str = ""  # empty for ours, which needs no checkout
    packages: tuple[str, ...] = ()
    source: str = ""  # folder of the checkout from which its modules are imported

    def path(self, folder: str) -> pathlib.Path:
        """The folder to import its modules from."""
        return pathlib.Path(folder) / self.name / self.source

    def missing(self, folder: str) -> str:
        """A line on what to clone and install; empty if all is there."""
        todo = []
        if self.url and not self.path(folder).is_dir():
            todo.append(f"git clone {self.url} {pathlib.Path(folder) / self.name}")
        absent = [name for name in self.packages if not importlib.util.find_spec(name)]
        if absent:
            todo.append(f"pip install {' '.join(absent)}")
        return f"{self.name} is missing: {' && '.join(todo)}" if todo else ""
