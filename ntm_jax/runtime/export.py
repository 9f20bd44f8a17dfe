"""A run as a folder that needs none of this package: its parameters as safetensors, compiled programs (StableHLO) that take them as an
argument, its configuration, a model card and an example script. And the way back: a new run that starts from such parameters.

b batch, H, W, C image height, width and channels; V pixel levels; M text tokens, E their width.
"""

import dataclasses
import importlib.metadata
import json
import uuid

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from ntm_jax.core.layers import Text
from ntm_jax.data import transforms
from ntm_jax.errors import UserError
from ntm_jax.runtime import checkpoint, evaluate, generate, processes, sharding, state

FORMAT = 1
PLATFORMS = ("cpu", "cuda", "tpu")
WEIGHTS = "model.safetensors"


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


DENOISER = "denoiser"


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
    told = programs(run)
    files = {f"{name}.bin": compiled(*program) for name, program in told.items()}
    files[WEIGHTS] = safetensors.numpy.save({name: np.ascontiguousarray(a) for name, a in flat.items()}, {"format": "ntm_jax"})
    about = {"format": FORMAT, "step": run.step, "parameters": "raw" if run.raw else "ema", "platforms": PLATFORMS,
             "programs": {name: _described(arguments) for name, (_, arguments) in told.items()}, "checksums": checksums,
             "packages": {name: importlib.metadata.version(name) for name in ("ntm_jax", "jax")},
             "spec": dataclasses.asdict(run.spec), "config": run.config.raw} | ({"teacher_step": run.teacher_step} if run.denoiser else {})
    files["config.json"] = (json.dumps(about, indent=2) + "\n").encode()
    script = _script(run)
    files |= {"sample.py": script.encode(), "README.md": _card(run, sum(a.size for a in flat.values()), script).encode()}
    _write(folder, files)
    print(f"{len(files)} files in {out}, {sum(map(len, files.values())) / 1e6:.1f} MB, of step {run.step}", flush=True)


def _write(folder, files: dict) -> None:
    """A new folder of files, {name: bytes}, that is there whole or not at all."""
    part = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.part"
    try:
        part.mkdir(parents=True)
        for name, content in files.items():
            (part / name).write_bytes(content)
        part.rename(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error}): give another --out") from None
    finally:
        if part.exists():
            part.rmtree()


def _described(arguments: dict) -> dict:
    """A program's arguments but the parameters, {name: "dtype[shape]"}."""
    return {name: f"{a.dtype}[{','.join(map(str, a.shape))}]" for name, a in arguments.items() if name != "parameters"}


