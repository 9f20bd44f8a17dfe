"""Reports which operations the traced steps spend their time on.

Reads jax.profiler's trace, and the compiled programs' text for what each operation is. Shares are
of the devices' time from the first operation of the traced steps to the last; time on no operation
is "idle". On a CPU, the devices are XLA's worker threads, one per core. Accelerators' operations
are found by the stat hlo_op, which streams of GPUs have, or by the event's name on a TPU's line
"XLA Ops"; this was tested only on traces of CPUs.
"""

import collections
import re

import jax
from etils import epath

from ntm_jax import files
from ntm_jax.analysis import hlo
from ntm_jax.analysis.hlo.text import Instruction, called, parse, search
from ntm_jax.errors import first_line

KINDS = ("products", "attention", "elementwise", "reductions", "copies", "collectives", "other")
MODULES = ("transporter", "predictor", "optimizer", "rest", "other programs")
MOVES = {"copy", "transpose", "concatenate", "slice", "pad", "reshape", "broadcast", "reverse",
         "dynamic-slice", "dynamic-update-slice", "gather", "copy-start", "copy-done"}
MODULE = re.compile(r"[/(](transporter|predictor|optimizer)\b", re.IGNORECASE)
SOFTMAX = re.compile(r"/attention/(?!query|key|value|out)")  # not projections and their norms


def report(folder, texts: list[str]) -> str:
    """The table of the newest trace under a folder; also writes folder/summary.json.

    texts: of the compiled programs that the trace recorded. Raises FileNotFoundError without a
    trace, ValueError if it holds no operation of the programs.
    """
    traces = sorted(epath.Path(folder).glob("plugins/profile/*/*.xplane.pb"),
                    key=lambda path: path.stat().mtime)
    if not traces:
        raise FileNotFoundError("the folder holds no trace")
    trace = jax.profiler.ProfileData.from_serialized_xspace(traces[-1].read_bytes())
    found = summarize(trace, texts)
    files.write_json(epath.Path(folder) / "summary.json", found)
    return table(found)


def summarize(trace, texts: list[str]) -> dict:
    """The shares of the devices' time in a jax.profiler.ProfileData, as JSON values.

    Returns seconds, devices, and shares, which sum to 1: `idle`, `by_kind`, `by_module`
    {"transporter forward": {kind: share}}, and the ten most expensive `operations`. Raises
    ValueError if the trace holds no operation of the programs.
    """
    programs = [operations(text) for text in texts]
    names = {search(r"^HloModule ([\w.\-]+)", text)[1] for text in texts}
    times, span, devices = _measure(trace, set().union(*programs), names)
    if not times:
        raise ValueError("it holds no operation of the training step")
    meanings = _meanings(programs, times)
    # Threads besides the workers start programs, and run a few small operations themselves.
    total = max(devices * span, sum(times.values()))
    by_module = collections.defaultdict(lambda: collections.defaultdict(float))
    for operation, time in times.items():
        _, module, kind, _ = meanings(operation)
        by_module[module][kind] += time / total
    by_kind = {kind: sum(kinds.get(kind, 0) for kinds in by_module.values()) for kind in KINDS}
    keys = "name", "module", "kind", "op_name"
    expensive = [dict(zip(keys, meanings(operation), strict=True), share=time / total)
                 for operation, time in times.most_common(10)]
    return {"seconds": span / 1e9, "devices": devices, "idle": 1 - sum(by_kind.values()),
            "by_kind": by_kind,
            "by_module": {name: dict(by_module[name]) for name in sorted(by_module, key=_order)},
            "operations": expensive}


def _measure(trace, program_operations: set, names: set) -> tuple[collections.Counter, float, int]:
    """({operation: nanoseconds}, nanoseconds from first to last, devices) of the programs' planes.

    program_operations: the programs' operations. names: the programs' names.
    """
    times, begin, end = collections.Counter(), float("inf"), 0.0
    workers = planes = 0
    for plane in trace.planes:
        # A line's name ends in its thread's number.
        lines = [(line.name, frames) for line in plane.lines
                 if (frames := _frames(line, program_operations, names))]
        spans = [frame for _, frames in lines for frame in frames
                 if isinstance(frame[2], tuple) and frame[2][0] in names]
        if not spans:
            continue
        begin = min(begin, *(frame[0] for frame in spans))
        end = max(end, *(frame[1] for frame in spans))
        workers, planes = workers + sum("XLAEigen" in name for name, _ in lines), planes + 1
        times.update(_own_times(frames for _, frames in lines))
    return times, end - begin, workers or planes


def _order(module: str):
    """The sort key of a module: the order in which a step runs them."""
    place = next(i for i, name in enumerate(MODULES) if module.startswith(name))
    return place, "backward" in module


def _frames(line, program_operations: set, names: set) -> list:
    """[(start, end, content)] of a thread or stream, in ns; [] if it ran no operations of XLA.

    content: (module, program, name) of an operation; an int, the number of a thread pool's task;
    ("start", number) at the moment when a task was started; None for the executor's own time.
    """
    frames, begun, ran_operations = [], [], False
    for event in line.events:
        name = event.name
        if name.startswith("$"):  # Python's
            continue
        stats = dict(event.stats)
        if "hlo_op" in stats or line.name == "XLA Ops":
            operation = stats.get("hlo_op") or search(r"^%?([\w.\-]*)", name)[1]
            own = min(names) if operation in program_operations else ""
            module = stats.get("hlo_module") or own
            content = (module, stats.get("program_id"), operation)
            frames.append((event.start_ns, event.end_ns, content))
            ran_operations = True
        elif name == "ThreadpoolListener::StartRegion":
            begun.append((event.start_ns, stats.get("_c")))
        elif name == "ThreadpoolListener::StopRegion" and begun:
            start, number = begun.pop()
            frames.append((start, event.end_ns, number))
        elif name == "ThreadpoolListener::Record":
            frames.append((event.start_ns, event.start_ns, ("start", stats.get("_p"))))
        elif name.startswith("ThunkExecutor"):
            frames.append((event.start_ns, event.end_ns, None))
    return frames if ran_operations else []


