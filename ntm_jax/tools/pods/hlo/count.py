"""Counts the work of one device in a compiled program, from its text.

XLA's own analysis counts a loop's body once, and no collectives. Here every loop counts with its
iterations: matrix products (dots and convolutions, fused or not), bytes read from and written to
device memory, and bytes sent by collectives. Products of cuBLAS and of cuDNN's attention count.
Other custom calls (Pallas kernels) are opaque here; see runtime/flops.py.
"""

import collections
import dataclasses
import functools
import math
import re

import numpy as np

from ntm_jax.tools.pods.hlo.text import (
    Instruction,
    branches,
    called,
    numbers,
    parse,
    replica_groups,
    root,
    search,
    source_target_pairs,
    trip_count,
)

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
FREE = (  # without memory traffic of their own
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "call-start", "after-all", "partition-id", "iota", "opt-barrier")
SLICES = ("dynamic-slice", "gather", "slice")


@dataclasses.dataclass
class Work:
    """The work of one device in one run.

    products: {(part, precision): FLOPs}, 2 per multiply-add, with part "transporter" or "other",
    and precision a dtype as HLO names it, or that of float32 products that is not the default:
    "highest" or "high". memory: bytes read and written. kernels: {(memory, items of products):
    times}, instructions or fusions that run one after another; without collectives and
    asynchronous copies. sent: {(kind, network): bytes}, with network "ici" or "dcn". overlapped:
    {network: bytes}, those of sent by collectives that have other work between their start and
    their end. unknown: the places of loops of unknown length, which count as one iteration.
    """

    products: dict[tuple[str, str], float] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(float))
    memory: float = 0
    kernels: dict[tuple[float, tuple], float] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(float))
    sent: dict[tuple[str, str], float] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(float))
    overlapped: dict[str, float] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(float))
    unknown: list[str] = dataclasses.field(default_factory=list)

    @property
    def flops(self) -> float:
        """FLOPs of all products."""
        return sum(self.products.values())

    def of_precision(self, name: str) -> float:
        """FLOPs of the products of a precision."""
        return sum(value for (_, precision), value in self.products.items() if precision == name)

    def add(self, other: "Work", times: float = 1) -> None:
        """Adds `times` times another's work."""
        self.memory += times * other.memory
        self.unknown += other.unknown
        for name in ("products", "kernels", "sent", "overlapped"):
            own = getattr(self, name)
            for key, value in getattr(other, name).items():
                own[key] = own.get(key, 0) + times * value


def count(text: str, chips: int, slices: int = 1) -> Work:
    """The work of one of `chips` devices in a compiled module, given its text.

    The first chips / slices devices form the first slice, and so on. Among n chips a chip sends
    (n-1)/n of a gathered or scattered array, and twice that of a reduced one, as in a ring.
    """
    module, entry = parse(text)
    parted = _remove_repeated_collectives(module)

    @functools.cache
    def work(name: str) -> Work:
        total = Work()
        for i in module[name].values():
            own = _own(module, module[name], i, chips, slices)
            if i.op == "while":
                trips = trip_count(module, i)
                total.add(work(called(i, "body")), trips or 1)
                total.unknown += [i.op_name or i.name] if trips is None else []
            elif i.op == "conditional":
                total.add(max(map(work, branches(i)), key=lambda w: w.flops + w.memory))
            elif i.op in ("call", "call-start"):  # the latter runs on a TPU's SparseCores
                own.add(work(called(i, "to_apply") or called(i, "calls")))
            elif i.op == "fusion" or i.op.endswith("-start"):
                inner = called(i, "calls")
                if inner:  # a fusion's arrays stay on the chip: _own counts its memory traffic
                    own.add(dataclasses.replace(work(inner), memory=0, kernels={}))
            collective = own.sent and not own.products
            if not (collective or i.op in FREE or i.op.endswith(("-start", "-done"))):
                own.kernels[own.memory, tuple(own.products.items())] = 1
            if _channel(i) in parted or _ends_later(module[name], i):
                own.overlapped = collections.defaultdict(float)
                for (_, network), size in own.sent.items():
                    own.overlapped[network] += size
            total.add(own)
        return total

    return work(entry)


def _channel(i: Instruction) -> str | None:
    found = re.search(r"channel_id=(\d+)", i.attributes) if i.op in COLLECTIVES else None
    return found and found[1]


def _ends_later(computation, i: Instruction) -> bool:
    """Whether an asynchronous operation has other work between its start and its end."""
    if not (i.op.endswith("-start") or i.op == "send"):
        return False
    order = list(computation.values())
    for later in order[order.index(i) + 1 :]:
        if i.name in later.operands and later.op.endswith("-done"):
            return False
        if not (later.op in FREE or later.op.endswith(("-start", "-done")) or later.op == "send"):
            return True
    return False


