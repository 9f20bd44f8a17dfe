"""The model card of an export, README.md: the model, its figures, and the code that runs it."""

import importlib.metadata

import jax
from etils import epath

from ntm_jax import files
from ntm_jax.evaluation.report import NAMES
from ntm_jax.runtime.run import Run

OWN_NATS = "own_nats = nats - {log_unit:.4f}  # of the density in the data's own units\n"
UNITS = ("| units | `sample.py` writes own units; `sampler.bin` and `log_likelihood.bin` have "
         "standardised columns, (data - mean) / std; a log-density in own units is the "
         "standardised one less sum(log(std)) = {log_unit:.4f} nats |\n")
LIKELIHOOD = ("the importance-weighted estimate of the log {of} in nats from {trajectories} "
              "trajectories, a lower bound in expectation")
# The front matter is what the Hugging Face Hub reads.
CARD = """---
# license: name one here, such as apache-2.0; see "Licence" below
library_name: ntm_jax
pipeline_tag: {task}
tags:
- normalizing-flow
- normalizing-trajectory-model
- image-generation
- jax
---
# A Normalizing Trajectory Model of {source}

A generative model that makes an image in {steps} steps and has an exact likelihood of its
trajectories (Gu et al., [arXiv 2605.08078](https://arxiv.org/abs/2605.08078)), trained with ntm_jax
{version}.

| | |
|---|---|
| data | {source}, split {split}: {count:,} records of {shape} |
{units}| condition | {condition} |
| parameters | {parameters:,}, {kind} |
| training | {training} |
| sampling | {steps} steps, guidance {guidance}, decoder {decoder} |
{figures}
## Use
`python sample.py 16 0` writes 16 images of seed 0 to `samples.npz` and, where they are pixels, as
PNG files to `samples/`. It needs neither ntm_jax nor flax: `pip install jax flatbuffers numpy
safetensors pillow`. It is short, and shows how to call `sampler.bin` from a program of yours.

The compiled programs (StableHLO) run on {platforms}, on one device, with any number of images. They
were made with jax {jax} and run with that version and later ones for at least six months;
`config.json` lists their arguments. `log_likelihood.bin` gives {likelihood}, [n]:

```python
import jax.export
import numpy as np
import safetensors.numpy

parameters = safetensors.numpy.load_file("model.safetensors")
with open("log_likelihood.bin", "rb") as file:
    log_likelihood = jax.export.deserialize(bytearray(file.read()))
# The noise of image i is keyed by the seed and index[i]; {names}: as in sample.py.
nats = log_likelihood.call(parameters, np.uint32(0), index, images, {names})
{own_nats}```

`sample.py` and the two `.bin` files are programs: run them only if you trust their origin.
`model.safetensors` and `config.json` are data. ntm_jax reads these two alone:
`ntm_jax.load("THIS_FOLDER")` gives the model back, with its samples and likelihoods, and
`--config.init_from=THIS_FOLDER` starts a new run of the same model from its parameters. Both take
`hf://OWNER/NAME` for a repository of the Hugging Face Hub that holds these files.

## Licence
Choose a licence for the parameters and name it here: they were learned from the data named above,
whose terms may restrict their use. `sample.py` is part of ntm_jax, under Apache 2.0.
"""


def markdown(run: Run, parameters: int, platforms) -> str:
    """README.md of the export of a run with this number of parameters."""
    config, spec, sample, denoiser = run.config, run.spec, run.config.sample, run.denoiser
    shape, units, data = " x ".join(map(str, spec.image_shape)) + " latents", "", "latents"
    if spec.pixel_levels:
        shape = f"{' x '.join(map(str, spec.image_shape))} pixels of {spec.pixel_levels} levels"
    elif spec.columns:
        shape, data = f"{spec.columns} columns", "standardised columns"
        units = UNITS.format(log_unit=spec.log_unit)
    elif spec.mean:
        data = "latents, of mean 0 and variance 1 by channel,"
    average = f"their moving average (decay {config.optimizer.ema_decay})"
    steps = denoiser.teacher_step if denoiser else run.step
    training = f"{steps:,} steps of {config.data.batch_size} examples, {config.train.objective}"
    density = f"density of the {data} noised to {config.trajectory.t_min}"
    return CARD.format(
        task=run.condition.task,
        source=config.data.source, split=config.data.split, count=spec.count,
        shape=shape, units=units,
        own_nats=OWN_NATS.format(log_unit=spec.log_unit) if spec.columns else "",
        condition=run.condition.describe(), parameters=parameters,
        kind="the raw ones" if run.raw else average,
        training=training + (f"; then {denoiser.step:,} steps of a denoiser" if denoiser else ""),
        steps=sample.steps, guidance=sample.guidance, decoder=sample.decoder, figures=figures(run),
        names=", ".join(run.model.config.condition.shapes(1)),
        likelihood=LIKELIHOOD.format(
            of="probability of the pixels" if spec.pixel_levels else density,
            trajectories=config.evaluate.trajectories),
        platforms=", ".join(platforms), jax=jax.__version__,
        version=importlib.metadata.version("ntm_jax"))


def figures(run: Run) -> str:
    """The card's table of the run's evaluation; empty without one of this step and parameters."""
    names = ["evaluation.json", f"evaluation-{run.step}.json"]
    if run.raw:
        names += ["evaluation-raw.json", f"evaluation-{run.step}-raw.json"]
    for name in names:
        path = epath.Path(run.workdir) / name
        result = files.read_json(path, "evaluate the run again") if path.exists() else None
        if result and result["step"] == run.step and result["provenance"]["parameters"] == (
                "raw" if run.raw else "ema"):
            return _table(result, bool(run.spec.columns))
    return ""


def _table(result: dict, array: bool) -> str:
    unit, name = next((unit, name) for unit, name in NAMES.items() if unit in result)
    # Bounds on an array's density are in own units; the terms of a trajectory are not.
    own, standardised = (", in own units", ", standardised") if array else ("", "")
    rows = []
    for key, noised in (("clean_nats_per_dim", ""), (unit, " at t_0" * (unit == "nats_per_dim"))):
        if key in result:
            weighted = result[key]["importance_weighted"]
            kind = f"importance-weighted bound{noised} ({weighted['trajectories']} trajectories)"
            rows += [(f"bound{noised}, {name}{own}", result[key]["bound"]),
                     (f"{kind}, {name}{own}", weighted)]
    rows += [(f"trajectory NLL, nats/dim{standardised}", result["trajectory_nll"])]
    steps = result["provenance"]["config"]["sample"]["steps"]
    head = f"| {result['count']:,} records of split {result['split']}, {steps} steps | |"
    lines = [f"| {text} | {value['mean']:.4f} ± {value['stderr']:.4f} |" for text, value in rows]
    return "\n" + "\n".join([head, "|---|---|", *lines]) + "\n"
