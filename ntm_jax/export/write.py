"""Writes a run as a folder that needs none of this package to sample it or to score images.

The folder holds the parameters as safetensors, compiled programs (StableHLO) that take them as an
argument, the configuration, a model card and an example script. export.read reads such a folder.

Symbols: b batch; H, W, C image height, width, channels; V pixel levels; M text tokens, E their
width.
"""

import dataclasses
import importlib.metadata
import json
import pathlib

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from etils import epath
from flax import traverse_util

from ntm_jax import files
from ntm_jax.core.model import full_precision
from ntm_jax.data import transforms
from ntm_jax.data.pipeline import spec_to_json
from ntm_jax.errors import UserError
from ntm_jax.evaluation import scoring
from ntm_jax.export import card
from ntm_jax.export.read import CONFIG, DENOISER, FORMAT, WEIGHTS
from ntm_jax.runtime import build, sharding
from ntm_jax.runtime.checksums import array_checksums, named_leaves
from ntm_jax.runtime.processes import require_same_everywhere
from ntm_jax.runtime.run import Run
from ntm_jax.sampling import decoders, generate

PLATFORMS = ("cpu", "cuda", "tpu")


def parameters(run: Run) -> dict:
    """What an export holds: the run's parameters, and its denoiser's where it has one."""
    assert run.params is not None  # the run was trained
    return run.params | ({DENOISER: run.denoiser.params["params"]} if run.denoiser else {})


def _split_parameters(flat: dict) -> tuple[dict, dict | None]:
    """Flattened `parameters` -> those of the model and of the denoiser, None without one."""
    nested = traverse_util.unflatten_dict(flat, sep="/")
    denoiser = nested.pop(DENOISER, None)
    return nested, denoiser and {"params": denoiser}


def programs(run: Run) -> dict:
    """{name: (function, {argument: abstract array})} of the programs of an export.

    sampler(parameters, seed, index, condition) -> images [b, H, W, C], uint8 0..V-1 or float32
    latents: those of sampling.generate.sample_at.
    log_likelihood(parameters, seed, index, images, condition) -> log_prob of scoring.score_images
    [b], with noise keyed by index.
    parameters are flattened; condition is label [b], text [b, M, E] and text_mask [b, M], or
    vectors [b, E]. Vectors, and an array's rows [b, D], which take the place of images, are
    standardised.

    Each is a vmap of one example's program: core asks for the length of its batches, which the
    symbolic b does not have.
    """
    return {"sampler": (_sampler(run), _arguments(run, images=False)),
            "log_likelihood": (_log_likelihood(run), _arguments(run, images=True))}


def _one(run: Run, condition: tuple):
    """One example's condition, from its arrays, as a batch of one."""
    kind = run.model.config.condition
    return kind.stack(dict(zip(kind.shapes(1), [a[None] for a in condition], strict=True)))


def _sampler(run: Run):
    spec, options = run.spec, run.config.sample
    model = full_precision(build.reference_variant(run.model))
    denoiser = None
    if decoders.find(options.decoder).needs_denoiser:
        assert run.denoiser is not None  # see check_decoder
        denoiser = build.reference_variant(run.denoiser.module)
    static = generate.Sampler(model, run.schedule, options, None, run.pixels, denoiser)

    def images(tokens):
        values = transforms.unpatchify(tokens, spec.image_shape, spec.patch_size)
        if spec.columns:
            return values.reshape(-1, spec.columns)
        if not spec.pixel_levels:
            return values
        top = spec.pixel_levels - 1
        return jnp.rint((values + 1) * top / 2).clip(0, top).astype(jnp.uint8)

    def sampler(parameters, seed, index, *condition):
        (params, denoiser_params), root = _split_parameters(parameters), jax.random.key(seed)

        def example(index, *condition):
            return generate.generate_tokens(
                params, root, index[None], _one(run, condition), denoiser_params,
                sampler=static)[0][0]

        return images(jax.vmap(example)(index, *condition))

    return sampler


def _log_likelihood(run: Run):
    spec, model = run.spec, full_precision(build.reference_variant(run.model))

    def log_likelihood(parameters, seed, index, pixels, *condition):
        (params, _), root = _split_parameters(parameters), jax.random.key(seed)
        x, levels = pixels, spec.pixel_levels
        if levels:  # a table, since XLA's division by a constant may differ from NumPy's by a bit
            x = jnp.asarray(transforms.scale(np.arange(levels), levels))[pixels]
        x = x.reshape(-1, *spec.image_shape) if spec.columns else x
        x = transforms.patchify(x, spec.patch_size)

        def example(x, index, *condition):
            y = _one(run, condition)
            batch = {"x": x[None], "index": index[None]} | run.model.config.condition.arrays(y)
            return scoring.bounds_of_batch(
                params, root, batch, schedule=run.schedule, model=model, pixels=run.bounded,
                trajectories=run.config.evaluate.trajectories,
                steps=run.config.evaluation_steps)["importance_weighted"][0]

        return jax.vmap(example)(x, index, *condition)

    return log_likelihood


