"""A run as a folder that needs none of this package: its parameters as safetensors, compiled programs (StableHLO) that take them as an
argument, its configuration, a model card and an example script. And the way back: load.load reads such a folder, and a new run can start
from its parameters.

config.json holds the SHA-256 of every other file and is sealed itself. Reading an export runs none of its code: only config.json and the
safetensors are opened.

b batch, H, W, C image height, width and channels; V pixel levels; M text tokens, E their width.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import os
import pathlib
import uuid

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from ntm_jax import files, typed
from ntm_jax.core.layers import Text
from ntm_jax.data import transforms
from ntm_jax.errors import UserError, first_line
from ntm_jax.runtime import card, checkpoint, evaluate, generate, processes, sharding, state

FORMAT = 1
PLATFORMS = ("cpu", "cuda", "tpu")
CONFIG, WEIGHTS, SCRIPT = "config.json", "model.safetensors", "sample.py"
REMEDY = "copy the export again from where it came, or export the run anew"


def unflatten(flat: dict) -> dict:
    """{"name/of/array": array} -> nested parameters."""
    nested = {}
    for name, array in flat.items():
        *path, last = name.split("/")
        inner = nested
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = array
    return nested


DENOISER = "denoiser"  # how the names of a denoiser's arrays begin


@dataclasses.dataclass(frozen=True)
class About:
    """What reading an export needs of its config.json. Other keys are left aside: a later version may add some."""

    format: int
    step: int
    parameters: str  # raw, ema
    checksums: dict  # {name of an array: its checkpoint.checksums}
    spec: dict
    config: dict
    files: dict = dataclasses.field(default_factory=dict)  # {name of a file: its SHA-256}; earlier versions wrote none
    teacher_step: int | None = None  # of a denoiser's run
    denoiser_config: dict | None = None  # the configuration of the denoiser's own run, for the sizes of the denoiser


def parameters(run) -> dict:
    """What an export holds: the run's params, and beside them, where it has one, its denoiser's."""
    return run.params | ({DENOISER: run.denoiser[1]["params"]} if run.denoiser else {})


def _apart(flat: dict) -> tuple[dict, dict | None]:
    """The flattened `parameters` as those of the model and of the denoiser, None where there is none."""
    nested = unflatten(flat)
    denoiser = nested.pop(DENOISER, None)
    return nested, denoiser and {"params": denoiser}


def programs(run) -> dict:
    """{name: (function, its arguments' names, their abstract arrays)}, functions of flattened parameters and a symbolic batch b.

    sampler(parameters, seed, index, condition) -> images [b, H, W, C], uint8 0..V-1 or float32 latents: those of run.sample_at(index).
    log_likelihood(parameters, seed, index, images, condition) -> run.log_prob, nats [b], noise keyed by index.
    condition is label [b], or text [b, M, E], text_mask [b, M] for a model of texts.

    Each is a vmap of one example's program: core asks for the length of its batches, which a symbol has not.
    """
    config, spec, model = run.config, run.spec, state.exact(state.plain(run.model))
    s, trajectories = config.sample, config.evaluate.trajectories
    denoiser = state.plain(run.denoiser[0]) if s.decoder == "denoiser" else None

    def one(*condition):
        condition = tuple(a[None] for a in condition)
        return Text(*condition) if model.config.text_width else condition[0]

    def images(tokens):
        values = transforms.unpatchify(tokens, spec.image_shape, spec.patch_size)
        return jnp.rint((values + 1) * (spec.levels - 1) / 2).clip(0, spec.levels - 1).astype(jnp.uint8) if spec.levels else values

    def sampler(parameters, seed, index, *condition):
        (params, denoiser_params), root = _apart(parameters), jax.random.key(seed)

        def example(index, *condition):
            return generate._generate(
                params, root, index[None], one(*condition), denoiser_params, config=config, model=model, steps=s.steps, guidance=s.guidance,
                decoder=s.decoder, inverse=s.inverse, trajectory=False, denoiser=denoiser)[0][0]

        return images(jax.vmap(example)(index, *condition))

    def log_likelihood(parameters, seed, index, pixels, *condition):
        (params, _), root = _apart(parameters), jax.random.key(seed)
        # A table, since XLA's division by a constant is not NumPy's to the last bit.
        x = jnp.asarray(transforms.scale(np.arange(spec.levels), spec.levels))[pixels] if spec.levels else pixels
        x = transforms.patchify(x, spec.patch_size)

        def example(x, index, *condition):
            y = one(*condition)
            told = {"text": y.states, "text_mask": y.mask} if model.config.text_width else {"label": y}
            return evaluate._score(params, root, {"x": x[None], "index": index[None]} | told, config=config, model=model,
                                   levels=spec.levels, trajectories=trajectories, steps=s.steps)["importance_weighted"][0]

        return jax.vmap(example)(x, index, *condition)

    batch, = jax.export.symbolic_shape("b")
    flat = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in checkpoint.named_leaves(parameters(run)).items()}
    common = {"parameters": flat, "seed": jax.ShapeDtypeStruct((), jnp.uint32), "index": jax.ShapeDtypeStruct((batch,), jnp.int32)}
    pixels = {"images": jax.ShapeDtypeStruct((batch, *spec.image_shape), jnp.uint8 if spec.levels else jnp.float32)}
    if model.config.text_width:
        condition = {"text": jax.ShapeDtypeStruct((batch, spec.text_tokens, spec.text_width), jnp.float16),
                     "text_mask": jax.ShapeDtypeStruct((batch, spec.text_tokens), jnp.bool_)}
    else:
        condition = {"label": jax.ShapeDtypeStruct((batch,), jnp.int32)}
    return {"sampler": (sampler, common | condition), "log_likelihood": (log_likelihood, common | pixels | condition)}


def compiled(function, arguments: dict) -> bytes:
    """A program of `programs` for all PLATFORMS, as jax.export.deserialize reads it."""
    setting = "jax_hlo_source_file_canonicalization_regex"
    before = getattr(jax.config, setting)
    jax.config.update(setting, ".*/")  # it tells source lines: without the folders of this machine
    try:
        return bytes(jax.export.export(jax.jit(function), platforms=PLATFORMS)(*arguments.values()).serialize())
    finally:
        jax.config.update(setting, before)


def configure(run, steps: int | None, guidance: float | tuple[float, ...] | None, decoder: str | None):
    """The run with these in the place of its config.sample's, where given."""
    generate.check(run.config, steps, guidance)
    generate.check_decoder(run.config, decoder, run.denoiser)
    given = {name: value for name, value in (("steps", steps), ("guidance", guidance), ("decoder", decoder)) if value is not None}
    return dataclasses.replace(run, config=dataclasses.replace(run.config, sample=dataclasses.replace(run.config.sample, **given)))


def write_export(run, out: str, steps: int | None = None, guidance: float | tuple[float, ...] | None = None,
                 decoder: str | None = None) -> None:
    """Writes a load.Run into the new folder `out`; process 0 does. UserError, nothing written, where the folder is there already."""
    folder = epath.Path(out)
    if folder.exists():
        raise UserError(f"{out} is there: give a new folder as --out, nothing was overwritten")
    processes.agree({"--out": out, "--step": run.step, "--raw": run.raw, "--steps": steps, "--guidance": guidance, "--decoder": decoder})
    run = configure(run, steps, guidance, decoder)
    checksums, flat = checkpoint.checksums(parameters(run)), checkpoint.named_leaves(sharding.to_host(parameters(run)))
    if jax.process_index():
        return
    exported = programs(run)
    contents = {f"{name}.bin": compiled(*program) for name, program in exported.items()}
    contents[WEIGHTS] = safetensors.numpy.save({name: np.ascontiguousarray(a) for name, a in flat.items()}, {"format": "ntm_jax"})
    contents[SCRIPT] = pathlib.Path(__file__).with_name("sample_script.py").read_bytes()
    contents["README.md"] = card.markdown(run, sum(a.size for a in flat.values()), PLATFORMS).encode()
    arguments = {name: _described(arguments) for name, (_, arguments) in exported.items()}
    _write(folder, contents, _about(run) | {"programs": arguments, "checksums": checksums})
    print(f"{len(contents) + 1} files in {out}, {sum(map(len, contents.values())) / 1e6:.1f} MB, of step {run.step}", flush=True)


def _about(run) -> dict:
    """config.json but for what is computed from the arrays and the programs."""
    about = {"format": FORMAT, "step": run.step, "parameters": "raw" if run.raw else "ema", "platforms": PLATFORMS,
             "packages": {name: importlib.metadata.version(name) for name in ("ntm_jax", "jax")},
             "spec": dataclasses.asdict(run.spec), "config": run.config.raw}
    if run.denoiser:
        about["teacher_step"] = run.teacher_step
        about["denoiser_config"] = run.denoiser_config and run.denoiser_config.raw
    return about


def _write(folder, contents: dict, about: dict) -> None:
    """Writes a new folder of files, {name: bytes}, and config.json. It is there whole or not at all."""
    local = "://" not in os.fspath(folder)
    part = folder.parent / f"{files.PART}{folder.name}-{uuid.uuid4().hex[:12]}"
    new_parents = [path for path in folder.parents if local and not path.exists()]
    try:
        part.mkdir(parents=True)
        for name, content in contents.items():
            files.write(part / name, content)
        digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
        files.write_json(part / CONFIG, about | {"files": digests}, sealed=True)
        if local:
            _flush(part)
        part.rename(folder)
        if local:
            _flush(folder.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.rmtree(missing_ok=True)
        for path in new_parents:
            with contextlib.suppress(OSError):
                os.rmdir(path)
        if not isinstance(error, OSError):
            raise
        raise UserError(f"{folder} cannot be written ({error.strerror or error}): give a new folder as --out, where you may write and the "
                        "disk has space left") from None


def _flush(folder) -> None:
    """Flushes a local folder's list of names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _described(arguments: dict) -> dict:
    """A program's arguments but the parameters, {name: "dtype[shape]"}."""
    return {name: f"{a.dtype}[{','.join(map(str, a.shape))}]" for name, a in arguments.items() if name != "parameters"}


def start_from(source: str, config, model, mesh, current):
    """A new run's state with the parameters, as such and as their average, of an export (of a denoiser's run, its teacher's), or of the
    average of a run: its workdir or WORKDIR/checkpoints/STEP. UserError naming the first array that differs where they are another model's.
    """
    abstract = state.abstract(config, model, mesh).params
    folder = epath.Path(source)
    try:
        params = (read_parameters(folder, read_about(folder), abstract, but=f"{DENOISER}/") if is_export(folder)
                  else _restored(folder, config, model, mesh))
    except UserError as error:
        raise UserError(f"config.init_from is {source}: {error}") from None
    copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=jax.tree.map(lambda a: a.sharding, abstract))
    return current.replace(params=params, ema=copy(params))  # a step donates both


def is_export(folder) -> bool:
    """Whether a folder is an export, though a damaged one, and not a run's."""
    folder = epath.Path(folder)
    return not (folder / "checkpoints").exists() and any((folder / name).exists() for name in (WEIGHTS, SCRIPT, "sampler.bin"))


def read_about(folder) -> About:
    """An export's config.json, verified. UserError where it is missing, damaged or of another format."""
    path = epath.Path(folder) / CONFIG
    text = _content(path)
    values = files.read_json(path, REMEDY)
    if "files" in values and files.SEAL.encode() not in text:
        raise UserError(f"{path} was damaged or edited: its checksum {files.SEAL} is missing; {REMEDY}")
    version = values.get("format")
    if version is None:
        raise UserError(f"{path} is not an export's: expected the folder that launch/export.py wrote")
    if isinstance(version, int) and version != FORMAT:
        raise UserError(f"{folder} is of format {version}, and this version of ntm_jax reads {FORMAT}: export the run anew")
    known = {field.name for field in dataclasses.fields(About)}
    try:
        return typed.read(About, {name: value for name, value in values.items() if name in known}, CONFIG)
    except UserError as error:
        raise UserError(f"{path} cannot be used ({error}): {REMEDY}") from None


def read_parameters(folder, about: About, abstract, but: str | None = None) -> dict:
    """The parameters of an export in the structure of `abstract`, each array on the devices of its abstract counterpart, verified.

    Arrays whose name begins with `but` are left aside. UserError where the file is damaged, or its arrays are another model's.
    """
    path = epath.Path(folder) / WEIGHTS
    content = _content(path)
    if about.files and hashlib.sha256(content).hexdigest() != about.files.get(WEIGHTS):
        raise UserError(f"{path} was damaged or edited: its SHA-256 is not the one in {CONFIG}; {REMEDY}")
    try:
        flat = safetensors.numpy.load(content)
    except (safetensors.SafetensorError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {first_line(error)}): {REMEDY}") from None
    flat = {name: array for name, array in flat.items() if not (but and name.startswith(but))}
    expected = checkpoint.named_leaves(abstract)
    for name in [*expected, *sorted(set(flat) - set(expected))]:
        there, here = (checkpoint.describe(arrays.get(name)) for arrays in (flat, expected))
        if there != here:
            raise UserError(f"it is of another model: array {name} is {there} in the export, {here} in this model; use the configuration "
                            "it was trained with, or another export")
    params = unflatten({name: jax.make_array_from_callback(a.shape, a.sharding, lambda i, name=name: flat[name][i])
                        for name, a in expected.items()})
    for name, value in checkpoint.checksums(params).items():
        if about.checksums.get(name) != value:
            raise UserError(f"{path} is damaged: {name} has checksum {value}, written with {about.checksums.get(name)}; {REMEDY}")
    return params


def _content(path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): {REMEDY}") from None


def _restored(folder, config, model, mesh):
    """The average of a run's parameters."""
    workdir, step = checkpoint.locate(folder)
    if not (workdir / "checkpoints").exists():
        raise UserError("there is no such export or run: expected an export's folder, a run's, or WORKDIR/checkpoints/STEP")
    return state.restore_params(str(workdir), config, model, mesh, step)[1]
