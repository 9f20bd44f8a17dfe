"""Floating-point operations: those of a function, counted from its jaxpr, and those that this machine does in a second at most."""

import functools
import math
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

MATRICES = (512, 1024, 2048, 4096)  # sizes tried for the limit


def count(function, *args) -> int:
    """Operations of all matrix products that function(*args) does, 2 for a multiply-add, recomputation under remat included.

    args may be abstract. A `while` loop's body counts once (its trips are not known); of a `cond` the dearest branch counts; a Pallas
    kernel counts its body at every point of its grid.
    """
    return of_jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


def of_jaxpr(jaxpr, kernels: bool = False) -> int:
    """The same of a jaxpr; `kernels`: only those inside Pallas kernels, which XLA does not see."""
    return sum(_equation(e, kernels) for e in jaxpr.eqns)


def _equation(e, kernels: bool) -> int:
    if e.primitive.name == "dot_general":
        if kernels:
            return 0
        (contracted, _), _ = e.params["dimension_numbers"]
        return 2 * math.prod(e.outvars[0].aval.shape) * math.prod(e.invars[0].aval.shape[axis] for axis in contracted)
    inner = [of_jaxpr(j, kernels and e.primitive.name != "pallas_call") for j in _jaxprs(e.params)]
    if e.primitive.name == "scan":
        return e.params["length"] * sum(inner)
    if e.primitive.name == "cond":
        return max(inner)
    if e.primitive.name == "pallas_call":
        return math.prod(e.params["grid_mapping"].grid) * sum(inner)
    if e.primitive.name == "shard_map":  # its body is one device's
        return e.params["mesh"].size * sum(inner)
    return sum(inner)


def _jaxprs(params):
    for value in params.values():
        for part in value if isinstance(value, (tuple, list)) else (value,):
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                yield part


def seconds(once: Callable, count: int) -> float:
    """How long `count` calls of once() take, the last one's arrays waited for."""
    start = time.perf_counter()
    for _ in range(count):
        result = once()
    jax.block_until_ready(result)
    return time.perf_counter() - start


def products(dtype: str, mesh, budget: float) -> Callable[[], float]:
    """A measurement of the FLOP/s of matrix products, float32 or dtype and of the size that is fastest, on one device, times the devices.

    budget: seconds; a size of which one product would take longer is left out. Devices of a CPU are one processor's: they count once a
    process.
    """
    device = mesh.local_devices[0]
    times = jax.process_count() if device.platform == "cpu" else mesh.size

    def rate(product, work: int) -> float:
        count = math.ceil(budget / 5 / seconds(product, 1))
        return max(work * count / seconds(product, count) for _ in range(2)) * times

    best, chosen = 0.0, None
    for kind in {"float32", dtype}:
        for size in MATRICES:
            work = 2 * size**3
            if best and work * times / best > budget:
                break
            operands = jax.device_put(np.random.default_rng(0).normal(size=(2, size, size)).astype(kind), device)
            product = functools.partial(jax.jit(jnp.matmul), *operands)
            jax.block_until_ready(product())
            if (found := rate(product, work)) > best:
                best, chosen = found, functools.partial(rate, product, work)
    return chosen
