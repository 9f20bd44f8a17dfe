"""Compiles a run's program for absent machines, and reports whether it fits and what limits it.

The functions are those of training and sampling, lowered on abstract arrays. Post-training has two:
`rollout` draws and compares the samples of a batch, and `train` is one update on them. The report
has, for one chip and one step (of a TPU with two cores a chip, for one core):

- flops: matrix products of the compiled program with every iteration of its loops (hlo.py),
  including recomputation and replicated work, plus those inside Pallas kernels, which the compiled
  text does not show (flops.py, divided by the chips).
- flops_traced: all products of the traced program, divided by the chips. Where flops is larger,
  chips repeat each other's work.
- model_flops: products of the same step with plain attention and no recomputation, divided by the
  chips.
- bytes: memory that the compiler reserves; peak = arguments + outputs that are not donated
  arguments + temporaries + code. Arguments include what post-training keeps on the devices besides:
  the reference during an update; the optimizer's state and the EMA during rollouts.
- collective bytes: bytes that a chip sends.
- roofline seconds: the time that each resource takes at its peak rate, as if the others were free.
"""

import dataclasses
import math
import resource
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp

from ntm_jax.analysis import hlo
from ntm_jax.analysis.memory import advice, bytes_per_chip, gib, out_of_memory
from ntm_jax.core.layers import Text, Vector
from ntm_jax.core.model import exact
from ntm_jax.data import pipeline, sources
from ntm_jax.data.sources import Source
from ntm_jax.errors import UserError, first_line
from ntm_jax.runtime import build, chips, flops, sharding
from ntm_jax.runtime.config import Config
from ntm_jax.runtime.run import Run, untrained
from ntm_jax.sampling import generate
from ntm_jax.training import frozen, objectives, state
from ntm_jax.training.reward import rollouts
from ntm_jax.training.step import check_batch, make_step


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function and the abstract arguments that a run would call it with."""

    function: Any
    arguments: tuple
    options: dict
    resident: Any = ()  # abstract arrays that the devices hold besides the arguments

    def trace(self):
        return self.function.trace(*self.arguments, **self.options)


def open_data(config: Config) -> Source:
    """The source that gives the records' shape: config.data.mock if set, else the data.

    Raises UserError if it cannot be opened.
    """
    if config.data.mock:
        return sources.open_source(config.data.mock, config.data.split, config.data.image_size)
    return config.data.open(config.data.split)


def train_program(run: Run, source: Source) -> Program:
    """The training step with the loop's arguments.

    Raises UserError for an objective that needs a teacher, or a batch that does not divide over the
    mesh.
    """
    config, mesh = run.config, run.mesh
    if objectives.checked(config).needs_teacher:
        raise UserError(f"config.train.objective={config.train.objective} needs its teacher's "
                        "model, which compilation does not load: compile another objective")
    batch, resident = _batch(run, source), ()
    use = objectives.find(config.train.objective).rollout_use
    if use:
        batch |= rollouts.abstract(run, use)
        resident = frozen.abstract_reference(run)
    options: dict = {"steps": max(config.trajectory.steps)}
    if config.train.align_weight:
        options["reference"] = frozen.abstract_reference(run)
    if len({device.process_index for device in mesh.devices.flat}) > 1:
        options["batch_complete"] = jax.ShapeDtypeStruct(
            (mesh.size,), jnp.bool_, sharding=sharding.by_device(mesh))
    return Program(make_step(run), (state.abstract(run), batch), options, resident)


def rollout_program(run: Run, source: Source) -> Program:
    """The samples of a batch and their comparison with the reference, in a cycle that is logged.

    Raises UserError for an objective that does not learn from rollouts, or a batch that does not
    divide over the mesh.
    """
    config = run.config
    use = objectives.checked(config).rollout_use
    if not use:
        raise UserError(f"--program=rollout: config.train.objective={config.train.objective} does "
                        "not learn from samples of the model; compile train, or post-train, such "
                        "as with --config.train.objective=policy_gradient")
    current, settings = state.abstract(run), config.reward
    arguments = current.params, frozen.abstract_reference(run), _abstract_key(), _batch(run, source)
    options = {"sampler": rollouts.sampler_of(run),
               "names": rollouts.compared(use, settings, logged=True),
               "recorded_pairs": not settings.name}
    return Program(_draw, arguments, options, (current.opt_state, current.ema))


# The devices hold what the program does not read, such as the reference's transporter.
_draw = jax.jit(rollouts.draw, static_argnames=("sampler", "names", "recorded_pairs"),
                keep_unused=True)


def _batch(run: Run, source: Source) -> dict:
    """The abstract arrays of a training batch. Raises UserError if it does not divide."""
    check_batch(run.config, run.mesh)
    one = next(pipeline.evaluation_batches(source, run.config.data.patch_size, 1, 0, 1))
    batch = {key: _abstract((run.config.data.batch_size, *value.shape[1:]), value.dtype, run.mesh)
             for key, value in one.items() if key != "mask"}
    if objectives.find(run.config.train.objective).rollout_use and not run.config.reward.name:
        batch[rollouts.REJECTED] = batch["x"]  # made-up data have no pairs
    return batch


def sample_program(run: Run, source: Source) -> Program:
    """The sampler with a batch of config.sample.num images, rounded up to equal shards."""
    shards, mesh, model = sharding.batch_shards(run.mesh), run.mesh, run.model
    size = -(-run.config.sample.num // shards) * shards
    y = _abstract((size,), jnp.int32, mesh)
    if model.config.text_width:
        text = (size, source.text_tokens)
        y = Text(_abstract((*text, source.text_width), jnp.float16, mesh),
                 _abstract(text, jnp.bool_, mesh))
    if model.config.condition_width:
        y = Vector(_abstract((size, source.condition_width), jnp.float32, mesh),
                   _abstract((size,), jnp.bool_, mesh))
    key = _abstract_key()
    params, index = build.abstract_params(model, mesh), _abstract((size,), jnp.int32, mesh)
    sampler = generate.Sampler(exact(model), run.schedule, run.config.sample.options, mesh)
    return Program(generate.generate_tokens, (params, key, index, y), {"sampler": sampler})


PROGRAMS = {"train": train_program, "sample": sample_program, "rollout": rollout_program}


def _abstract_key():
    return jax.eval_shape(lambda: jax.random.key(0))


def _abstract(shape, dtype, mesh):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch_sharding(mesh))


@dataclasses.dataclass
class _Compiled:
    """Figures of a compiled program: memory in bytes per chip, times in seconds."""

    work: hlo.Work
    memory: dict
    fits: bool
    traced_flops: float
    seconds: float
    cpu_seconds: float
    succeeded: bool


def compile_for(config: Config, topology: str, program: str = "train") -> dict:
    """The report of a program compiled for a topology, as JSON values; see the module's docstring.

    program: a key of PROGRAMS. topology: see chips.find. Raises UserError if the configuration does
    not fit the topology or its data.
    """
    found = chips.find(topology, config.mesh.slices)
    with found.tracing():
        report = {"topology": topology} | _report(config, found, program)
    return {key: _finite(value) for key, value in report.items()}


def _report(config: Config, topology: chips.Topology, program: str) -> dict:
    mesh, source = _mesh(config, topology.devices), open_data(config)
    spec = pipeline.spec(source, config.data.patch_size)
    run = untrained(config, spec, mesh)
    compiled = _compile(PROGRAMS[program](run, source), run, topology)
    plain = PROGRAMS[program](dataclasses.replace(run, model=build.plain(run.model)), source)
    with sharding.use(mesh):
        traced = plain.trace()
        model_flops = flops.of_jaxpr(traced.jaxpr.jaxpr) / mesh.size
    chip = topology.chip
    report = {"chips": mesh.size // chip.cores, "devices": mesh.size, "unit": chip.unit,
              "networks": [chip.near, chip.far], "mesh": dict(mesh.shape),
              "slices": config.mesh.slices, "program": program}
    report |= _figures(compiled, run, chip) | {"model_flops_per_chip": model_flops}
    if not compiled.fits and program == "train":
        objective = objectives.find(config.train.objective)
        levels = max(config.trajectory.steps) if objective.whole_trajectories else 1
        levels *= 1 + rollouts.samples_of(config) if objective.rollout_use else 1
        report["advice"] = advice(run, levels, report["bytes_per_chip"])
    return report


def _compile(program: Program, run: Run, topology: chips.Topology) -> _Compiled:
    mesh, chip = run.mesh, topology.chip
    inputs = program.arguments, program.options.get("reference")
    arguments, resident = (sum(bytes_per_chip(a) for a in jax.tree.leaves(tree))
                           for tree in (inputs, program.resident))
    with sharding.use(mesh):
        traced = program.trace()
        jaxpr = traced.jaxpr.jaxpr
        kernels, total = (flops.of_jaxpr(jaxpr, only) / mesh.size for only in (True, False))
        lowered = traced.lower()
        begin, cpu = time.perf_counter(), time.process_time()
        try:
            compiled, memory = lowered.compile(topology.compiler_options), {}
        except jax.errors.JaxRuntimeError as error:
            compiled, memory = None, out_of_memory(error, arguments)
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    if compiled is None:
        work = hlo.Work(flops=math.nan, memory=math.nan)
        memory = {"arguments": arguments + resident} | memory
        memory["peak"] += resident
        return _Compiled(work, memory, False, total, seconds, cpu, False)
    work = hlo.count(_text(compiled), mesh.size, topology.domains)
    work.flops += kernels
    if work.unknown:  # loops of unknown length counted as one iteration
        work.flops = max(work.flops, total)
    m = compiled.memory_analysis()
    arguments = m.argument_size_in_bytes + resident
    peak = (arguments + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes
            + m.generated_code_size_in_bytes)
    memory = dict(arguments=arguments, temporaries=m.temp_size_in_bytes, peak=peak,
                  hbm=chip.hbm * 2**30)
    return _Compiled(work, memory, peak <= memory["hbm"], total, seconds, cpu, True)


def _text(compiled) -> str:
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"jax {jax.__version__} cannot read the compiled program "
                        f"({first_line(error)}): install the compiler of jax's version with pip "
                        "install -e '.[tpu]'") from None


def _figures(compiled: _Compiled, run: Run, chip: chips.Chip) -> dict:
    """The report's entries on a compiled program."""
    work, config = compiled.work, run.config
    sent = {network: sum(v for (_, on), v in work.sent.items() if on == network)
            for network in ("ici", "dcn")}
    computed = work.flops if compiled.succeeded else compiled.traced_flops
    network = sent["ici"] / chip.ici + sent["dcn"] / chip.dcn if compiled.succeeded else math.nan
    roofline = {"compute": computed / chip.flops, "memory": work.memory / chip.memory,
                "network": network}
    finite = {name: value for name, value in roofline.items() if math.isfinite(value)}
    parameters = jax.tree.leaves(build.abstract_params(run.model, run.mesh))
    host_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    host_peak *= 1 if sys.platform == "darwin" else 1024  # macOS reports bytes, Linux KiB
    return {
        "attention": getattr(run.model.attention, "kind", "plain"), "remat": config.model.remat,
        "batch_size": config.data.batch_size,
        "parameters": sum(a.size for a in parameters),
        "fits": compiled.fits, "bytes_per_chip": compiled.memory,
        "flops_per_chip": computed, "flops_traced_per_chip": compiled.traced_flops,
        "collective_bytes_per_chip": {
            k: sum(v for (kind, _), v in work.sent.items() if kind == k) for k in hlo.COLLECTIVES},
        "slice_network_bytes_per_chip": sent["ici"], "data_centre_bytes_per_chip": sent["dcn"],
        "memory_bytes_per_chip": work.memory, "roofline_seconds": roofline,
        "bound_by": max(finite, key=lambda name: finite[name]) if finite else None,
        "unknown_loops": len(work.unknown), "unknown_loop_places": sorted(set(work.unknown)),
        "compile_seconds": compiled.seconds, "compile_cpu_seconds": compiled.cpu_seconds,
        "host_peak_bytes": host_peak}


