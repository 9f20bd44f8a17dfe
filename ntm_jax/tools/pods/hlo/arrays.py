"""The largest arrays of a compiled program, from its text."""

import re

from ntm_jax.tools.pods.hlo.count import FREE
from ntm_jax.tools.pods.hlo.text import branches, called, parse


def largest(text: str, count: int = 5) -> list[dict]:
    """The `count` largest arrays that a program writes to device memory, and as many arguments.

    An array has bytes, shape as HLO writes it, place (its op_name), and argument. Arrays of one
    shape and place count once. Two of them may share memory, one after the other.
    """
    module, entry = parse(text)
    found = {}
    for name in _outer(module, entry):
        for i in module[name].values():
            argument = i.op == "parameter" and name == entry
            if argument or i.op not in FREE:
                for array in (array for array in i.arrays if array.in_memory):
                    shape = f"{array.dtype}[{','.join(map(str, array.dims))}]"
                    where = i.op_name or i.name
                    found[where, shape] = {"bytes": array.bytes, "shape": shape, "place": where,
                                           "argument": argument}
    ordered = sorted(found.values(), key=lambda array: -array["bytes"])
    written, arguments = ([array for array in ordered if array["argument"] is argument][:count]
                          for argument in (False, True))
    return written + arguments


def _outer(module, entry: str) -> list[str]:
    """The computations whose arrays are in memory: not those of fusions, reductions and so on."""
    found = [entry]
    for name in found:
        for i in module[name].values():
            inner = {"while": [called(i, "body")], "conditional": branches(i),
                     "call": [called(i, "to_apply") or called(i, "calls")]}.get(i.op, [])
            found += [name for name in inner if name in module and name not in found]
    return found


def short(place: str) -> str:
    """A place without the parts of its name that every operation has."""
    return re.sub(r"jit\(\w+\)/|closed_call/|checkpoint/|while/body/", "", place)
