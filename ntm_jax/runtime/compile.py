"""Compiles the program that a run would start, for machines that are not there: does it fit, what does it do, and what bounds it.

The functions are those of training and sampling themselves, lowered on abstract arrays. What is counted, of one chip and one step:
- flops: matrix products of the compiled program with loops multiplied out (hlo.py), recomputation and replicated work included, plus
  those inside Pallas kernels, which the compiled text does not show (flops.py, divided by the chips). `flops_traced` counts all from the
  traced program instead, divided by the chips: where the compiled figure is larger, chips repeat each other's work.
- model_flops: the same step with plain attention and nothing recomputed, divided by the chips.
- bytes: what the compiler reserves; peak = arguments + outputs that are not donated arguments + temporaries + code.
- collective bytes: what a chip sends. Seconds of the roofline: each resource at its peak, as if the others were free.
"""

import dataclasses
import importlib.util
import math
import os
import re
import resource
import sys
import time

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from ntm_jax.core.layers import Text
from ntm_jax.data import pipeline, sources
from ntm_jax.errors import UserError
from ntm_jax.runtime import attention, finetune, flops, generate, hlo, objective, sharding, state, train
from ntm_jax.runtime.config import Config


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device as jax counts them: HBM in GiB, bfloat16 FLOP/s, HBM bytes/s, and bytes/s it can send to its slice and to other slices."""

    hbm: float
    flops: float
    memory: float
    ici: float  # all links, one way
    dcn: float


# From docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, whose ICI figures are of both ways together; DCN from the tpu7x page's
# comparison (50 Gbit/s a v5p chip, 100 a v6e or tpu7x chip) and, v4 and v5e, from jax-ml.github.io/scaling-book/tpus. HBM of v5e and v6e
# is what the compiler allows, less than the 16 and 32 GiB of the chip.
CHIPS = {
    "v4": Chip(32, 275e12, 1228e9, 300e9, 6.25e9),  # a device is a chip, two cores as one; 6 links of 50 GB/s
    "v5e": Chip(15.75, 197e12, 819e9, 200e9, 3.125e9),  # one core; 4 links
    "v5p": Chip(95, 459e12, 2765e9, 600e9, 6.25e9),  # a device is a chip, two cores as one; 6 links of 100 GB/s
    "v6e": Chip(31.25, 918e12, 1638e9, 400e9, 12.5e9),  # one core; 4 links
    "tpu7x": Chip(96, 1153e12, 3690e9, 300e9, 6.25e9),  # a device is half a chip: all figures halved
}
HERE = Chip(math.inf, math.nan, math.nan, math.nan, math.nan)  # cpu and local: nothing is known of their limits
EXAMPLES = "v5p:8x8x8, v5e:16x16, v6e:16x16, v4:4x4x4, tpu7x:4x4x4, cpu:8 or local"
# libtpu would look for the machine, take its lock, and complain on the terminal of what it does not find.
QUIET = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_ACCELERATOR_TYPE": "v5p-8", "TPU_WORKER_HOSTNAMES": "localhost",
         "TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3"}
KNOWN = re.compile(r"(v4|v5e|v5p|v6e|tpu7x):\d+(x\d+){1,2}")


def devices(topology: str, slices: int = 1) -> tuple[list, Chip]:
    """The devices of a topology, which need not be there, and their kind. local: those of this machine; cpu:N: N of its simulated ones."""
    if topology == "local" or re.fullmatch(r"cpu:[1-9]\d*", topology):
        wanted = 0 if topology == "local" else int(topology[4:])
        if wanted and len(jax.devices("cpu")) < wanted:
            raise UserError(f"--topology={topology}: there are {len(jax.devices('cpu'))} CPU devices; set "
                            f"XLA_FLAGS=--xla_force_host_platform_device_count={wanted}")
        return (jax.devices("cpu")[:wanted] if wanted else jax.devices()), HERE
    if not KNOWN.fullmatch(topology):
        raise UserError(f"--topology={topology} is not known: expected {EXAMPLES}")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"--topology={topology} needs the TPU compiler, and libtpu is not installed: pip install -e '.[tpu]'")
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    options = {"num_slices": slices} if slices > 1 else {}
    if topology.startswith("v4"):
        options["chip_config_name"] = "megacore"  # two cores as one device, as jax sees a real v4
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    except Exception as error:  # libtpu raises several kinds
        raise UserError(f"--topology={topology} is refused by the TPU compiler ({_first_line(error)}): expected {EXAMPLES}") from None
    return list(found), CHIPS[topology.split(":")[0]]


def _first_line(error) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function of a run and the abstract arguments that the run would call it with."""

    function: object
    arguments: tuple
    options: dict

    def trace(self):
        return self.function.trace(*self.arguments, **self.options)


