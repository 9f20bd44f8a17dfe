"""The model card of an export, README.md: what the model is, its figures, and the code that runs it."""

import importlib.metadata
import warnings

import jax
from etils import epath

from ntm_jax import files
from ntm_jax.errors import first_line
from ntm_jax.evaluation.report import NAMES

CONDITIONS = {  # the names of the sampler's last arguments, and the lines of Python that make them
    "class": ("label", "label = index % {classes}  # each of the {classes} classes in turn"),
    "none": ("label", "label = np.zeros(number, np.int32)  # the model is told nothing"),
    "text": ("text, text_mask", "text = np.zeros((number, {tokens}, {width}), np.float16)  # a text encoder's states, zeros behind\n"
                                "text_mask = np.zeros((number, {tokens}), bool)  # true on a text's own tokens; none: the null caption"),
}
EXAMPLE = """{json}import jax.export
import numpy as np
from safetensors.numpy import load_file

number, seed = 16, {seed}
index = np.arange(number, dtype=np.int32)  # image i of a seed is the same image in any company
{condition}
parameters = load_file("model.safetensors")
with open("sampler.bin", "rb") as file:
    sampler = jax.export.deserialize(bytearray(file.read()))
images = np.asarray(sampler.call(parameters, np.uint32(seed), index, {names}))  # {meaning}
{unscale}"""
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
It first compares the files with their SHA-256 digests in `config.json`. Without that check it is, in this folder:

```python
{example}```

The compiled programs (StableHLO) run on {platforms}, on one device, with any number of images. They were made with jax {jax}
and run with that version and later ones for at least six months; `config.json` holds their arguments.
`log_likelihood.bin` gives {likelihood}, [b]:

```python
with open("log_likelihood.bin", "rb") as file:
    log_likelihood = jax.export.deserialize(bytearray(file.read()))
nats = log_likelihood.call(parameters, np.uint32(seed), index, images, {names})  # the noise of image i is keyed by seed and index[i]
```

`sample.py` and the two `.bin` files are programs: run them only if you trust where they come from. `model.safetensors` and `config.json`
are data. ntm_jax reads these two alone: `ntm_jax.load("THIS_FOLDER")` gives the model back, with its samples and likelihoods, and
`--config.init_from=THIS_FOLDER` starts a new run of the same model from its parameters.

## Licence
The programs and the script are under Apache 2.0, as is ntm_jax. The parameters were learned from the data named above, whose terms may
bind their use.
"""
MEANING = {True: "[n, H, W, C], integers 0..{top}", False: "[n, H, W, C], latents"}
UNSCALE = """with open("config.json", "rb") as file:
    spec = json.load(file)["spec"]  # the model's latents have mean 0 and variance 1 by channel
images = images * np.float32(spec["std"]) + np.float32(spec["mean"])  # as the autoencoder made them
"""


def example(run) -> str:
    """The Python that samples an export, run in its folder."""
    names, line = CONDITIONS[run.config.model.condition]
    spec, scaled = run.spec, bool(run.spec.mean)
    return EXAMPLE.format(
        seed=run.config.seed, names=names, meaning=MEANING[spec.levels > 0].format(top=spec.levels - 1),
        condition=line.format(classes=run.model.config.num_classes, tokens=spec.text_tokens, width=spec.text_width),
        unscale=UNSCALE if scaled else "", json="import json\n\n" if scaled else "")


def markdown(run, parameters: int, platforms) -> str:
    """README.md of the export of a load.Run with this number of parameters."""
    config, spec, s = run.config, run.spec, run.config.sample
    size = " x ".join(map(str, spec.image_shape))
    kind = "the raw ones" if run.raw else f"their moving average (decay {config.optimizer.ema_decay})"
    told = {"class": f"one of {run.model.config.num_classes} classes", "none": "nothing", "text": "the states of a text encoder"}
    latents = f"latents{', of mean 0 and variance 1 by channel,' if spec.mean else ''} noised to {config.trajectory.t_min}"
    bound = f"the importance-weighted lower bound on the log {'probability of the pixels' if spec.levels else f'density of the {latents}'}"
    training = f"{run.denoiser.teacher_step if run.denoiser else run.step:,} steps of {config.data.batch_size} examples, {config.train.objective}"
    if run.denoiser:
        training += f"; then {run.step:,} steps of a denoiser, {sum(a.size for a in jax.tree.leaves(run.denoiser.params)):,} of the parameters"
    return CARD.format(
        source=config.data.source, split=config.data.split, count=spec.count, told=told[config.model.condition], parameters=parameters,
        shape=f"{size} pixels of {spec.levels} levels" if spec.levels else f"{size} latents", kind=kind, training=training, steps=s.steps,
        guidance=s.guidance, decoder=s.decoder, example=example(run), version=importlib.metadata.version("ntm_jax"), jax=jax.__version__,
        platforms=", ".join(platforms), figures=figures(run), names=CONDITIONS[config.model.condition][0],
        likelihood=f"{bound} in nats, of {config.evaluate.trajectories} trajectories")


def figures(run) -> str:
    """The card's rows of the run's evaluation, empty where there is none of this step and these parameters.

    An evaluation that cannot be read is left out, with a warning.
    """
    for name in ("evaluation.json", f"evaluation-{run.step}.json"):
        path = epath.Path(run.workdir) / name
        try:
            result = files.parse_json(path.read_bytes()) if path.exists() else {}
            if result and result["step"] == run.step and result["provenance"]["parameters"] == ("raw" if run.raw else "ema"):
                return _rows(result)
        except (OSError, LookupError, TypeError, ValueError, AttributeError, StopIteration, OverflowError) as error:
            warnings.warn(f"{path} is left out of the model card, since it cannot be used ({type(error).__name__}: {first_line(error)}): "
                          "evaluate the run again to have its figures there", stacklevel=2)
    return ""


def _rows(result: dict) -> str:
    unit, name = next((unit, name) for unit, name in NAMES.items() if unit in result)
    bound, weighted, steps = result[unit]["bound"], result[unit]["importance_weighted"], result["provenance"]["config"]["sample"]["steps"]
    rows = [(f"bound, {name}", bound, 1), (f"importance-weighted bound ({weighted['trajectories']} trajectories), {name}", weighted, 1),
            ("trajectory NLL, nats/dim", result["trajectory_nll"], 1)]
    if "class_accuracy" in result:
        rows.append((f"class accuracy of {result['class_accuracy']['images']:,} samples, %", result["class_accuracy"], 100))
    lines = [f"| {text} | {scale * v['mean']:.4f} ± {scale * v['stderr']:.4f} |" for text, v, scale in rows]
    return f"\n| {result['count']:,} records of split {result['split']}, {steps} steps | |\n|---|---|\n" + "\n".join(lines) + "\n"
