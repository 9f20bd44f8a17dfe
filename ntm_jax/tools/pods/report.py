"""The figures of a compiled program on its chips, and their text."""

import dataclasses
import math
import resource
import sys

import jax

from ntm_jax.runtime import build
from ntm_jax.runtime.run import Run
from ntm_jax.tools.pods import hlo
from ntm_jax.tools.pods.chips import PodChip
from ntm_jax.tools.pods.hlo.arrays import short
from ntm_jax.tools.pods.memory import gib
from ntm_jax.tools.rates.benchmark import aligned


@dataclasses.dataclass
class Compiled:
    """What is known of a compiled program: memory in bytes per chip, times in seconds.

    work: NaN but for its products where the program does not fit. attention: splash, cudnn, plain.
    """

    work: hlo.Work
    memory: dict
    traced_flops: float
    seconds: float
    cpu_seconds: float
    attention: str
    arrays: list[dict]  # see hlo.arrays.largest


def figures(compiled: Compiled, run: Run, chip: PodChip) -> dict:
    """The report's entries on a compiled program."""
    work = compiled.work
    sent = {network: sum(v for (_, on), v in work.sent.items() if on == network)
            for network in ("ici", "dcn")}
    highest = work.of_precision("highest")
    roofline = {"compute": sum(v / chip.rate(p) for (_, p), v in work.products.items()),
                "memory": work.memory / chip.memory, "network": _network(sent, chip)}
    kernels = sum(times * max(memory / chip.memory, sum(v / chip.rate(p) for (_, p), v in products))
                  for (memory, products), times in work.kernels.items())
    finite = {name: value for name, value in roofline.items() if math.isfinite(value)}
    parameters = jax.tree.leaves(build.abstract_params(run.model, run.mesh))
    host_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    host_peak *= 1 if sys.platform == "darwin" else 1024  # macOS reports bytes, Linux KiB
    return {
        "attention": compiled.attention, "remat": run.config.model.remat,
        "parameters": sum(a.size for a in parameters),
        "fits": compiled.memory["peak"] <= compiled.memory["hbm"],
        "bytes_per_chip": compiled.memory, "largest_arrays": compiled.arrays,
        "flops_per_chip": work.flops, "flops_traced_per_chip": compiled.traced_flops,
        "highest_flops_per_chip": highest,
        "flops_by_precision_per_chip": {
            part: {p: v for (of, p), v in sorted(work.products.items()) if of == part}
            for part, _ in sorted(work.products)},
        "collective_bytes_per_chip": {
            k: sum(v for (kind, _), v in work.sent.items() if kind == k) for k in hlo.COLLECTIVES},
        "slice_network_bytes_per_chip": sent["ici"], "data_centre_bytes_per_chip": sent["dcn"],
        "overlapped_bytes_per_chip": sum(work.overlapped.values()),
        "memory_bytes_per_chip": work.memory, "roofline_seconds": roofline,
        "kernel_seconds": kernels,
        "highest_seconds": highest / chip.rate("highest"),
        "exposed_network_seconds": _network(
            {network: size - work.overlapped.get(network, 0) for network, size in sent.items()},
            chip),
        "bound_by": max(finite, key=lambda name: finite[name]) if finite else None,
        "unknown_loops": len(work.unknown), "unknown_loop_places": sorted(set(work.unknown)),
        "compile_seconds": compiled.seconds, "compile_cpu_seconds": compiled.cpu_seconds,
        "host_peak_bytes": host_peak}


def _network(sent: dict[str, float], chip: PodChip) -> float:
    return sent["ici"] / chip.ici + sent["dcn"] / chip.dcn


def rates(report: dict, examples: int, tokens: int, chip: PodChip) -> dict:
    """Upper bounds of a step's rates: at_roofline and in_sequence, as the docstring of compile.py.

    examples: of a step of all devices, each of `tokens` tokens. mfu: the share of the chip's
    bfloat16 peak that the model's FLOPs reach, without recomputation.
    """
    slowest = max((v for v in report["roofline_seconds"].values() if math.isfinite(v)),
                  default=math.nan) or math.nan
    bounds = {"at_roofline": slowest, "in_sequence": max(report["kernel_seconds"], slowest)}
    return {name: {"seconds": seconds, "examples_per_second": examples / seconds,
                   "tokens_per_second": examples * tokens / seconds,
                   "mfu": report["model_flops_per_chip"] / (seconds * chip.flops)}
            for name, seconds in bounds.items()}