def open_data(config: Config):
    """The source that tells the records' shape: config.data.mock where it is given, since the data need not be at hand."""
    if config.data.mock:
        return sources.open_source(config.data.mock, config.data.split, config.data.image_size)
    return config.data.open(config.data.split)


def train_program(config: Config, model, source, mesh) -> Program:
    """The training step and what the loop calls it with."""
    train.check_batch(config, mesh)
    one = next(pipeline.evaluation_batches(source, config.data.patch_size, 1, 0, 1))
    batch = {key: _abstract((config.data.batch_size, *value.shape[1:]), value.dtype, mesh) for key, value in one.items() if key != "mask"}
    arguments = state.abstract(config, model, mesh), batch
    options = {"steps": max(config.trajectory.steps)}
    if config.train.align_weight:
        options["frozen"] = finetune.abstract(config, model, mesh)
    if len({device.process_index for device in mesh.devices.flat}) > 1:
        options["whole"] = jax.ShapeDtypeStruct((mesh.size,), jnp.bool_, sharding=sharding.by_device(mesh))
    return Program(objective.make_step(config, model, mesh), arguments, options)


def sample_program(config: Config, model, source, mesh) -> Program:
    """The sampler and what one batch of config.sample.num images, made up to whole shares of the mesh, calls it with."""
    shards, s = sharding.batch_shards(mesh), config.sample
    size = -(-s.num // shards) * shards
    y = _abstract((size,), jnp.int32, mesh)
    if model.config.text_width:
        text = (size, source.text_tokens)
        y = Text(_abstract((*text, source.text_width), jnp.float16, mesh), _abstract(text, jnp.bool_, mesh))
    key = jax.eval_shape(lambda: jax.random.key(0))
    params = state.abstract(config, model, mesh).ema
    options = dict(config=config, model=state.exact(model), steps=s.steps, guidance=s.guidance, decoder=s.decoder,
                   inverse=s.inverse, trajectory=False)
    return Program(generate._generate, (params, key, _abstract((size,), jnp.int32, mesh), y), options)


PROGRAMS = {"train": train_program, "sample": sample_program}


def _abstract(shape, dtype, mesh):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch_sharding(mesh))


def compile_for(config: Config, topology: str, program: str = "train") -> dict:
    """Compiles a program for a topology and returns the report, JSON values; see the module's docstring for its figures."""
    found, chip = devices(topology, config.mesh.slices)
    mesh = _mesh(config, found)
    source = open_data(config)
    spec = pipeline.spec(source, config.data.patch_size)
    model = state.make_model(config, spec, attention.choose(mesh))
    built = PROGRAMS[program](config, model, source, mesh)
    arguments = sum(_bytes_here(a) for a in jax.tree.leaves((built.arguments, built.options.get("frozen"))))
    with sharding.use(mesh):
        traced = built.trace()
        jaxpr = traced.jaxpr.jaxpr
        kernels, total = (flops.of_jaxpr(jaxpr, only) / mesh.size for only in (True, False))
        lowered = traced.lower()
        begin, cpu = time.perf_counter(), time.process_time()
        try:
            compiled, memory = lowered.compile(), None
        except jax.errors.JaxRuntimeError as error:
            compiled, memory = None, _out_of_memory(error, arguments)
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    with_nothing_twice = PROGRAMS[program](config, state.plain(model), source, mesh)
    with sharding.use(mesh):
        model_flops = flops.of_jaxpr(with_nothing_twice.trace().jaxpr.jaxpr) / mesh.size
    work = hlo.Work(flops=math.nan, memory=math.nan)
    if compiled:
        work, m = hlo.count(compiled.as_text(), mesh.size, config.mesh.slices), compiled.memory_analysis()
        work.flops += kernels
        if work.unknown:  # loops taken once
            work.flops = max(work.flops, total)
        arguments = m.argument_size_in_bytes
        memory = dict(temporaries=m.temp_size_in_bytes, peak=arguments + m.output_size_in_bytes - m.alias_size_in_bytes
                      + m.temp_size_in_bytes + m.generated_code_size_in_bytes, hbm=chip.hbm * 2**30)
    fits = compiled is not None and memory["peak"] <= memory["hbm"]
    sent = {network: sum(v for (_, on), v in work.sent.items() if on == network) for network in ("ici", "dcn")}
    roofline = {
        "compute": (work.flops if compiled else total) / chip.flops, "memory": work.memory / chip.memory,
        "network": sent["ici"] / chip.ici + sent["dcn"] / chip.dcn if compiled else math.nan}
    known = {name: value for name, value in roofline.items() if math.isfinite(value)}
    report = {
        "topology": topology, "chips": mesh.size, "mesh": dict(mesh.shape), "slices": config.mesh.slices, "program": program,
        "attention": getattr(model.attention, "kind", "plain"), "remat": config.model.remat, "batch_size": config.data.batch_size,
        "parameters": sum(a.size for a in jax.tree.leaves(state.abstract(config, model, mesh).params)),
        "fits": fits, "bytes_per_chip": {"arguments": arguments} | memory,
        "flops_per_chip": work.flops if compiled else total, "flops_traced_per_chip": total, "model_flops_per_chip": model_flops,
        "collective_bytes_per_chip": {k: sum(v for (kind, _), v in work.sent.items() if kind == k) for k in hlo.COLLECTIVES},
        "slice_network_bytes_per_chip": sent["ici"], "data_centre_bytes_per_chip": sent["dcn"], "memory_bytes_per_chip": work.memory,
        "roofline_seconds": roofline, "bound_by": max(known, key=known.get) if known else None,
        "unknown_loops": work.unknown, "compile_seconds": seconds, "compile_cpu_seconds": cpu,
        "host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)}
    if not fits and program == "train":
        report["advice"] = advice(config, spec, mesh, report["bytes_per_chip"])
    return _finite(report)


def _mesh(config: Config, found):
    try:
        return sharding.make_mesh(config.mesh, found)
    except NotImplementedError:
        raise UserError("config.mesh does not lie on the topology's torus: make each axis a product of the torus's sides") from None


def _bytes_here(a) -> int:
    """Bytes of an abstract array's part on one chip; a key is two words."""
    shape = a.sharding.shard_shape(a.shape) if a.sharding else a.shape
    return math.prod(shape) * (8 if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key) else a.dtype.itemsize)


