"""Names where the time of traced steps goes: reads jax.profiler's trace, and the compiled program's text for what each operation is.

Shares are of the devices' time from the first operation of the traced steps to the last: a device's time is the wall's, a CPU's that of
XLA's worker threads, one a core. What the devices spend on no operation is "idle". Only traces of CPUs were seen. Of an accelerator,
operations are found by the stat hlo_op, as streams of GPUs have it, or by the event's name, as on a TPU's line "XLA Ops".
"""

import collections
import re

import jax
from etils import epath

from ntm_jax import files
from ntm_jax.analysis import hlo

KINDS = ("products", "attention", "elementwise", "reductions", "copies", "collectives", "other")
MODULES = ("transporter", "predictor", "optimizer", "rest", "other programs")
MOVES = {"copy", "transpose", "concatenate", "slice", "pad", "reshape", "broadcast", "reverse", "dynamic-slice", "dynamic-update-slice",
         "gather", "copy-start", "copy-done"}
MODULE = re.compile(r"[/(](transporter|predictor|optimizer)\b", re.IGNORECASE)
SOFTMAX = re.compile(r"/attention/(?!query|key|value|out)")  # what is in the layer beside its projections and norms


def report(folder, texts: list[str]) -> str:
    """Reads the newest trace under folder, of programs of these compiled texts; writes folder/summary.json, returns the table of it."""
    traces = sorted(epath.Path(folder).glob("plugins/profile/*/*.xplane.pb"), key=lambda path: path.stat().mtime)
    if not traces:
        raise FileNotFoundError("there is none")
    found = summarize(jax.profiler.ProfileData.from_serialized_xspace(traces[-1].read_bytes()), texts)
    files.write_json(epath.Path(folder) / "summary.json", found)
    return table(found)


def summarize(trace, texts: list[str]) -> dict:
    """Of a jax.profiler.ProfileData: seconds, devices, and shares, which sum to 1 with `idle`: `by_module` {"transporter forward":
    {kind: share}}, `by_kind`, and the ten dearest `operations`."""
    programs = [operations(text) for text in texts]
    names = {re.match(r"HloModule ([\w.\-]+)", text)[1] for text in texts}
    known = set().union(*programs)
    times, begin, end = collections.Counter(), float("inf"), 0.0
    workers = planes = 0
    for plane in trace.planes:
        # A line's name ends in its thread's number.
        lines = [(line.name, frames) for line in plane.lines if (frames := _frames(line, known, names))]
        spans = [f for _, frames in lines for f in frames if isinstance(f[2], tuple) and f[2][0] in names]
        if not spans:
            continue
        begin, end = min(begin, *(f[0] for f in spans)), max(end, *(f[1] for f in spans))
        workers, planes = workers + sum("XLAEigen" in name for name, _ in lines), planes + 1
        times.update(_own_times(frames for _, frames in lines))
    if not times:
        raise ValueError("it holds no operation of the training step")
    meanings = _meanings(programs, times)
    # Threads other than the workers start programs, and run a few small operations themselves.
    devices = workers or planes
    whole = max(devices * (end - begin), sum(times.values()))
    by_module = collections.defaultdict(collections.Counter)
    for operation, time in times.items():
        _, module, kind, _ = meanings(operation)
        by_module[module][kind] += time / whole
    by_kind = {kind: sum(kinds[kind] for kinds in by_module.values()) for kind in KINDS}
    dearest = [dict(zip(("name", "module", "kind", "op_name"), meanings(operation), strict=True), share=time / whole)
               for operation, time in times.most_common(10)]
    return {"seconds": (end - begin) / 1e9, "devices": devices, "idle": 1 - sum(by_kind.values()), "by_kind": by_kind,
            "by_module": {name: dict(by_module[name]) for name in sorted(by_module, key=_order)}, "operations": dearest}


def _order(module: str):
    """Modules in the order that a step runs them."""
    return next(i for i, name in enumerate(MODULES) if module.startswith(name)), "backward" in module


def _frames(line, known: set, names: set) -> list:
    """What a thread or stream did, [(start, end, what)], and None unless it ran XLA's operations.

    what: (module, program, name) of an operation; int, a task of the thread pool's number, or ("start", number) where one was handed to
    it; None for the executor's own time.
    """
    frames, begun, device = [], [], False
    for event in line.events:
        name = event.name
        if name.startswith("$"):  # Python's
            continue
        stats = dict(event.stats)
        if "hlo_op" in stats or line.name == "XLA Ops":
            operation = stats.get("hlo_op") or re.match(r"%?([\w.\-]*)", name)[1]
            module = stats.get("hlo_module") or (min(names) if operation in known else "")
            frames.append((event.start_ns, event.end_ns, (module, stats.get("program_id"), operation)))
            device = True
        elif name == "ThreadpoolListener::StartRegion":
            begun.append((event.start_ns, stats.get("_c")))
        elif name == "ThreadpoolListener::StopRegion" and begun:
            start, number = begun.pop()
            frames.append((start, event.end_ns, number))
        elif name == "ThreadpoolListener::Record":
            frames.append((event.start_ns, event.start_ns, ("start", stats.get("_p"))))
        elif name.startswith("ThunkExecutor"):
            frames.append((event.start_ns, event.end_ns, None))
    return frames if device else []


