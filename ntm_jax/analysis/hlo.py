"""What one device does in a compiled program, counted from its text: XLA's own analysis counts a loop's body once and no collectives.

Counted with the trips of the loops they stand in: matrix products (dots and convolutions, wherever they were fused), bytes that go
through device memory, and bytes sent by collectives. Custom calls (Pallas kernels) are opaque here: ntm_jax/runtime/flops.py counts them.
"""

import collections
import dataclasses
import functools
import math
import re

import numpy as np

BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "token": 0, "opaque": 0}  # the others tell their bits
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all", "partition-id",
        "iota", "opt-barrier")
SLICES = ("dynamic-slice", "gather", "slice")


@dataclasses.dataclass
class Instruction:
    name: str
    shapes: list  # (dtype, dims, whether in device memory) of each array that it makes
    op: str
    operands: list[str]
    attributes: str
    root: bool


@dataclasses.dataclass
class Work:
    """Of one device in one run. flops: 2 a multiply-add. memory: bytes read and written. sent: {(kind, network): bytes}, the network
    "ici" or "dcn". unknown: loops whose trips could not be read, taken once."""

    flops: float = 0
    memory: float = 0
    sent: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    unknown: int = 0

    def add(self, other: "Work", times: float = 1) -> None:
        self.flops += times * other.flops
        self.memory += times * other.memory
        self.unknown += other.unknown
        for key, value in other.sent.items():
            self.sent[key] += times * value


def count(text: str, chips: int, slices: int = 1) -> Work:
    """The work of a compiled module's text, on the first `chips`/`slices` of whose devices the first slice lies, and so on.

    A chip sends (n-1)/n of a gathered or scattered array among n chips, twice that of a reduced one: what a ring does.
    """
    module, entry = parse(text)
    _name_once(module)

    @functools.cache
    def work(name: str) -> Work:
        total = Work()
        for i in module[name].values():
            total.add(_own(module, module[name], i, chips, slices))
            if i.op == "while":
                trips = _trips(module, i)
                total.add(work(_called(i, "body")), trips or 1)
                total.unknown += trips is None
            elif i.op == "conditional":
                branches = [work(b) for b in _branches(i)]
                total.add(max(branches, key=lambda w: w.flops + w.memory))
            elif i.op in ("fusion", "call") or i.op.endswith("-start"):
                inner = _called(i, "calls") or (_called(i, "to_apply") if i.op == "call" else None)
                if inner:
                    total.add(_inside(work(inner), i.op == "call"))
        return total

    return work(entry)


def _name_once(module) -> None:
    """A TPU collective that other work hides is written in the fusions of its start, its middle and its end: it stays in the first."""
    fused, seen = {_called(i, "calls") for c in module.values() for i in c.values() if i.op == "fusion"}, set()
    for name in module:
        if name not in fused or _scatters(module[name]):  # reduce-scatters share a channel
            continue
        for i in module[name].values():
            channel = re.search(r"channel_id=(\d+)", i.attributes)
            if channel and i.op in COLLECTIVES:
                i.op = "bitcast" if channel[1] in seen else i.op
                seen.add(channel[1])


def _inside(work: Work, memory: bool) -> Work:
    """A fusion's arrays stay on the chip: its memory traffic is counted from outside."""
    return work if memory else dataclasses.replace(work, memory=0)


def _own(module, computation, i: Instruction, chips: int, slices: int) -> Work:
    work = Work(memory=_memory(module, computation, i))
    if i.op == "dot":
        contracted = _numbers(re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.attributes)[1])
        left = computation[i.operands[0]].shapes[0][1]
        work.flops = 2 * math.prod(i.shapes[0][1]) * math.prod(left[axis] for axis in contracted)
    elif i.op == "convolution":
        work.flops = _convolution(computation, i)
    between = re.search(r'_xla_megascale_transfer_type="(\w+)"', i.attributes)
    if i.op == "send" and between:  # a TPU's part of a collective that crosses slices, through the hosts
        kind = between[1].lower().replace("_", "-")
        size = _size(computation[i.operands[0]].shapes[0])
        work.sent[kind, "dcn"] += size * (slices - 1) * {"all-gather": 1, "all-reduce": 2 / slices}.get(kind, 1 / slices)
        return work
    kind = i.op.removesuffix("-start")
    if kind in COLLECTIVES:
        size = sum(_size(shape) for name in i.operands for shape in computation[name].shapes)
        groups = _groups(i.attributes, chips)
        if kind == "all-reduce" and _scatters(computation):
            kind = "reduce-scatter"  # a TPU's: a fusion of the two
        if kind == "collective-permute":
            work.sent[kind, "ici"] += size
            return work
        members = groups[0] * slices // chips  # the slice that each member of a group lies in
        across = len(np.unique(members))
        within = len(members) // across
        size *= {"all-gather": len(members), "all-reduce": 2}.get(kind, 1)
        work.sent[kind, "ici"] += size * (within - 1) / within
        if across > 1:
            work.sent[kind, "dcn"] += size / within * (across - 1) / across
    return work