def _own_times(lines) -> collections.Counter:
    """{operation: nanoseconds}: its own time and that of the tasks it started on other threads.

    An operation's own time excludes those nested in it on its line.
    """
    times, tasks, starters = collections.Counter(), collections.Counter(), {}
    for frames in lines:
        stack = []
        for start, end, content in sorted(frames, key=lambda frame: (frame[0], -frame[1])):
            while stack and stack[-1][0] <= start:
                stack.pop()
            enclosing = stack[-1][1] if stack else None
            if isinstance(content, tuple) and content[0] == "start":
                starters[content[1]] = enclosing
                continue
            for place, sign in ((content, 1), (enclosing, -1)):
                (tasks if isinstance(place, int) else times)[place] += sign * (end - start)
            stack.append((end, content))
    for number, time in tasks.items():
        starter = number
        while isinstance(starter, int):  # a task may start tasks
            starter = starters.pop(starter, None) if starter not in starters else starters[starter]
        times[starter] += time
    del times[None]  # the executor's own time, and tasks started before the trace
    return times


def _meanings(programs: list[dict], times):
    """A function from (module, program, name) to (name, module, kind, op_name).

    Several programs may share a name: each is matched with the text that has most of its
    operations.
    """
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
    module, _ = parse(text)
    return {i.name: (_module(module, i), _kind(module, computation, i), _source(module, i))
            for computation in module.values() for i in computation.values()}


def _source(module, i: Instruction) -> str:
    """The op_name of an instruction, its place in the program, or of one fused in it."""
    if i.op_name:
        return i.op_name
    inner = module.get(called(i, "calls"), {})
    return next(filter(None, (_source(module, j) for j in reversed(inner.values()))), "")


def _module(module, i: Instruction) -> str:
    source = _source(module, i)
    found = MODULE.search(source)
    name = found[1].lower() if found else "rest"
    if name == "optimizer":
        return name
    return f"{name} {'backward' if 'transpose(' in source or 'remat' in source else 'forward'}"


def _kind(module, computation, i: Instruction) -> str:
    if i.op.endswith("-done"):  # of the kind of its start
        i = computation.get(i.operands[0], i)
    ops = _ops(module, i)
    target = called(i, "custom_call_target") or ""
    if ops & {"dot", "convolution"} or re.search(r"gemm|matmul|dot|conv", target):
        return "products"
    if any(op.removesuffix("-start").removesuffix("-done") in hlo.COLLECTIVES for op in ops):
        return "collectives"
    if i.op in ("while", "conditional", "call"):
        return "other"
    if ops <= MOVES:
        return "copies"
    if SOFTMAX.search(_source(module, i)):
        return "attention"
    return "reductions" if ops & {"reduce", "reduce-window"} else "elementwise"


def _ops(module, i: Instruction) -> set[str]:
    """The operations in an instruction and in what it fuses, without those that cost nothing."""
    calls = i.op == "fusion" or i.op.endswith("-start")
    inner = module.get(called(i, "calls") or called(i, "to_apply"), {}) if calls else {}
    own = set() if i.op == "fusion" or i.op in hlo.FREE else {i.op}
    return own.union(*(_ops(module, j) for j in inner.values()))


def table(found: dict) -> str:
    """The text of a summary: shares in percent by module and kind, and expensive operations."""
    kinds = [kind for kind in KINDS if found["by_kind"][kind]]
    lines = [f"{found['seconds']:.2f} s of {found['devices']} cores or devices, % of their time",
             f"{'':<20}" + "".join(f"{kind:>12}" for kind in [*kinds, "all"])]
    rows = {**found["by_module"], "all": found["by_kind"], "idle": {"idle": found["idle"]}}
    for name, row in rows.items():
        shares = [row.get(kind, 0) for kind in kinds] + [sum(row.values())]
        lines.append(f"{name:<20}" + "".join(
            f"{100 * share:>12.1f}" if share else " " * 12 for share in shares))
    lines.append("the dearest operations")
    for o in found["operations"]:
        source = re.sub(r"jit\(step\)/|closed_call/|while/body/", "", o["op_name"])
        lines.append(f"{100 * o['share']:5.1f} {o['kind']}: {source or o['name']}")
    return "\n".join(lines)


class Trace:
    """Traces the steps span[0] to span[1] into a folder, and reports where their time went."""

    def __init__(self, folder, span: tuple[int, int]):
        self._folder, self._span, self._on = folder, span, False

    def at(self, step: int, pending, ending: bool, texts, message) -> None:
        """Starts or stops the trace if it is due; to be called before each step.

        pending: arrays of the last step, which this waits for first. ending: whether the run ends
        here. texts(first, step): the compiled texts of the steps from first to step. message(line):
        prints a line.
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
            self._report(step, texts, message)
        self._on = inside

    def _report(self, step, texts, message):
        if jax.process_index():
            return
        try:
            found = report(self._folder, texts(self._first, step))
            message(f"steps {self._first}:{step}, traced in {self._folder}: {found}")
        except Exception as error:  # an unreadable trace must not end the run
            message(f"the trace in {self._folder} could not be read, so it has no summary: "
                    f"{first_line(error)}")