def _remove_repeated_collectives(module) -> set[str]:
    """Keeps only the first mention of a TPU collective, and returns the channels of repeated ones.

    The text repeats a collective that overlaps with other work in up to three fusions: its start,
    middle and end.
    """
    fused = {called(i, "calls") for c in module.values() for i in c.values() if i.op == "fusion"}
    seen, repeated = set(), set()
    for name in module:
        if name not in fused or _scatters(module[name]):  # reduce-scatters share a channel
            continue
        for i in module[name].values():
            channel = _channel(i)
            if channel in seen:
                repeated.add(channel)
                i.op = "bitcast"
            elif channel:
                seen.add(channel)
    return repeated


def _own(module, computation, i: Instruction, chips: int, slices: int) -> Work:
    """The work of an instruction without that of the computations it calls."""
    work = Work(memory=_memory(module, computation, i), sent=_sent(computation, i, chips, slices))
    flops = 0.0
    if i.op == "dot":
        dims = numbers(search(r"lhs_contracting_dims=\{([\d,]*)\}", i.attributes)[1])
        left = computation[i.operands[0]].arrays[0].dims
        flops = 2 * math.prod(i.arrays[0].dims) * math.prod(left[axis] for axis in dims)
    elif i.op == "convolution":
        flops = _convolution(computation, i)
    elif i.op == "custom-call":
        flops = _library_call(computation, i)
    if flops:
        part = "transporter" if "transporter" in i.op_name else "other"
        work.products[part, _precision(computation, i)] += flops
    return work


def _precision(computation, i: Instruction) -> str:
    """The precision of a product: its operands' dtype, or of float32 the one that is asked for.

    TPUs and fusions of GPUs have it as operand_precision={highest,highest}, cuBLAS as JSON.
    """
    dtype = computation[i.operands[0]].arrays[0].dtype
    asked = re.search(r'operand_precision"?[=:] ?[{\[]"?(\w+)', i.attributes)
    named = asked[1].lower() if asked else "default"
    return dtype if dtype != "f32" or named == "default" else named


def _library_call(computation, i: Instruction) -> float:
    """FLOPs of a product by cuBLAS or of attention by cuDNN; 0 for other custom calls."""
    target = called(i, "custom_call_target") or ""
    if target.startswith("__cublas$"):
        left, output = computation[i.operands[0]].arrays[0].dims, math.prod(i.arrays[0].dims)
        return 2 * output * math.prod(left[a] for a in _listed(i, "lhs_contracting_dimensions"))
    if target.startswith("__cudnn$fmha"):
        # Scores and values; the gradient recomputes the scores and has two products for each.
        products = 5 if target.endswith("Backward") else 2
        scores = math.prod(_listed(i, "dimensions"))  # [B, H, N, M], the intermediate tensor's
        return products * 2 * scores * computation[i.operands[0]].arrays[0].dims[-1]
    return 0


def _listed(i: Instruction, key: str) -> list[int]:
    """The integers that an instruction's backend_config lists under a key."""
    return numbers(search(rf'"{key}": ?\[([^\]]*)\]', i.attributes)[1].replace('"', ""))


def _sent(computation, i: Instruction, chips: int, slices: int) -> dict[tuple[str, str], float]:
    """{(kind, network): bytes} that an instruction sends from one device."""
    sent = {}
    across_slices = re.search(r'_xla_megascale_transfer_type="(\w+)"', i.attributes)
    if i.op == "send" and across_slices:  # a TPU's share of such a collective, through the hosts
        kind = across_slices[1].lower().replace("_", "-")
        share = {"all-gather": 1, "all-reduce": 2 / slices}.get(kind, 1 / slices)
        sent[kind, "dcn"] = computation[i.operands[0]].arrays[0].bytes * (slices - 1) * share
        return sent
    kind = i.op.removesuffix("-start")
    if kind not in COLLECTIVES:
        return sent
    size = sum(array.bytes for name in i.operands for array in computation[name].arrays)
    if kind == "all-reduce" and _scatters(computation):
        kind = "reduce-scatter"
    if kind == "collective-permute":
        ends = source_target_pairs(i.attributes) * slices // chips
        crossing = float(np.mean(ends[:, 0] != ends[:, 1])) if len(ends) else 0
        sent[kind, "ici"] = size * (1 - crossing)
        return sent | ({(kind, "dcn"): size * crossing} if crossing else {})
    slice_of_member = replica_groups(i.attributes, chips)[0] * slices // chips
    across = len(np.unique(slice_of_member))
    within = len(slice_of_member) // across
    if kind == "all-to-all":  # another part for every member, without stops on the way
        sent[kind, "ici"] = size * (within - 1) / len(slice_of_member)
        if across > 1:
            sent[kind, "dcn"] = size * (across - 1) / across
        return sent
    size *= {"all-gather": len(slice_of_member), "all-reduce": 2}.get(kind, 1)
    sent[kind, "ici"] = size * (within - 1) / within
    if across > 1:
        sent[kind, "dcn"] = size / within * (across - 1) / across
    return sent


