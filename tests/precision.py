"""Matrix products of a jaxpr and their precision, for the tests that float32 means float32."""

import jax

HIGHEST = (jax.lax.Precision.HIGHEST,) * 2


def products(jaxpr):
    """Every dot_general equation of a jaxpr, loops, gradients and Pallas kernels included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for value in equation.params.values():
            for part in value if isinstance(value, (tuple, list)) else (value,):
                part = getattr(part, "jaxpr", part)
                if hasattr(part, "eqns"):
                    yield from products(part)


def precisions(traced) -> dict:
    """{(dtype, precision): number of products} of a traced function; dtype: the operands' narrower.

    The gradient of bfloat16 attention has products of a float32 operand and a bfloat16 one.
    """
    found = {}
    for equation in products(traced.jaxpr.jaxpr):
        dtype = min((operand.aval.dtype for operand in equation.invars), key=lambda d: d.itemsize)
        precision = equation.params["precision"]
        # or None, or an algorithm of bfloat16's
        name = precision[0].name if isinstance(precision, tuple) else "DEFAULT"
        found[dtype.name, name] = found.get((dtype.name, name), 0) + 1
    return found