CONDITIONS = {
    "class": ("label", "label = index % {classes}  # each of the {classes} classes in turn"),
    "none": ("label", "label = np.zeros(number, np.int32)  # the model is told nothing"),
    "text": ("text, text_mask", "text = np.zeros((number, {tokens}, {width}), np.float16)  # a text encoder's states, zeros behind\n"
                                "text_mask = np.zeros((number, {tokens}), bool)  # true on a text's own tokens; none: the null caption"),
}
SCRIPT = '''"""Images of this model: python sample.py [NUMBER [SEED]] writes samples.npz. Needs jax, numpy, safetensors and flatbuffers."""

{json}import pathlib
import sys

import jax.export
import numpy as np
from safetensors.numpy import load_file

given = [int(argument) for argument in sys.argv[1:]]
number, seed = given + [16, {seed}][len(given):]
index = np.arange(number, dtype=np.int32)  # image i of a seed is the same image in any company
{condition}

folder = pathlib.Path(__file__).parent
parameters = load_file(folder / "{weights}")
sampler = jax.export.deserialize(bytearray((folder / "sampler.bin").read_bytes()))
images = np.asarray(sampler.call(parameters, np.uint32(seed), index, {names}))  # {meaning}
{unscale}np.savez("samples.npz", images=images)
print(f"{{number}} images {{images.dtype}}{{list(images.shape[1:])}} in samples.npz")
'''
CARD = """---
license: apache-2.0
library_name: jax
tags: [normalizing-flow, image-generation, jax]
---
# A Normalizing Trajectory Model of {source}

A generative model of images that makes one in {steps} steps and has an exact likelihood of its trajectories
(Gu et al., [arXiv 2605.08078](https://arxiv.org/abs/2605.08078)), trained with ntm_jax {version}.

| | |
|---|---|
| data | {source}, split {split}: {count:,} records of {shape} |
| told | {told} |
| parameters | {parameters:,}, {kind} |
| training | {training} |
| images here | {steps} steps, guidance {guidance}, decoder {decoder} |
{figures}
## Use
`python sample.py 16 0` writes 16 images of seed 0. It needs neither ntm_jax nor flax: `pip install jax numpy safetensors flatbuffers`.

```python
{script}```

The compiled programs (StableHLO) run on {platforms}, on one device, with any number of images. They were made with jax {jax}
and run with that version and later ones for at least six months; `config.json` holds their arguments.
`log_likelihood.bin` gives {likelihood}, [b]:

```python
log_likelihood = jax.export.deserialize(bytearray((folder / "log_likelihood.bin").read_bytes()))
nats = log_likelihood.call(parameters, np.uint32(seed), index, images, {names})  # the noise of image i is keyed by seed and index[i]
```

With ntm_jax, `--config.init_from=THIS_FOLDER` starts a new run of the same model from `{weights}`.

## Licence
The programs and the script are under Apache 2.0, as is ntm_jax. The parameters were learned from the data named above, whose terms may
bind their use.
"""
MEANING = {True: "[n, H, W, C], integers 0..{top}", False: "[n, H, W, C], latents"}
UNSCALE = """spec = json.loads((folder / "config.json").read_text())["spec"]  # the model's latents have mean 0 and variance 1 by channel
images = images * np.float32(spec["std"]) + np.float32(spec["mean"])  # as the autoencoder made them
"""


def _condition(run) -> tuple[str, str]:
    """The arguments' names of what the model is told, and the line of sample.py that makes them."""
    names, line = CONDITIONS[run.config.model.condition]
    return names, line.format(classes=run.model.config.num_classes, tokens=run.spec.text_tokens, width=run.spec.text_width)


def _script(run) -> str:
    """sample.py."""
    names, line = _condition(run)
    meaning = MEANING[run.spec.levels > 0].format(top=run.spec.levels - 1)
    scaled = bool(run.spec.mean)
    return SCRIPT.format(seed=run.config.seed, condition=line, names=names, meaning=meaning, weights=WEIGHTS,
                         unscale=UNSCALE if scaled else "", json="import json\n" if scaled else "")


def _card(run, parameters: int, script: str) -> str:
    """README.md."""
    config, spec, s = run.config, run.spec, run.config.sample
    size = " x ".join(map(str, spec.image_shape))
    kind = "the raw ones" if run.raw else f"their moving average (decay {config.optimizer.ema_decay})"
    told = {"class": f"one of {run.model.config.num_classes} classes", "none": "nothing", "text": "the states of a text encoder"}
    latents = f"latents{', of mean 0 and variance 1 by channel,' if spec.mean else ''} noised to {config.trajectory.t_min}"
    bound = f"the importance-weighted lower bound on the log {'probability of the pixels' if spec.levels else f'density of the {latents}'}"
    training = f"{run.teacher_step if run.denoiser else run.step:,} steps of {config.data.batch_size} examples, {config.train.objective}"
    if run.denoiser:
        training += f"; then {run.step:,} steps of a denoiser, {sum(a.size for a in jax.tree.leaves(run.denoiser[1])):,} of the parameters"
    return CARD.format(
        source=config.data.source, split=config.data.split, count=spec.count, told=told[config.model.condition], parameters=parameters,
        shape=f"{size} pixels of {spec.levels} levels" if spec.levels else f"{size} latents", kind=kind, training=training, steps=s.steps,
        guidance=s.guidance, decoder=s.decoder, script=script,
        version=importlib.metadata.version("ntm_jax"), jax=jax.__version__, platforms=", ".join(PLATFORMS), figures=_figures(run),
        likelihood=f"{bound} in nats, of {config.evaluate.trajectories} trajectories", names=_condition(run)[0], weights=WEIGHTS)