def finite(value):
    """The value with NaN and infinity replaced by None, since JSON has neither."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(report: dict) -> str:
    """The text of a report."""
    unit, advice = report["unit"], f": {report['advice']}" if "advice" in report else ""
    rows = _program_rows(report) | _memory_rows(report, unit) | _work_rows(report, unit) | {
        "note": f"the length of {report['unknown_loops']} loops is unknown; memory and network "
                "count one iteration, and so do FLOPs unless the trace shows the length: "
                f"{'; '.join(report['unknown_loop_places'])}" if report["unknown_loops"] else "",
        "compiled in": f"{report['compile_seconds']:.0f} s",
        "fits": "yes" if report["fits"] else f"no{advice}",
    }
    return "\n".join(f"{name:<14} {value}" for name, value in rows.items() if value)


def _program_rows(report: dict) -> dict[str, str]:
    unit = report["unit"]
    chips = f"{report['devices']} {unit}s"
    if report["slices"] > 1:
        chips += f" in {report['slices']} {'NVLink domains' if unit == 'GPU' else 'slices'}"
    return {
        "topology": f"{report['topology']}, {chips}",
        "mesh": " x ".join(f"{axis} {size}" for axis, size in report["mesh"].items()),
        "program": f"{report['program']}, {report['attention']} attention, remat "
                   f"{report['remat']}, global batch {report['batch_size']}",
        "parameters": f"{report['parameters']:,}"}


def _memory_rows(report: dict, unit: str) -> dict[str, str]:
    memory = report["bytes_per_chip"]
    rows = {f"memory a {unit}": f"{gib(memory['peak'])} of {gib(memory['hbm'])}: arguments "
                                f"{gib(memory['arguments'])}, temporaries "
                                f"{gib(memory['temporaries'])}"}
    arrays = [f"{amount(array['bytes'], 'B')} {array['shape']} {short(array['place'])}"
              for array in report["largest_arrays"] if not array["argument"]]
    return rows | ({"largest arrays": ("\n" + " " * 15).join(arrays)} if arrays else {})


def _sent(report: dict, unit: str) -> str:
    near, far = report["networks"]
    if report["overlapped_bytes_per_chip"] is None:
        return "unknown"
    sent = ", ".join(f"{kind} {amount(v, 'B')}"
                     for kind, v in report["collective_bytes_per_chip"].items() if v) or "nothing"
    if report["data_centre_bytes_per_chip"]:
        sent += (f"; {amount(report['slice_network_bytes_per_chip'], 'B')} {near}, "
                 f"{amount(report['data_centre_bytes_per_chip'], 'B')} {far}")
    if sent != "nothing":
        overlapped = amount(report["overlapped_bytes_per_chip"], "B")
        sent += f"; {overlapped} while the {unit} does other work"
    return sent


def _work_rows(report: dict, unit: str) -> dict[str, str]:
    counted, traced, model = (
        amount(report[key], "")
        for key in ("flops_per_chip", "flops_traced_per_chip", "model_flops_per_chip"))
    bound = report["bound_by"]
    return {
        f"FLOPs a {unit}": f"{counted}; as traced {traced}, of the model {model}",
        f"sent a {unit}": _sent(report, unit),
        "at its peak": ", ".join(f"{name} {amount(v, 's')}"
                                 for name, v in report["roofline_seconds"].items())
                       + (f": bound by {bound}" if bound else ""),
        "all at once": _at_most(report["at_roofline"]),
        "in sequence": _at_most(report["in_sequence"])}


def _at_most(rates: dict) -> str:
    if rates["mfu"] is None:
        return ""
    return (f"{amount(rates['seconds'], 's')}; at most "
            f"{amount(rates['examples_per_second'], '')} examples/s, "
            f"{amount(rates['tokens_per_second'], '')} tokens/s, MFU {rates['mfu']:.0%}")


def amount(value, unit: str) -> str:
    """A number with an SI prefix: 1.39e14 -> 139 T; "unknown" for None."""
    if not value:
        return "unknown" if value is None else f"0 {unit}".strip()
    power = min(max(math.floor(math.log10(value) / 3), -4), 6)
    prefix = ("p", "n", "µ", "m", "", "k", "M", "G", "T", "P", "E")[power + 4]
    return f"{value / 1000**power:.3g} {prefix}{unit}".strip()


def comparison(reports: list[dict]) -> str:
    """The text of the reports of compile.vary: memory, work and time, a line each."""
    unit = reports[0]["unit"]
    lines = [("", f"GiB a {unit}", "temporaries", "FLOPs", "recomputed", "all at once", "MFU",
              "in sequence", "MFU", "fits")]
    for found in reports:
        memory = found["bytes_per_chip"]
        bounds = [(amount(bound["seconds"], "s"),
                   "" if bound["mfu"] is None else f"{bound['mfu']:.0%}")
                  for bound in (found["at_roofline"], found["in_sequence"])]
        extra = found["flops_traced_per_chip"] / found["model_flops_per_chip"] - 1
        lines.append((
            found["name"], gib(memory["peak"]).removesuffix(" GiB"),
            gib(memory["temporaries"]).removesuffix(" GiB"), amount(found["flops_per_chip"], ""),
            f"{extra:.0%}", *bounds[0], *bounds[1], "yes" if found["fits"] else "no"))
    return aligned(lines)