def _scatters(computation) -> bool:
    """Whether a computation is a TPU's reduce-scatter: an all-reduce fused with a slice."""
    ops = {i.op for i in computation.values()}
    return ({"partition-id", "dynamic-slice"} <= ops and len(computation) < 40
            and not ops & {"fusion", "while", "convolution"})


def _convolution(computation, i: Instruction) -> float:
    """FLOPs of a convolution, without the kernel's elements that fall on padding."""
    labels = search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes)
    left, right = (computation[name].arrays[0].dims for name in i.operands[:2])
    output, window = i.arrays[0].dims, re.search(r"window=\{([^}]*)\}", i.attributes)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}
    spatial = sum(letter.isdigit() for letter in labels[1])

    def per_axis(name, default):
        return fields[name].split("x") if name in fields else [default] * spatial

    products = 1
    for axis in range(spatial):
        places = output[labels[3].index(str(axis))]
        length = left[labels[1].index(str(axis))]
        size = right[labels[2].index(str(axis))]
        stride, left_dilation, right_dilation = (
            int(per_axis(name, "1")[axis]) for name in ("stride", "lhs_dilate", "rhs_dilate"))
        low = int(per_axis("pad", "0_0")[axis].split("_")[0])
        at = np.arange(places)[:, None] * stride + np.arange(size)[None] * right_dilation - low
        inside = (at >= 0) & (at <= (length - 1) * left_dilation) & (at % left_dilation == 0)
        products *= int(inside.sum())
    batch, features = output[labels[3].index("b")], output[labels[3].index("f")]
    return 2 * batch * features * right[labels[2].index("i")] * products


def _in_memory(arrays) -> float:
    """Bytes of the arrays in device memory."""
    return sum(array.bytes for array in arrays if array.in_memory)


def _memory(module, computation, i: Instruction) -> float:
    """Bytes of device memory that an instruction reads and writes.

    Of an array that it only slices or updates in place, this counts the slice or the update.
    """
    if i.op.endswith("-done"):  # its type is the output, unlike that of some starts
        return _in_memory(i.arrays) if i.op.removesuffix("-done") in COLLECTIVES else 0
    if i.op in FREE:
        return 0
    if i.op in SLICES:
        return 2 * _in_memory(i.arrays)
    if i.op == "slice-start":  # its type lists the whole array, then the slice
        return i.arrays[1].bytes + _in_memory(i.arrays[1:2])
    if i.op == "dynamic-update-slice":
        return 2 * _in_memory(computation[i.operands[1]].arrays)
    inner = module.get(called(i, "calls")) if i.op == "fusion" else None
    total = 0
    for number, name in enumerate(i.operands):
        if name in computation:
            size = _in_memory(computation[name].arrays)
            total += min(size, _read(module, inner, number)) if inner else size
    if i.op.endswith("-start"):
        return total + (_in_memory(i.arrays[:1]) if i.op == "copy-start" else 0)
    written = _in_memory(i.arrays)
    return total + (min(written, _written(inner)) if inner else written)


def _read(module, computation, number: int) -> float:
    """Bytes that a fused computation reads of its parameter `number`; math.inf for all of them."""
    parameter = next((i for i in computation.values()
                      if i.op == "parameter" and i.operands == [str(number)]), None)
    names, total = {parameter.name} if parameter else set(), 0.0
    for i in computation.values():
        for place, name in enumerate(i.operands):
            if name not in names or i.op == "parameter":
                continue
            if i.op == "bitcast" or _passes_on(module, i):
                names.add(i.name)
            elif i.op in SLICES and place == 0:
                total += i.arrays[0].bytes
            elif i.op == "fusion" and called(i, "calls") in module:
                total += _read(module, module[called(i, "calls")], place)
            elif not (i.op == "dynamic-update-slice" and place == 0):
                return math.inf
    return total


def _passes_on(module, i: Instruction) -> bool:
    """Whether an instruction is a fusion that only hands on its operand."""
    inner = module.get(called(i, "calls"), {}) if i.op == "fusion" else {}
    return bool(inner) and {j.op for j in inner.values()} <= {"parameter", "copy", "bitcast"}


def _written(computation) -> float:
    """Bytes that a fused computation writes; of an array updated in place, the update."""
    def of(i):
        if i.op == "bitcast" and i.operands[0] in computation:
            return min(of(computation[i.operands[0]]), i.arrays[0].bytes)
        if i.op == "dynamic-update-slice":
            return computation[i.operands[1]].arrays[0].bytes
        if i.op == "tuple":
            return sum(of(computation[name]) for name in i.operands)
        return sum(array.bytes for array in i.arrays)

    return of(root(computation))
