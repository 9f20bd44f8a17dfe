"""Parses the text of a compiled program (HLO) into computations of instructions."""

import dataclasses
import math
import re
from itertools import pairwise
from typing import NamedTuple

import numpy as np

BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "token": 0, "opaque": 0}  # others: see Array
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{([^}]*)\})?")


class Array(NamedTuple):
    """The type of an array that an instruction produces."""

    dtype: str
    dims: list[int]
    in_memory: bool  # in the device's main memory

    @property
    def bytes(self) -> float:
        bits = re.search(r"\d+", self.dtype)  # f32, s64
        size = BYTES.get(self.dtype, int(bits[0] if bits else 8) / 8)
        return math.prod(self.dims) * size


@dataclasses.dataclass
class Instruction:
    """One instruction of a computation; `operands` names the instructions that it reads."""

    name: str
    arrays: list[Array]
    op: str
    operands: list[str]
    attributes: str
    root: bool

    @property
    def op_name(self) -> str:
        """Its place in the traced program, such as jit(step)/while; empty if the text has none."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""


def parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """(computations {name: {name: instruction}}, the entry computation's name) of a module."""
    module: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            current = module[header[2]] = {}
            entry = header[2] if header[1] else entry
            continue
        found = _LINE.match(line)
        if found and current is not None:
            root, name, rest = found.groups()
            current[name] = _instruction(name, rest, bool(root))
    return module, entry


def _instruction(name: str, text: str, root: bool) -> Instruction:
    types, rest = _split(text) if text.startswith("(") else text.split(" ", 1)
    op, _, rest = rest.strip().partition("(")
    operands, attributes = _split("(" + rest)
    # S(n) marks other memory than the device's main one.
    arrays = [Array(dtype, numbers(dims.replace("<=", "")), "S(" not in layout)
              for dtype, dims, layout in _ARRAY.findall(types)]
    literal = op in ("parameter", "constant")
    names = [operands[1:-1]] if literal else re.findall(r"%([\w.\-]+)", operands)
    return Instruction(name, arrays, op, names, attributes, root)


def _split(text: str) -> tuple[str, str]:
    """Splits a text after its leading balanced parenthesis."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return text[: place + 1], text[place + 1 :]
    return text, ""


def root(computation: dict[str, Instruction]) -> Instruction:
    """The instruction whose value a computation returns."""
    return next(i for i in computation.values() if i.root)


def called(i: Instruction, role: str) -> str | None:
    """The computation that an instruction calls as `role`, such as body or calls; None if none."""
    found = re.search(rf"\b{role}=[%\"]?([\w.\-$]+)", i.attributes)
    return found[1] if found else None


def branches(i: Instruction) -> list[str]:
    """The computations of a conditional's branches."""
    listed = re.search(r"branch_computations=\{([^}]*)\}", i.attributes)
    if listed:
        return re.findall(r"%?([\w.\-]+)", listed[1])
    either = called(i, "true_computation"), called(i, "false_computation")
    return [name for name in either if name]


def trip_count(module, loop: Instruction) -> int | None:
    """The number of iterations of a `while` loop; None if the text does not show it.

    Either the compiler noted it, or it follows from the bound in the loop's condition, with a
    counter that starts at 0.
    """
    noted = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if noted:
        return int(noted[1])
    condition = module[called(loop, "condition")]
    bounds = {int(n) for i in condition.values() for n in _integer(i)}
    step = _step(condition, module[called(loop, "body")])
    return -(-bounds.pop() // step) if len(bounds) == 1 and step else None


def _integer(i: Instruction) -> list[str]:
    """[the value] of a constant integer; [] for other instructions."""
    if i.op == "constant" and i.arrays[0].dtype in ("s32", "u32") and not i.arrays[0].dims:
        return i.operands
    return []


def _step(condition, body) -> int | None:
    """The step of a loop's counter; None if the text does not show it.

    It is 1, or 2 where the compiler unrolled a loop to overlap it with communication.
    """
    compared = [condition[name] for name in root(condition).operands if name in condition]
    counter = next((i for i in compared if "index=" in i.attributes), None)
    if counter is None:  # a fused condition: the compiler unrolls none of these loops
        return 1
    index = int(search(r"index=(\d+)", counter.attributes)[1])
    update = _behind_copies(body, root(body).operands[index])
    if not update or update.op != "add":
        return None
    added = filter(None, (_behind_copies(body, name) for name in update.operands))
    steps = [int(n) for i in added for n in _integer(i)]
    return steps[0] if len(steps) == 1 else None


def _behind_copies(computation, name: str) -> Instruction | None:
    """The instruction whose value an instruction has, through copies of it."""
    found = computation.get(name)
    while found and found.op in ("copy", "copy-start", "copy-done", "bitcast"):
        found = computation.get(found.operands[0])
    return found


def replica_groups(attributes: str, chips: int) -> np.ndarray:
    """The groups of devices of a collective, [groups, members], in any of XLA's three notations."""
    mesh = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?\)?)\))? ?\{([^}]*)\}", attributes)
    if mesh:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        order = _iota(mesh[2], chips) if mesh[2] else np.arange(chips)
        return _along(order, sizes, mesh[3])
    iota = re.search(
        r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes)
    if iota:
        return _iota(iota[2], chips).reshape(numbers(iota[1]))
    listed = re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", attributes)
    if listed:
        return np.array([numbers(group) for group in re.findall(r"\{([\d,]+)\}", listed[1])])
    return np.arange(chips)[None]


def _along(order: np.ndarray, sizes: dict[str, int], text: str) -> np.ndarray:
    """The groups of a mesh along the axes of a text, or parts of them, [groups, members].

    'a':(2)4 of an axis 'a' of 16 devices is the middle one of its factors 2 x 4 x 2.
    """
    parts, ends = [], {name: {1, size} for name, size in sizes.items()}
    for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", text):
        start = int(before or 1)
        parts.append((name, start, start * int(size or sizes[name])))
        ends[name] |= set(parts[-1][1:])
    factors = [(name, *pair) for name, found in ends.items() for pair in pairwise(sorted(found))]
    axes = [axis for axis, (name, start, end) in enumerate(factors)
            if any(name == other and low <= start and end <= high for other, low, high in parts)]
    grid = order.reshape([end // start for _, start, end in factors])
    members = math.prod(grid.shape[axis] for axis in axes)
    return np.moveaxis(grid, axes, range(-len(axes), 0)).reshape(-1, members)


def source_target_pairs(attributes: str) -> np.ndarray:
    """The devices of a collective-permute that send and receive, [pairs, 2]."""
    listed = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", attributes)
    pairs = re.findall(r"\{(\d+),(\d+)\}", listed[1] if listed else "")
    return np.array(pairs, int).reshape(-1, 2)


def _iota(text: str, chips: int) -> np.ndarray:
    """[8,4]T(1,0) -> the numbers 0.. in that shape, transposed."""
    shape, order = search(r"^\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
    grid = np.arange(chips).reshape(numbers(shape))
    return grid.transpose(numbers(order)) if order else grid


def search(pattern: str, text: str) -> re.Match[str]:
    """The first match of a pattern in a text that has one."""
    found = re.search(pattern, text)
    assert found, f"{pattern} is not in {text[:200]}"
    return found


def numbers(text: str) -> list[int]:
    """The integers in a comma-separated text."""
    return [int(n) for n in text.split(",") if n]