UNITS = {"B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _out_of_memory(error, arguments: float) -> dict:
    """What the compiler says it needed beside the arguments, or in all, from its message; any other failure is raised again."""
    beside = re.search(r"temporaries \(([\d.]+)([BKMGT])\) exceeds available HBM \(([\d.]+)([BKMGT])\)", str(error))
    said = beside or re.search(r"Used ([\d.]+)([BKMGT]) of ([\d.]+)([BKMGT]) hbm", str(error))
    if not said:
        raise error
    used, hbm = (float(said[i]) * UNITS[said[i + 1]] for i in (1, 3))
    return {"temporaries": used, "peak": used + arguments, "hbm": hbm} if beside else {
        "temporaries": used - arguments, "peak": used, "hbm": hbm}


def saved_per_token(config: Config, width: int, remat: str) -> int:
    """Numbers that a layer of a width keeps for the backward pass, a token: see core.layers.REMAT; none is an estimate."""
    m = config.model
    keys, wide = 2 * m.kv_heads * m.head_size, m.mlp_ratio * width
    return {"full": width, "narrow": 5 * width + keys, "dots": 4 * width + keys + wide, "none": 8 * width + 2 * keys + 3 * wide}[remat]


def saved(config: Config, spec, mesh, remat: str) -> float:
    """Bytes of activations that a chip keeps for the backward pass of one of config.train.accumulate parts."""
    m, levels = config.model, max(config.trajectory.steps) if config.train.objective == "end_to_end" else 1
    examples = config.data.batch_size * levels / sharding.batch_shards(mesh) / config.train.accumulate / mesh.shape["sequence"]
    transporter = spec.tokens * m.transporter_blocks * m.transporter_layers * saved_per_token(config, m.transporter_width, remat)
    predictor = (spec.tokens + spec.text_tokens) * m.predictor_layers * saved_per_token(config, m.width, remat)
    return examples * (transporter + predictor) * jnp.dtype(m.dtype).itemsize


def advice(config: Config, spec, mesh, memory: dict) -> str:
    """The smallest change that should make a training step fit, from the shapes: the remat policy, then accumulation, then more chips.

    What is neither state nor saved activations, a layer's working set, is taken from what the compiler needed, grows by what a layer
    recomputes and its gradient, and shrinks with the part of a batch that is worked on at a time. The state is 16 bytes a parameter over
    fsdp and tensor, gradients 4 more. A quarter stays free: the compiler has been seen to take a third more than this says.
    """
    order = ["none", "dots", "narrow", "full"]
    policies = order[order.index(config.model.remat):]
    now, fixed = saved(config, spec, mesh, config.model.remat), memory["arguments"] * 1.25
    working = max(memory["peak"] - fixed - now, 0)
    layers = config.model.predictor_layers + config.model.transporter_blocks * config.model.transporter_layers
    share = config.data.batch_size // sharding.batch_shards(mesh) // config.train.accumulate
    gib = memory["hbm"] / 2**30

    def need(policy, parts):
        kept = saved(config, spec, mesh, policy)
        return fixed + (working + 2 * (now - kept) / layers + kept) / parts + (memory["arguments"] / 4 if parts > 1 else 0)

    for parts in (n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256) if share % n == 0):
        for policy in policies:
            if need(policy, parts) < 0.75 * memory["hbm"]:
                change = [f"config.model.remat={policy}"] if policy != config.model.remat else []
                change += [f"config.train.accumulate={config.train.accumulate * parts}"] if parts > 1 else []
                return f"set {' and '.join(change)}: about {need(policy, parts) / 2**30:.1f} GiB of {gib:.1f}" if change else \
                    f"very near: try config.train.accumulate={config.train.accumulate * 2}"
    shards = mesh.shape["fsdp"] * mesh.shape["tensor"]
    least = 2 ** math.ceil(math.log2(shards * need("full", share) / (0.9 * memory["hbm"])))
    return (f"the state and gradients alone take {fixed / 2**30:.1f} GiB of {gib:.1f}: raise config.mesh.fsdp x tensor from {shards} to "
            f"{least}" + (f", on at least {least} chips" if least > mesh.size else ""))


