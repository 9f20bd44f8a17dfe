"""Floating-point operations: counted from a function's jaxpr, and this machine's highest rate."""

import functools
import math
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

# Products as large as q k^T in cuDNN's attention; its gradient recomputes the scores.
CUDNN = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 5}
MATRICES = (512, 1024, 2048, 4096)  # sizes tried for the highest rate


def count(function, *args) -> int:
    """FLOPs of all matrix products and convolutions in function(*args), 2 per multiply-add.

    Products with padding count. Products with a vector, which are weighted sums, do not. Includes
    recomputation under remat. args may be abstract. Counts the body of a `while` loop once, since
    its number of iterations is unknown; the most expensive branch of a `cond`; and the body of a
    Pallas kernel at every point of its grid.
    """
    return of_jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


def of_jaxpr(jaxpr, kernels: bool = False, highest: bool = False) -> int:
    """FLOPs of a jaxpr, counted as in `count`.

    kernels: counts only products inside Pallas kernels, which a compiled program's text hides.
    highest: counts only products of float32 numbers at precision `highest`.
    """
    return sum(_of_equation(e, kernels, highest) for e in jaxpr.eqns)


def _of_equation(e, kernels: bool, highest: bool) -> int:
    if e.primitive.name == "dot_general":
        if kernels or not is_matrix_product(e) or (highest and not _at_highest(e)):
            return 0
        (contracted, _), _ = e.params["dimension_numbers"]
        left = e.invars[0].aval.shape
        return 2 * math.prod(e.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
    if e.primitive.name == "conv_general_dilated":
        if kernels or (highest and not _at_highest(e)):
            return 0
        kernel, outputs = e.invars[1].aval.shape, e.params["dimension_numbers"].rhs_spec[0]
        return 2 * math.prod(e.outvars[0].aval.shape) * math.prod(kernel) // kernel[outputs]
    if e.primitive.name in CUDNN:
        return 0 if kernels or highest else CUDNN[e.primitive.name] * _attention_product(e)
    kernels = kernels and e.primitive.name != "pallas_call"
    inner = [of_jaxpr(j, kernels, highest) for j in _jaxprs(e.params)]
    if e.primitive.name == "scan":
        return e.params["length"] * sum(inner)
    if e.primitive.name == "cond":
        return max(inner)
    if e.primitive.name == "pallas_call":
        return math.prod(e.params["grid_mapping"].grid) * sum(inner)
    if e.primitive.name == "shard_map":  # its jaxpr is that of one device
        return e.params["mesh"].size * sum(inner)
    return sum(inner)


def is_matrix_product(e) -> bool:
    """Whether the dot_general equation e is no outer product and has no vector as an operand."""
    (contracted, _), (batch, _) = e.params["dimension_numbers"]
    taken = len(contracted) + len(batch)
    return bool(contracted) and all(v.aval.ndim > taken for v in e.invars)


def _at_highest(e) -> bool:
    asked = e.params["precision"]
    asked = asked[0] if isinstance(asked, tuple) else asked
    return e.invars[0].aval.dtype == jnp.float32 and asked == jax.lax.Precision.HIGHEST


def _attention_product(e) -> int:
    """FLOPs of q k^T in cuDNN's attention: q [B, N, H, C] and k [B, M, G, C], or heads first."""
    q, k = (v.aval.shape for v in e.invars[:2])
    return 2 * math.prod(q) * k[2 if e.params["layout"] else 1]


def primitives(jaxpr) -> set[str]:
    """The names of the primitives in a jaxpr, those of its loops and functions included."""
    inner = (primitives(j) for e in jaxpr.eqns for j in _jaxprs(e.params))
    return {e.primitive.name for e in jaxpr.eqns}.union(*inner)


def _jaxprs(params):
    for value in params.values():
        for part in value if isinstance(value, (tuple, list)) else (value,):
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                yield part


def seconds(once: Callable, count: int) -> float:
    """Seconds that `count` calls of once() take, until the last call's arrays are ready."""
    start = time.perf_counter()
    for _ in range(count):
        result = once()
    jax.block_until_ready(result)
    return time.perf_counter() - start


def matmul_rate_probe(dtype: str, mesh, budget: float) -> Callable[[], float]:
    """A function that measures the FLOP/s of matrix products over all devices of the mesh.

    It multiplies the fastest of several sizes, in float32 or dtype, on one device, and scales by
    the number of devices. The devices of a CPU share its cores: they count once per process.

    budget: seconds per measurement; skips sizes whose product takes longer.
    """
    device = mesh.local_devices[0]
    devices = jax.process_count() if device.platform == "cpu" else mesh.size

    def rate(product, work: int) -> float:
        repeats = math.ceil(budget / 5 / seconds(product, 1))
        return max(work * repeats / seconds(product, repeats) for _ in range(2)) * devices

    best, chosen = 0.0, None
    for kind in {"float32", dtype}:
        for size in MATRICES:
            work = 2 * size**3
            if best and work * devices / best > budget:
                break
            operands = np.random.default_rng(0).normal(size=(2, size, size)).astype(kind)
            operands = jax.device_put(tuple(operands), device)
            product = functools.partial(jax.jit(jnp.matmul), *operands)
            jax.block_until_ready(product())  # compiles
            if (found := rate(product, work)) > best:
                best, chosen = found, functools.partial(rate, product, work)
    assert chosen is not None  # the first size sets it
    return chosen