def _scatters(computation) -> bool:
    """Whether a computation is a fusion of an all-reduce with the choice of this device's part."""
    ops = {i.op for i in computation.values()}
    return "partition-id" in ops and "dynamic-slice" in ops and len(computation) < 40 and not ops & {"fusion", "while", "convolution"}


def _convolution(computation, i: Instruction) -> float:
    """Multiply-adds of taps that fall on the input, not on padding, times 2."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes)
    left, right = (computation[name].shapes[0][1] for name in i.operands[:2])
    output, window = i.shapes[0][1], re.search(r"window=\{([^}]*)\}", i.attributes)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}
    spatial = sum(letter.isdigit() for letter in labels[1])

    def per_axis(name, default):
        return fields[name].split("x") if name in fields else [default] * spatial

    taps = 1
    for axis in range(spatial):
        places = output[labels[3].index(str(axis))]
        length, size = left[labels[1].index(str(axis))], right[labels[2].index(str(axis))]
        stride, spread, apart = (int(per_axis(name, "1")[axis]) for name in ("stride", "lhs_dilate", "rhs_dilate"))
        low = int(per_axis("pad", "0_0")[axis].split("_")[0])
        at = np.arange(places)[:, None] * stride + np.arange(size)[None] * apart - low
        taps *= int(((at >= 0) & (at <= (length - 1) * spread) & (at % spread == 0)).sum())
    batch, features = output[labels[3].index("b")], output[labels[3].index("f")]
    return 2 * batch * features * right[labels[2].index("i")] * taps


def _memory(module, computation, i: Instruction) -> float:
    """Bytes of device memory that an instruction reads and writes; of an array that it only slices or updates in place, that part."""
    if i.op in FREE or i.op.endswith("-done"):
        return 0
    if i.op in SLICES:
        return 2 * _in_memory(i.shapes)
    if i.op == "dynamic-update-slice":
        return 2 * _in_memory(computation[i.operands[1]].shapes)
    inner = module.get(_called(i, "calls")) if i.op == "fusion" else None
    read = sum(min(_in_memory(computation[name].shapes), _read(module, inner, number)) if inner else _in_memory(computation[name].shapes)
               for number, name in enumerate(i.operands) if name in computation)
    if i.op.endswith("-start"):
        return read + (_in_memory(i.shapes[:1]) if i.op == "copy-start" else 0)
    return read + (min(_in_memory(i.shapes), _written(module, inner)) if inner else _in_memory(i.shapes))


def _read(module, computation, number: int) -> float:
    """Bytes that a fused computation reads of its parameter `number`: math.inf for the whole."""
    parameter = next((i for i in computation.values() if i.op == "parameter" and i.operands == [str(number)]), None)
    names, total = {parameter.name} if parameter else set(), 0.0
    for i in computation.values():
        for place, name in enumerate(i.operands):
            if name not in names or i.op == "parameter":
                continue
            if i.op == "bitcast":
                names.add(i.name)
            elif i.op in SLICES and place == 0:
                total += _size(i.shapes[0])
            elif i.op == "fusion" and _called(i, "calls") in module:
                total += _read(module, module[_called(i, "calls")], place)
            elif not (i.op == "dynamic-update-slice" and place == 0):
                return math.inf
    return total


def _written(module, computation) -> float:
    """Bytes that a fused computation writes: of an array updated in place, the update."""
    def of(i):
        if i.op == "bitcast" and i.operands[0] in computation:
            return min(of(computation[i.operands[0]]), _size(i.shapes[0]))
        if i.op == "dynamic-update-slice":
            return _size(computation[i.operands[1]].shapes[0])
        if i.op == "tuple":
            return sum(of(computation[name]) for name in i.operands)
        return sum(map(_size, i.shapes))

    return of(next(i for i in computation.values() if i.root))


def _trips(module, loop: Instruction) -> int | None:
    """How often a loop runs: as the compiler noted it, else from the bound that its condition compares with, counting from 0."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    condition = module[_called(loop, "condition")]
    bounds = {int(n) for i in condition.values() for n in _number(i)}
    step = _step(condition, module[_called(loop, "body")])
    return -(-bounds.pop() // step) if len(bounds) == 1 and step else None


def _number(i: Instruction) -> list[str]:
    """What an instruction holds that is a constant whole number."""
    return i.operands if i.op == "constant" and i.shapes[0][0] in ("s32", "u32") and not i.shapes[0][1] else []


def _step(condition, body) -> int | None:
    """By how much a loop's counter grows: 1, or 2 where the compiler unrolled what it overlaps with communication; None if not seen."""
    compare = next(i for i in condition.values() if i.root)
    counter = next((condition[name] for name in compare.operands if name in condition and "index=" in condition[name].attributes), None)
    if counter is None:  # fused: the compiler unrolls none of these
        return 1
    root = next(i for i in body.values() if i.root)
    update = body.get(root.operands[int(re.search(r"index=(\d+)", counter.attributes)[1])])
    steps = [int(n) for name in update.operands if name in body for n in _number(body[name])] if update and update.op == "add" else []
    return steps[0] if len(steps) == 1 else None


def _groups(attributes: str, chips: int) -> np.ndarray:
    """Which devices take part in a collective together, [groups, members], from any of the three ways that XLA writes them."""
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?\)?)\))? ?\{([^}]*)\}", attributes)
    if mesh:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        order = _iota(mesh[2], chips) if mesh[2] else np.arange(chips)
        axes = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", mesh[3])]
        grid = np.moveaxis(order.reshape(*sizes.values()), axes, range(-len(axes), 0))
        return grid.reshape(-1, math.prod(grid.shape[-len(axes):]))
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes)
    if iota:
        return _iota(iota[2], chips).reshape(_numbers(iota[1]))
    listed = re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", attributes)
    return np.array([_numbers(g) for g in re.findall(r"\{([\d,]+)\}", listed[1])]) if listed else np.arange(chips)[None]


