"""Compiles a run's program for absent machines, and reports whether it fits and what limits it.

The functions are those of training and sampling, lowered on abstract arrays. Post-training has two:
`rollout` draws and compares the samples of a batch, and `train` is one update on them. The report
has, for one chip and one step (of a TPU with two cores a chip, for one core):

- flops: matrix products of the compiled program with every iteration of its loops (hlo/),
  including recomputation and replicated work, plus those that its text does not show: inside Pallas
  kernels, and as many more as flops_traced has; see _work.
- flops_traced: all products of the traced program (flops.py), divided by the chips. Where flops is
  larger, chips repeat each other's work.
- model_flops: products of the same step with plain attention and no recomputation, divided by the
  chips.
- bytes: memory that the compiler reserves; peak = arguments + outputs that are not donated
  arguments + temporaries + code. Arguments include what post-training keeps on the devices besides:
  the reference during an update; the optimizer's state and the EMA during rollouts; the samples of
  another batch during both with config.reward.prefetch.
- collective bytes: bytes that a chip sends.
- roofline seconds: the time that each resource takes at its peak rate, as if the others were free.
  Products of float32 numbers at precision `highest` take the rate of that precision: on a TPU a
  sixth of bfloat16's, on a GPU that of its float32 units.
- at_roofline: rates of a step that takes as long as the slowest resource, upper bounds that hold
  even if all kernels overlap.
- in_sequence: rates of a step whose kernels run one after another, each as long as the slower of
  its products and its memory traffic, and whose collectives and asynchronous copies cost nothing;
  or of at_roofline, if slower. Of Pallas kernels only memory traffic counts.
"""

import dataclasses
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from ntm_jax import files
from ntm_jax.core.model import full_precision
from ntm_jax.data import pipeline, sources
from ntm_jax.data.sources import Source
from ntm_jax.errors import UserError
from ntm_jax.evaluation import scoring
from ntm_jax.runtime import autoencode, build, flops, sharding
from ntm_jax.runtime.config import Config
from ntm_jax.runtime.run import Run, abstract_pixel_params, untrained
from ntm_jax.sampling import generate
from ntm_jax.tools.pods import hlo, report
from ntm_jax.tools.pods.hlo.arrays import largest
from ntm_jax.tools.pods.memory import advice, bytes_per_chip, out_of_memory
from ntm_jax.tools.pods.report import Compiled
from ntm_jax.tools.pods.topology import Topology, find
from ntm_jax.tools.rates import benchmark
from ntm_jax.training import objectives, reference_model, state
from ntm_jax.training.step import check_batch, make_step


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function and the abstract arguments that a run would call it with."""

    function: Any
    arguments: tuple
    options: dict
    examples: int  # of all devices: records, or images
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

    Raises UserError for a batch that does not divide over the mesh.
    """
    config, mesh = run.config, run.mesh
    batch, resident = _batch(run, source), ()
    objective, rollouts = objectives.find(config.train.objective), _rollouts(config)
    if rollouts:
        batch |= rollouts.abstract(run)
        resident = reference_model.abstract_reference(run), rollouts.abstract_ahead(run)
    options: dict = {"steps": max(config.trajectory.steps), "fixed": abstract_pixel_params(run)}
    if config.train.align_weight:
        options["reference"] = reference_model.abstract_reference(run)
    if len({device.process_index for device in mesh.devices.flat}) > 1:
        options["batch_complete"] = jax.ShapeDtypeStruct(
            (mesh.size,), jnp.bool_, sharding=sharding.by_device(mesh))
    arguments = state.abstract(run), batch
    return Program(
        make_step(run, objective), arguments, options, config.data.batch_size, resident)


def rollout_program(run: Run, source: Source) -> Program:
    """The samples of a batch and their comparison with the reference, in a cycle that is logged.

    Raises UserError for an objective that does not learn from rollouts, or a batch that does not
    divide over the mesh.
    """
    config, rollouts = run.config, _rollouts(run.config)
    if not rollouts:
        raise UserError(f"--program=rollout: config.train.objective={config.train.objective} does "
                        "not learn from samples of the model; compile train, or post-train, such "
                        "as with --config.train.objective=policy_gradient")
    current = state.abstract(run)
    arguments = (current.params, reference_model.abstract_reference(run), _abstract_key(),
                 _batch(run, source))
    resident = current.opt_state, current.ema, rollouts.abstract_ahead(run)
    function, options, examples = rollouts.drawing(run)
    return Program(function, arguments, options, examples, resident)


def _rollouts(config: Config) -> Any:
    """The RolloutSpec of projects/reward by which a configuration post-trains; None if it does not.

    The project is not imported for other objectives, and a copy of the package may lack it.
    """
    extend = objectives.find(config.train.objective).extend
    return extend if hasattr(extend, "drawing") else None