def _figures(run) -> str:
    """The card's rows of the run's evaluation, empty where there is none of this step and these parameters."""
    for name in ("evaluation.json", f"evaluation-{run.step}.json"):
        path = epath.Path(run.workdir) / name
        result = json.loads(path.read_text()) if path.exists() else {}
        if result.get("step") == run.step and result.get("provenance", {}).get("parameters") == ("raw" if run.raw else "ema"):
            break
    else:
        return ""
    unit, name = next((unit, name) for unit, name in evaluate.NAMES.items() if unit in result)
    bound, weighted, steps = result[unit]["bound"], result[unit]["importance_weighted"], result["provenance"]["config"]["sample"]["steps"]
    rows = [(f"bound, {name}", bound, 1), (f"importance-weighted bound ({weighted['trajectories']} trajectories), {name}", weighted, 1),
            ("trajectory NLL, nats/dim", result["trajectory_nll"], 1)]
    if "class_accuracy" in result:
        rows.append((f"class accuracy of {result['class_accuracy']['images']:,} samples, %", result["class_accuracy"], 100))
    lines = [f"| {text} | {scale * v['mean']:.4f} ± {scale * v['stderr']:.4f} |" for text, v, scale in rows]
    return f"\n| {result['count']:,} records of split {result['split']}, {steps} steps | |\n|---|---|\n" + "\n".join(lines) + "\n"


def start_from(source: str, config, model, mesh, current):
    """A new run's state with the parameters, as such and as their average, of an export (of a denoiser's run, its teacher's), or of the
    average of a run: its workdir or WORKDIR/checkpoints/STEP. UserError naming the first array that differs where they are another model's.
    """
    abstract = state.abstract(config, model, mesh).params
    folder = epath.Path(source)
    try:
        params = _read(folder, abstract) if (folder / WEIGHTS).exists() else _restored(folder, config, model, mesh)
    except UserError as error:
        raise UserError(f"config.init_from is {source}: {error}") from None
    copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=jax.tree.map(lambda a: a.sharding, abstract))
    return current.replace(params=params, ema=copy(params))  # a step donates both


def _read(folder, abstract):
    """The parameters of an export, each array on the devices of its abstract counterpart, verified."""
    try:
        about = json.loads((folder / "config.json").read_text())
        flat = safetensors.numpy.load((folder / WEIGHTS).read_bytes())
        flat = {name: array for name, array in flat.items() if not name.startswith(f"{DENOISER}/")}
        version, sums = about["format"], about["checksums"]
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
        raise UserError(f"the export is damaged ({type(error).__name__}: {error}); export the run anew") from None
    if version != FORMAT:
        raise UserError(f"the export is of format {version}, and this version of ntm_jax reads {FORMAT}; export the run anew")
    expected = checkpoint.named_leaves(abstract)
    for name in [*expected, *sorted(set(flat) - set(expected))]:
        there, here = (checkpoint.describe(arrays.get(name)) for arrays in (flat, expected))
        if there != here:
            raise UserError(f"it is of another model: array {name} is {there} in the export, {here} in this model; use the configuration "
                            "it was trained with, or another config.init_from")
    params = unflatten({name: jax.make_array_from_callback(a.shape, a.sharding, lambda i, name=name: flat[name][i])
                        for name, a in expected.items()})
    for name, value in checkpoint.checksums(params).items():
        if sums.get(name) != value:
            raise UserError(f"the export is damaged: {name} has checksum {value}, written with {sums.get(name)}; export the run anew")
    return params


def _restored(folder, config, model, mesh):
    """The average of a run's parameters."""
    workdir, step = checkpoint.locate(folder)
    if not (workdir / "checkpoints").exists():
        raise UserError("there is no such export or run: expected an export's folder, a run's, or WORKDIR/checkpoints/STEP")
    return state.restore_params(str(workdir), config, model, mesh, step)[1]