def _arguments(run: Run, images: bool) -> dict:
    """{argument: abstract array} of a program, with a symbolic batch."""
    spec, (batch,) = run.spec, jax.export.symbolic_shape("b")
    named = named_leaves(parameters(run))
    abstract = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in named.items()}
    found = {"parameters": abstract,
             "seed": jax.ShapeDtypeStruct((), jnp.uint32),
             "index": jax.ShapeDtypeStruct((batch,), jnp.int32)}
    if images:
        dtype = jnp.uint8 if spec.pixel_levels else jnp.float32
        found["images"] = jax.ShapeDtypeStruct((batch, *spec.data_shape), dtype)
    return found | run.model.config.condition.shapes(batch, spec.text_tokens)


def compiled(function, arguments: dict) -> bytes:
    """A program of `programs` for all PLATFORMS, as jax.export.deserialize reads it."""
    setting = "jax_hlo_source_file_canonicalization_regex"
    before = getattr(jax.config, setting)
    jax.config.update(setting, ".*/")  # source lines without this machine's folders
    try:
        exported = jax.export.export(jax.jit(function), platforms=PLATFORMS)(*arguments.values())
        return bytes(exported.serialize())
    finally:
        jax.config.update(setting, before)


def write_export(run: Run, out: str, steps: int | None = None,
                 guidance: float | tuple[float, ...] | None = None,
                 decoder: str | None = None) -> None:
    """Writes a run into the new folder `out`; process 0 does.

    Raises UserError, with nothing written, if the folder exists.
    """
    folder = epath.Path(files.expanded(out))
    if folder.exists():
        raise UserError(f"{out} already exists: choose a new --out (nothing was overwritten)")
    require_same_everywhere({"--out": out, "--step": run.step, "--raw": run.raw, "--steps": steps,
                             "--guidance": guidance, "--decoder": decoder})
    options = generate.override(run.config, steps=steps, guidance=guidance, decoder=decoder)
    generate.check_decoder(run, options.decoder)
    run = dataclasses.replace(run, config=run.config.with_sampling(**dataclasses.asdict(options)))
    checksums = array_checksums(parameters(run))
    flat = named_leaves(sharding.to_host(parameters(run)))
    if jax.process_index():
        return
    exported = programs(run)
    contents = {f"{name}.bin": compiled(*program) for name, program in exported.items()}
    arrays = {name: np.ascontiguousarray(a) for name, a in flat.items()}
    contents[WEIGHTS] = safetensors.numpy.save(arrays, {"format": "ntm_jax"})
    contents["sample.py"] = pathlib.Path(__file__).with_name("sample_script.py").read_bytes()
    size = sum(a.size for a in flat.values())
    contents["README.md"] = card.markdown(run, size, PLATFORMS).encode()
    described = {name: {argument: f"{a.dtype}[{','.join(map(str, a.shape))}]"
                        for argument, a in arguments.items() if argument != "parameters"}
                 for name, (_, arguments) in exported.items()}
    about = {"format": FORMAT, "step": run.step, "parameters": "raw" if run.raw else "ema",
             "platforms": PLATFORMS,
             "packages": {name: importlib.metadata.version(name) for name in ("ntm_jax", "jax")},
             "spec": spec_to_json(run.spec), "config": run.config.raw}
    if run.denoiser:
        about["teacher_step"] = run.denoiser.teacher_step
        about["denoiser_step"] = run.denoiser.step
        about["denoiser_config"] = run.denoiser.config and run.denoiser.config.raw
    about |= {"programs": described, "checksums": checksums}
    contents[CONFIG] = (json.dumps(about, indent=2) + "\n").encode()
    _write(folder, contents)
    print(f"{len(contents)} files in {out}, {sum(map(len, contents.values())) / 1e6:.1f} MB, "
          f"of step {run.step}", flush=True)


def _write(folder, contents: dict) -> None:
    """Writes a new folder of files, {name: bytes}, which appears when all are written.

    On object storage, which renames files one by one, they appear in turn.
    """
    part = folder.parent / f"{files.PART}{folder.name}"
    if part.exists():  # of an export that was stopped
        part.rmtree()
    part.mkdir(parents=True)
    for name, content in contents.items():
        files.write(part / name, content)
    part.rename(folder)