def _batch(run: Run, source: Source) -> dict:
    """The abstract arrays of a training batch. Raises UserError if it does not divide."""
    check_batch(run.config, run.mesh)
    batch = _records(run, source, run.config.data.batch_size)
    if _rollouts(run.config) and not run.config.reward.name:
        batch["rejected"] = batch["x"]  # made-up data have no pairs
    return batch


def _records(run: Run, source: Source, size: int) -> dict:
    """The abstract arrays of `size` records."""
    one = next(pipeline.evaluation_batches(source, run.config.data.patch_size, 1, 0, 1))
    return {key: _abstract((size, *value.shape[1:]), value.dtype, run.mesh)
            for key, value in one.items() if key != "mask"}


def sample_program(run: Run, source: Source) -> Program:
    """The sampler with a batch of config.sample.num images, rounded up to equal shards."""
    shards, mesh, model = sharding.batch_shards(run.mesh), run.mesh, run.model
    size = -(-max(run.config.sample.num, 1) // shards) * shards
    kind = model.config.condition
    y = jax.tree.map(lambda a: _abstract(a.shape, a.dtype, mesh), jax.eval_shape(
        kind.stack, kind.shapes(size, source.text_tokens)))
    key = _abstract_key()
    params = build.abstract_params(model, mesh) | abstract_pixel_params(run)
    index = _abstract((size,), jnp.int32, mesh)
    sampler = generate.Sampler(full_precision(model), run.schedule, run.config.sample, mesh,
                               run.pixels)
    autoencoder, resident = generate.autoencoder_of(run), ()
    if autoencoder:  # its parameters stay on the devices between the batches
        _, resident, _ = autoencode.abstract(autoencoder, mesh, (size, *run.spec.image_shape))
    return Program(generate.generate_tokens, (params, key, index, y), {"sampler": sampler}, size,
                   resident)


def evaluate_program(run: Run, source: Source) -> Program:
    """The held-out likelihood of a batch of config.evaluate.batch_size, in equal shards."""
    config, mesh = run.config, run.mesh
    shards = sharding.batch_shards(mesh)
    size = -(-config.evaluate.batch_size // shards) * shards
    batch = _records(run, source, size)
    options = {"schedule": run.schedule, "model": full_precision(run.model), "pixels": run.bounded,
               "trajectories": config.evaluate.trajectories, "steps": config.evaluation_steps}
    params = build.abstract_params(run.model, mesh) | abstract_pixel_params(run)
    return Program(scoring.bounds_of_batch, (params, _abstract_key(), batch), options, size)


def decode_program(run: Run, source: Source) -> Program:
    """A batch of latents to images by config.sample.autoencoder; the model's EMA stays on the mesh.

    Raises UserError without an autoencoder, or for one that does not fit the latents.
    """
    autoencoder = generate.autoencoder_of(run)
    if not autoencoder:
        raise UserError("--program=decode: config.sample.autoencoder is empty; give the one of the "
                        "latents, such as kl:FOLDER")
    size, model = autoencode.IMAGES * run.mesh.size, build.abstract_params(run.model, run.mesh)
    function, *arguments = autoencode.abstract(
        autoencoder, run.mesh, (size, *run.spec.image_shape))
    return Program(function, tuple(arguments), {}, size, model)


PROGRAMS = {"train": train_program, "sample": sample_program, "evaluate": evaluate_program,
            "decode": decode_program, "rollout": rollout_program}


def _abstract_key():
    return jax.eval_shape(lambda: jax.random.key(0))


def _abstract(shape, dtype, mesh):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch_sharding(mesh))


def compile_for(config: Config, topology: str, program: str = "train",
                dump: str | None = None) -> dict:
    """The report of a program compiled for a topology, as JSON values; see the module's docstring.

    program: a key of PROGRAMS. topology: see topology.find. dump: a folder to write the program's
    texts to. Raises UserError if the configuration does not fit the topology or
    its data.
    """
    found = find(topology, config.mesh.slices)
    with found.tracing():
        values = {"topology": topology} | _report(config, found, program, dump)
    return {key: report.finite(value) for key, value in values.items()}


def vary(values: dict, choices: str, topology: str, program: str = "train") -> list[dict]:
    """The reports of an experiment at several values of its settings, each with its name.

    values and choices: see benchmark.vary.
    """
    return [{"name": name} | compile_for(config, topology, program)
            for name, _, config in list(benchmark.varied(values, choices))]  # all read first


def _report(config: Config, topology: Topology, program: str,
            dump: str | None) -> dict:
    if "teacher" in objectives.find(config.train.objective).needs:
        raise UserError(f"config.train.objective={config.train.objective} needs its teacher's "
                        "model, which compilation does not load: compile another objective")
    objectives.checked(config)
    mesh, source = sharding.make_mesh(config.mesh, topology.devices), open_data(config)
    spec = pipeline.spec(source, config.data.patch_size)
    run = untrained(config, spec, mesh)
    made = PROGRAMS[program](run, source)
    compiled = _compile(made, run, topology, dump)
    reference = dataclasses.replace(run, model=build.reference_variant(run.model))
    plain = PROGRAMS[program](reference, source)
    with sharding.use(mesh):
        traced = plain.trace()
        model_flops = flops.of_jaxpr(traced.jaxpr.jaxpr) / mesh.size
    chip = topology.chip
    found = {"chips": mesh.size // chip.cores, "devices": mesh.size, "unit": chip.unit,
             "networks": [chip.near, chip.far], "mesh": dict(mesh.shape),
             "slices": config.mesh.slices, "program": program, "batch_size": made.examples}
    found |= report.figures(compiled, run, chip) | {"model_flops_per_chip": model_flops}
    found |= report.rates(found, made.examples, spec.tokens, chip)
    if not found["fits"] and program == "train":
        found["advice"] = advice(run, found["bytes_per_chip"])
    return found


def _compile(program: Program, run: Run, topology: Topology,
             dump: str | None = None) -> Compiled:
    mesh = run.mesh
    inputs = program.arguments, program.options.get("reference")
    arguments, resident = (sum(bytes_per_chip(a) for a in jax.tree.leaves(tree))
                           for tree in (inputs, program.resident))
    with sharding.use(mesh):
        traced = program.trace()
        jaxpr, lowered = traced.jaxpr.jaxpr, traced.lower()
        begin, cpu = time.perf_counter(), time.process_time()
        try:
            compiled, memory = lowered.compile(topology.compiler_options), {}
        except jax.errors.JaxRuntimeError as error:
            compiled, memory = None, out_of_memory(error, arguments)
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    total, kernel = flops.of_jaxpr(jaxpr) / mesh.size, _kernel(jaxpr)
    text = compiled.as_text() if compiled else ""
    if dump:
        # Not a serialised executable: jax reads one with pickle, and only with the version and the
        # devices that it was compiled for.
        epath.Path(dump).mkdir(parents=True, exist_ok=True)
        files.write(epath.Path(dump) / "program.stablehlo.mlir", lowered.as_text())
        if compiled:
            files.write(epath.Path(dump) / "program.hlo.txt", text)
    if compiled:
        m = compiled.memory_analysis()
        work = _work(text, jaxpr, mesh.size, topology.domains)
        memory = {"arguments": m.argument_size_in_bytes, "temporaries": m.temp_size_in_bytes,
                  "peak": (m.argument_size_in_bytes + m.output_size_in_bytes
                           - m.alias_size_in_bytes + m.temp_size_in_bytes
                           + m.generated_code_size_in_bytes), "hbm": topology.chip.hbm * 2**30}
    else:
        work, memory = _unseen(jaxpr, mesh.size), {"arguments": arguments} | memory
    for name in ("arguments", "peak"):
        memory[name] += resident
    return Compiled(work, memory, total, seconds, cpu, kernel, largest(text) if text else [])


def _kernel(jaxpr) -> str:
    """The attention of a traced program: splash or cudnn where it calls that kernel, else plain."""
    names = flops.primitives(jaxpr)
    if "pallas_call" in names:
        return "splash"
    return "cudnn" if names & flops.CUDNN.keys() else "plain"


def _work(text: str, jaxpr, devices: int, domains: int) -> hlo.Work:
    """The work of a compiled program's text, with products of its jaxpr that the text hides.

    These are the Pallas kernels', and as many more as the jaxpr has, divided by the devices.
    Compilers turn products of a single row into multiplications and sums, and the text may hide the
    length of a scan. So FLOPs are never below the jaxpr's: products that the compiler removes, as
    unused or repeated, count too. Hidden products stay uncounted where devices repeat as much of
    each other's work. A loop whose length the jaxpr hides too counts as one iteration.
    """
    work = hlo.count(text, devices, domains)
    kernels, highest = (flops.of_jaxpr(jaxpr, True, only) / devices for only in (False, True))
    work.products["kernels", "highest"] += highest
    work.products["kernels", "other"] += kernels - highest
    traced = _unseen(jaxpr, devices)
    hidden = max(traced.flops - work.flops, 0)
    highest = min(max(traced.of_precision("highest") - work.of_precision("highest"), 0), hidden)
    work.products["other", "highest"] += highest
    work.products["other", "unknown"] += hidden - highest
    work.products = {key: value for key, value in work.products.items() if value}
    return work


def _unseen(jaxpr, devices: int) -> hlo.Work:
    """The work of a program without its compiled text: its products; the rest is NaN."""
    total, highest = (flops.of_jaxpr(jaxpr, highest=only) / devices for only in (False, True))
    products = {("other", "highest"): highest, ("other", "unknown"): total - highest}
    sent = {(kind, on): math.nan for kind in hlo.COLLECTIVES for on in ("ici", "dcn")}
    return hlo.Work({key: value for key, value in products.items() if value}, math.nan,
                    {(math.nan, ()): 1}, sent, {"ici": math.nan, "dcn": math.nan})