def _iota(text: str, chips: int) -> np.ndarray:
    """[8,4]T(1,0) -> the numbers 0.. in that shape, transposed."""
    shape, order = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
    numbers = np.arange(chips).reshape(_numbers(shape))
    return numbers.transpose(_numbers(order)) if order else numbers


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]


def _called(i: Instruction, role: str) -> str | None:
    found = re.search(rf"\b{role}=%?([\w.\-]+)", i.attributes)
    return found[1] if found else None


def _branches(i: Instruction) -> list[str]:
    listed = re.search(r"branch_computations=\{([^}]*)\}", i.attributes)
    return re.findall(r"%?([\w.\-]+)", listed[1]) if listed else [_called(i, "true_computation"), _called(i, "false_computation")]


def _size(shape) -> float:
    dtype, dims, _ = shape
    return math.prod(dims) * BYTES.get(dtype, int((re.search(r"\d+", dtype) or ["8"])[0]) / 8)


def _in_memory(shapes) -> float:
    return sum(_size(shape) for shape in shapes if shape[2])


HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
SHAPE = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{([^}]*)\})?")


def parse(text: str) -> tuple[dict, str]:
    """Computations by name, each its instructions by name, and the entry's name."""
    module, entry, current = {}, None, None
    for line in text.splitlines():
        header = HEADER.match(line)
        if header:
            current = module[header[2]] = {}
            entry = header[2] if header[1] else entry
            continue
        found = LINE.match(line) if current is not None else None
        if found:
            root, name, rest = found.groups()
            made, rest = _split(rest) if rest.startswith("(") else rest.split(" ", 1)
            op, _, rest = rest.strip().partition("(")
            operands, attributes = _split("(" + rest)
            # Memory other than the device's main one is marked S(n).
            shapes = [(dtype, _numbers(dims.replace("<=", "")), "S(" not in layout) for dtype, dims, layout in SHAPE.findall(made)]
            names = [operands[1:-1]] if op in ("parameter", "constant") else re.findall(r"%([\w.\-]+)", operands)
            current[name] = Instruction(name, shapes, op, names, attributes, bool(root))
    return module, entry


def _split(text: str) -> tuple[str, str]:
    """The leading balanced parenthesis of a text, and the rest."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return text[: place + 1], text[place + 1 :]
    return text, ""