def check_fits(report: dict) -> None:
    """UserError where a report says that the program does not fit, with what would make it."""
    if not report["fits"]:
        memory = report["bytes_per_chip"]
        raise UserError(f"the {report['program']} program needs {_gib(memory['peak'])} a chip of {report['topology']}, which has "
                        f"{_gib(memory['hbm'])}: " + report.get("advice", "make config.sample.num smaller, or config.mesh.fsdp larger"))


def _finite(value):
    """NaN and infinity as None: JSON has neither."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(report: dict) -> str:
    """The report for people."""
    memory, seconds = report["bytes_per_chip"], report["roofline_seconds"]
    sent = ", ".join(f"{kind} {_amount(v, 'B')}" for kind, v in report["collective_bytes_per_chip"].items() if v) or "nothing"
    if report["data_centre_bytes_per_chip"]:
        sent += f"; of these {_amount(report['data_centre_bytes_per_chip'], 'B')} between slices"
    slices = f" in {report['slices']} slices" if report["slices"] > 1 else ""
    rows = {
        "topology": f"{report['topology']}, {report['chips']} chips{slices}",
        "mesh": " x ".join(f"{axis} {size}" for axis, size in report["mesh"].items()),
        "program": f"{report['program']}, {report['attention']} attention, remat {report['remat']}, global batch {report['batch_size']}",
        "parameters": f"{report['parameters']:,}",
        "memory a chip": f"{_gib(memory['peak'])} of {_gib(memory['hbm'])}: arguments {_gib(memory['arguments'])}, temporaries "
                         f"{_gib(memory['temporaries'])}",
        "FLOPs a chip": f"{_amount(report['flops_per_chip'], '')}; as traced {_amount(report['flops_traced_per_chip'], '')}, of the model "
                        f"{_amount(report['model_flops_per_chip'], '')}",
        "sent a chip": sent,
        "at its peak": ", ".join(f"{name} {_amount(v, 's')}" for name, v in seconds.items())
                       + (f": bound by {report['bound_by']}" if report["bound_by"] else ""),
        "note": f"{report['unknown_loops']} loops tell no trips: memory and network are of one" if report["unknown_loops"] else "",
        "compiled in": f"{report['compile_seconds']:.0f} s, {report['compile_cpu_seconds']:.0f} s of CPU, "
                       f"{_gib(report['host_peak_bytes'])} of this host's memory",
        "fits": "yes" if report["fits"] else "no" + (f": {report['advice']}" if "advice" in report else ""),
    }
    return "\n".join(f"{name:<14} {value}" for name, value in rows.items() if value)


def _gib(value) -> str:
    return "unknown" if value is None else f"{value / 2**30:.2f} GiB"


def _amount(value, unit: str) -> str:
    """A number with its power of a thousand: 1.39e14 -> 139 T."""
    if not value:
        return "unknown" if value is None else f"0 {unit}".strip()
    power = math.floor(math.log10(value) / 3)
    prefix = {-2: "µ", -1: "m", 0: "", 1: "k", 2: "M", 3: "G", 4: "T", 5: "P"}[power]
    return f"{value / 1000**power:.3g} {prefix}{unit}".strip()