def _mesh(config: Config, devices):
    try:
        return sharding.make_mesh(config.mesh, devices)
    except NotImplementedError:
        raise UserError("config.mesh does not fit the topology's torus: make each axis a product "
                        "of the torus's sides") from None


def _finite(value):
    """The value with NaN and infinity replaced by None, since JSON has neither."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(report: dict) -> str:
    """The text of a report."""
    memory, seconds = report["bytes_per_chip"], report["roofline_seconds"]
    sent = ", ".join(f"{kind} {_amount(v, 'B')}"
                     for kind, v in report["collective_bytes_per_chip"].items() if v) or "nothing"
    unit, (near, far) = report["unit"], report["networks"]
    if report["data_centre_bytes_per_chip"]:
        sent += (f"; {_amount(report['slice_network_bytes_per_chip'], 'B')} {near}, "
                 f"{_amount(report['data_centre_bytes_per_chip'], 'B')} {far}")
    chips = {"core": f"{report['chips']} chips, {report['devices']} cores",
             "GPU": f"{report['chips']} GPUs"}.get(unit, f"{report['chips']} chips")
    if report["slices"] > 1:
        chips += f" in {report['slices']} {'NVLink domains' if unit == 'GPU' else 'slices'}"
    counted, traced, model = (
        _amount(report[key], "")
        for key in ("flops_per_chip", "flops_traced_per_chip", "model_flops_per_chip"))
    advice = f": {report['advice']}" if "advice" in report else ""
    rows = {
        "topology": f"{report['topology']}, {chips}",
        "mesh": " x ".join(f"{axis} {size}" for axis, size in report["mesh"].items()),
        "program": f"{report['program']}, {report['attention']} attention, remat "
                   f"{report['remat']}, global batch {report['batch_size']}",
        "parameters": f"{report['parameters']:,}",
        f"memory a {unit}": f"{gib(memory['peak'])} of {gib(memory['hbm'])}: arguments "
                         f"{gib(memory['arguments'])}, temporaries {gib(memory['temporaries'])}",
        f"FLOPs a {unit}": f"{counted}; as traced {traced}, of the model {model}",
        f"sent a {unit}": sent,
        "at its peak": ", ".join(f"{name} {_amount(v, 's')}" for name, v in seconds.items())
                       + (f": bound by {report['bound_by']}" if report["bound_by"] else ""),
        "note": f"the length of {report['unknown_loops']} loops is unknown, and memory and network "
                f"count one iteration: {'; '.join(report['unknown_loop_places'])}"
                if report["unknown_loops"] else "",
        "compiled in": f"{report['compile_seconds']:.0f} s, {report['compile_cpu_seconds']:.0f} s "
                       f"of CPU, {gib(report['host_peak_bytes'])} of this host's memory",
        "fits": "yes" if report["fits"] else f"no{advice}",
    }
    return "\n".join(f"{name:<14} {value}" for name, value in rows.items() if value)


def _amount(value, unit: str) -> str:
    """A number with an SI prefix: 1.39e14 -> 139 T; "unknown" for None."""
    if not value:
        return "unknown" if value is None else f"0 {unit}".strip()
    power = math.floor(math.log10(value) / 3)
    prefix = {-2: "µ", -1: "m", 0: "", 1: "k", 2: "M", 3: "G", 4: "T", 5: "P"}[power]
    return f"{value / 1000**power:.3g} {prefix}{unit}".strip()