def _own_times(lines) -> collections.Counter:
    """Nanoseconds of each operation: its own on its line, without those nested in it, and those of the tasks that it gave to others."""
    times, tasks, givers = collections.Counter(), collections.Counter(), {}
    for frames in lines:
        stack = []
        for start, end, what in sorted(frames, key=lambda f: (f[0], -f[1])):
            while stack and stack[-1][0] <= start:
                stack.pop()
            giver = stack[-1][1] if stack else None
            if isinstance(what, tuple) and what[0] == "start":
                givers[what[1]] = giver
                continue
            for place, sign in ((what, 1), (giver, -1)):
                (tasks if isinstance(place, int) else times)[place] += sign * (end - start)
            stack.append((end, what))
    for number, time in tasks.items():
        giver = number
        while isinstance(giver, int):  # a task may give tasks
            giver = givers.pop(giver, None) if giver not in givers else givers[giver]
        times[giver] += time
    del times[None]  # the executor's, and what was given outside the trace
    return times


def _meanings(programs: list[dict], times):
    """A function from (module, program, name) to (name, module, kind, op_name). Programs of a name: each is taken for the text that
    knows most of its operations."""
    ran = collections.defaultdict(set)
    for module, program, name in times:
        ran[module, program].add(name)
    chosen = {key: max(programs, key=lambda p: len(p.keys() & found)) for key, found in ran.items()}

    def meaning(operation):
        module, program, name = operation
        return (name, *chosen[module, program].get(name, ("other programs", "other", module)))

    return meaning


def operations(text: str) -> dict[str, tuple[str, str, str]]:
    """{name: (module, kind, op_name)} of every instruction of a compiled program's text."""
    module, _ = hlo.parse(text)
    return {i.name: (_module(module, i), _kind(module, i), _source(module, i)) for c in module.values() for i in c.values()}


def _source(module, i: hlo.Instruction) -> str:
    """Where in the program an instruction comes from: its own op_name, or one of what is fused in it."""
    found = re.search(r'op_name="([^"]*)"', i.attributes)
    if found:
        return found[1]
    inner = module.get(hlo._called(i, "calls"), {})
    return next(filter(None, (_source(module, j) for j in reversed(inner.values()))), "")


def _module(module, i: hlo.Instruction) -> str:
    source = _source(module, i)
    found = MODULE.search(source)
    name = found[1].lower() if found else "rest"
    if name == "optimizer":
        return name
    return f"{name} {'backward' if 'transpose(' in source or 'remat' in source else 'forward'}"


def _kind(module, i: hlo.Instruction) -> str:
    ops = _ops(module, i)
    if any(op.removesuffix("-start").removesuffix("-done") in hlo.COLLECTIVES for op in ops):
        return "collectives"
    if ops & {"dot", "convolution"} or (i.op == "custom-call" and re.search(r"gemm|matmul|dot|conv", i.attributes)):
        return "products"
    if i.op in ("while", "conditional", "call"):
        return "other"
    if ops <= MOVES:
        return "copies"
    if SOFTMAX.search(_source(module, i)):
        return "attention"
    return "reductions" if ops & {"reduce", "reduce-window"} else "elementwise"


def _ops(module, i: hlo.Instruction) -> set[str]:
    """The operations in an instruction, those fused in it included, without what costs nothing."""
    inner = module.get(hlo._called(i, "calls"), {}) if i.op == "fusion" or i.op.endswith("-start") else {}
    own = set() if i.op == "fusion" or i.op in hlo.FREE else {i.op}
    return own.union(*(_ops(module, j) for j in inner.values()))


def table(found: dict) -> str:
    """A summary for people: modules down, kinds across, in percent of the devices' time, and the dearest operations."""
    kinds = [kind for kind in KINDS if found["by_kind"][kind]]
    lines = [f"{found['seconds']:.2f} s of {found['devices']} cores or devices, % of their time",
             f"{'':<20}" + "".join(f"{kind:>12}" for kind in [*kinds, "all"])]
    for name, row in {**found["by_module"], "all": found["by_kind"], "idle": {"idle": found["idle"]}}.items():
        shares = [row.get(kind, 0) for kind in kinds] + [sum(row.values())]
        lines.append(f"{name:<20}" + "".join(f"{100 * share:>12.1f}" if share else " " * 12 for share in shares))
    lines.append("the dearest operations")
    for o in found["operations"]:
        source = re.sub(r"jit\(step\)/|closed_call/|while/body/", "", o["op_name"])
        lines.append(f"{100 * o['share']:5.1f} {o['kind']}: {source or o['name']}")
    return "\n".join(lines)


class Trace:
    """Traces the steps from span[0] to span[1] into a folder, and reports where their time went."""

    def __init__(self, folder, span: tuple[int, int]):
        self._folder, self._span, self._on = folder, span, False

    def at(self, step: int, pending, ending: bool, texts, say) -> None:
        """Called before each step; starts or stops the trace where it is due.

        pending: what the last step returned, which is waited for first. texts(first, step): the
        compiled texts of the steps from first to step. say(line) prints a line.
        """
        inside = self._span[0] <= step < self._span[1] and not ending
        if inside == self._on:
            return
        jax.block_until_ready(pending)
        if inside:
            jax.profiler.start_trace(str(self._folder))
            self._first = step
        else:
            jax.profiler.stop_trace()
            self._report(step, texts, say)
        self._on = inside

    def _report(self, step, texts, say):
        if jax.process_index():
            return
        try:
            found = report(self._folder, texts(self._first, step))
            say(f"steps {self._first}:{step}, traced in {self._folder}: {found}")
        except Exception as error:  # whatever the trace holds, the run goes on
            reason = (str(error).splitlines() or [""])[0][:200] or type(error).__name__
            say(f"the trace in {self._folder} could not be read, and there is no summary of it: "
                f"{reason}")
