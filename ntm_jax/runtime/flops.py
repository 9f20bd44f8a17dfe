"""Floating-point operations of a function, counted from its jaxpr: matrix products, with the bodies of loops multiplied out."""

import math

import jax


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
