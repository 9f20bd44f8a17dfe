"""What the peers in PyTorch share: an AdamW step, a batch, and the product rate.

PyTorch is no dependency of this package: its types are unknown here.
"""

import importlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.peers.work import Sizes, Work

MATRICES = (512, 1024, 2048)  # sizes tried for the highest rate
SECONDS = 0.1  # of products in a measurement


def torch() -> Any:
    """The module torch."""
    return importlib.import_module("torch")


def images(sizes: Sizes):
    """Standard normal numbers [images, 3, side, side]."""
    shape = (sizes.images, 3, sizes.side, sizes.side)
    return torch().from_numpy(np.random.default_rng(0).normal(size=shape).astype("float32"))


def adamw(model, loss: Callable, count: int) -> Work:
    """AdamW steps on loss(). count: their FLOPs."""
    optimizer = torch().optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=1e-4)

    def once():
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return Work(once, count)


def inverting(model, sizes: Sizes, note: str = "", **options) -> Work:
    """model.reverse(z, **options) of a batch's z, with random last projections [2 D, W].

    These are zero in a new model; their outputs get size 0.3 for normalised inputs.
    """
    for block in model.blocks:
        weight = block.proj_out.weight.data
        weight.normal_(std=0.3 / weight.shape[1] ** 0.5)
    x = images(sizes)
    with torch().no_grad():
        z = model(x)[0]

    def once():
        with torch().no_grad():
            return model.reverse(z.clone(), **options)  # it writes to its argument

    return Work(once, sizes.forward_flops(), lambda: float((once() - x).abs().max()), note)


def products() -> Callable[[], float]:
    """A function that measures the FLOP/s of large float32 products, the best of several sizes."""
    module = torch()

    def rate(a, b) -> float:
        count, start = 0, time.perf_counter()
        while (taken := time.perf_counter() - start) < SECONDS:
            a.mm(b)
            count += 1
        return 2 * len(a) ** 3 * count / taken

    found = [tuple(module.randn(2, size, size)) for size in MATRICES]
    best = max(found, key=lambda pair: max(rate(*pair) for _ in range(2)))
    return lambda: max(rate(*best) for _ in range(2))
