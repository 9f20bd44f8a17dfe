"""Every setting of an experiment: its name, its default, and what it means.

An experiment starts from get_config() and overrides what differs. Every setting is a flag of the
programs, written --config.section.key=value. By itself this file is a small class-conditional NTM
of made-up data.
"""

import ast
import copy
import io
import pathlib
import tokenize
import typing
from typing import Any

import ml_collections
from ml_collections import config_dict

SETTINGS = dict(
    seed=0,  # seed of parameters, data order, noise and samples; from 0 to 2^32 - 1
    init_from="",  # starting point: run, WORKDIR/checkpoints/STEP, export, hf://OWNER/NAME, weights
    teacher="",  # run that objective=denoiser distils: its folder or WORKDIR/checkpoints/STEP
    data=dict(
        source="mock:8x8x1,levels=17,classes=10",  # digits, folder:PATH, tfds:NAME, toy:NAME, ...
        split="train",  # training split, with an optional slice such as train[:1350]
        batch_size=32,  # examples per step, over all devices and processes
        patch_size=1,  # side of the square of pixels or latents that forms one token
        image_size=0,  # resizes images to this side, in pixels; 0 keeps the stored size
        workers=0,  # processes that read data; 0 reads in the training process
        mock="",  # made-up data of the same shape, for compiling where the source is absent
        text="",  # text encoder: words:M:VOCABULARY, minilm[:M], transformers:FOLDER, flux2:FOLDER
        token_size=1,  # columns of an array [n, D] that form one token; divides their number
    ),
    trajectory=dict(
        schedule="shifted",  # spacing of noise levels: linear, shifted
        shift=None,  # shift of schedule=shifted; None derives it from the number of tokens
        steps=(4,),  # tuple of step counts T, trained together
        t_min=0.04,  # noise level of x_0 in evaluation and sampling, in (0, 1)
        t_min_range=(0.03, 0.05),  # range of the noise level of x_0 in training, uniform
    ),
    model=dict(
        width=128,  # width of the predictor, a multiple of head_size
        head_size=32,  # width of one attention head
        kv_heads=4,  # key and value heads; divides the number of heads, width / head_size
        mlp_ratio=4,  # hidden width of an MLP, in multiples of the layer's width
        positions="learned",  # position encoding: learned, rotary
        transporter_width=128,  # width of the transporter, a multiple of head_size
        transporter_blocks=2,  # invertible blocks; 0 is Gaussian denoising without transporter
        transporter_layers=2,  # transformer layers in each block
        transporter_text=False,  # with condition=text, conditions the transporter on the mean token
        transporter_positions_std=0.02,  # initial std of the transporter's position table
        predictor_layers=4,  # transformer layers of the predictor
        head="preconditioned",  # parametrisation of the Gaussian: direct, preconditioned, posterior
        log_scale_bound=3.0,  # largest absolute log-scale of a transporter block
        data_std=1.0,  # standard deviation of the data, for preconditioning
        condition="class",  # what the model is conditioned on: none, class, text, vector
        condition_layers=0,  # with condition=vector, residual MLPs that compute features of it
        condition_shift=False,  # with condition=vector, first subtracts a linear function of it
        backbone="transformer",  # network of head=posterior: transformer, flow_map, flux2
        double_layers=0,  # two-stream layers of backbone=flux2, before the predictor_layers
        dtype="float32",  # type of activations in training: float32, bfloat16
        remat="none",  # what the backward pass recomputes: none, full, narrow, dots
        scan=False,  # scans stacked layers: compiles faster; small models on CPUs run slower
    ),
    train=dict(
        objective="end_to_end",  # pairwise, flow_matching, flow_map, denoiser, preference, ...
        steps=2000,  # optimizer steps
        save_every=500,  # steps between checkpoints
        save_minutes=10.0,  # longest time between checkpoints; 0 saves by steps alone
        evaluate_every=500,  # steps between held-out evaluations; 0 evaluates at the end only
        log_every=50,  # steps between lines of metrics
        keep=0,  # also keeps every Nth step's checkpoint; 0 keeps the last three and the best
        accumulate=1,  # parts into which a batch is split to save memory; the step is the same
        condition_dropout=0.1,  # probability of the null condition, needed for guidance; [0, 1)
        align_weight=0.0,  # lambda, annealed to 0: keeps means near those of the init_from model
        level_power=0.0,  # p: weights each level's loss by t_k^p; 0 weights all levels equally
    ),
    reward=dict(
        name="",  # what scores samples: shapes, classifier[:FILE], or a registered reward
        samples=8,  # samples of each condition of a batch, whose rewards are compared
        updates=1,  # optimizer steps on the same samples
        ahead=False,  # draws the next batch's samples while the present ones are scored
        clip=0.2,  # bounds the ratio of new to old density of a factor to 1 - clip, 1 + clip
        kl=0.0,  # weight of the divergence from the reference model, in rewards per nat; DPO's beta
        novelty=0.0,  # bonus for right samples with a rare trait, over how many show it
        diversity=0.0,  # bonus for each sample's mean distance to its condition's others
        normalise=True,  # divides advantages by the std of a condition's rewards
        anchor=0.5,  # weight of the NLL on the batch's data, which keeps the model near them
        trains="predictor",  # what learns: predictor, transporter, both
        levels=(),  # first and last level, between which steps learn from rewards; () for all
        workers=0,  # processes that score samples; 0 scores them in the training process
    ),
    optimizer=dict(
        learning_rate=2e-3,  # peak learning rate, after the warmup
        floor=1e-6,  # learning rate at the end, at most the peak
        warmup_steps=100,  # steps from 0 to the peak
        weight_decay=0.1,  # decoupled weight decay of AdamW
        clip=1.0,  # largest global norm of the gradient
        ema_decay=0.999,  # decay of the parameters' moving average, in [0, 1)
    ),
    mesh=dict(
        slices=1,  # TPU slices or NVLink domains; each holds 1/slices of the data axis
        data=-1,  # devices that split the batch; -1 infers one axis from the device count
        fsdp=1,  # devices that split the batch, parameters and optimizer state
        tensor=1,  # devices that split heads and MLPs
        sequence=1,  # devices that split tokens
    ),
    evaluate=dict(
        split="test",  # held-out split, with an optional slice
        trajectories=8,  # trajectories per example, for the importance-weighted bound
        batch_size=100,  # examples per evaluation step, over all devices and processes
        images=0,  # samples to score against the training images; 0 scores none
        features="none",  # what scores compare: none, pixels, cnn, inception
    ),
    sample=dict(
        num=100,  # images of a grid or a call of launch.sample
        steps=4,  # step count T, or steps of a flow-matching model's ODE solver
        guidance=0.0,  # scale w, or one per step from noise down: (1.0, 0.5, 0.0, 0.0)
        decoder="score",  # last step: inverse, score, denoiser; ODE of flow matching: euler, heun
        inverse="auto",  # inverts the transporter: auto, parallel, sequential
        percentile=100.0,  # clips the gradient of decoder=score at this percentile; 100 clips none
    ),
)
ANY_TYPE = (("trajectory", "shift"), ("sample", "guidance"))  # several types: see config.read


def get_config() -> ml_collections.ConfigDict:
    """Returns all settings at their defaults, locked: unknown keys and other types are refused."""
    settings: dict = copy.deepcopy(SETTINGS)
    for section, key in ANY_TYPE:
        value = settings[section][key]
        settings[section][key] = ml_collections.FieldReference(value, object)
    return ml_collections.ConfigDict(settings).lock()


def documented() -> list[tuple[str, str, str]]:
    """Returns (section.key, default, meaning) of every setting, as this file has them."""
    source = pathlib.Path(__file__).read_text()
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string.lstrip("# ") for token in tokens
                if token.type == tokenize.COMMENT}
    assigned = {ast.unparse(node.targets[0]): node.value for node in ast.parse(source).body
                if isinstance(node, ast.Assign)}
    rows, every = [], typing.cast(ast.Call, assigned["SETTINGS"])
    for entry in every.keywords:
        section = entry.value.keywords if isinstance(entry.value, ast.Call) else None
        for setting in section or [entry]:
            name = f"{entry.arg}.{setting.arg}" if section else setting.arg
            default = ast.get_source_segment(source, setting.value)
            rows.append((name, default, comments[setting.value.end_lineno or 0]))
    return rows


def leave_open(c: ml_collections.ConfigDict, *keys: str):
    """Sets settings, given as section.key, to None: data/choices.py chooses them for the data."""
    for key in keys:
        section, name = key.split(".")
        values: Any = c[section]
        kind = object if (section, name) in ANY_TYPE else type(values[name])
        values[name] = config_dict.placeholder(kind)


def check_variant(file: str, variant: str, *variants: str):
    """Raises ValueError if `variant`, given after a colon to an experiment's file, is unknown."""
    if variant not in variants:
        *names, last = [name for name in variants if name] + ["none"] * ("" in variants)
        expected = f"{', '.join(names)} or {last}" if names else last
        file = pathlib.Path(file).name
        raise ValueError(f"{file}:{variant} is not a variant: expected {expected}")


def shrink(c: ml_collections.ConfigDict):
    """Shrinks a run to four steps of few examples and one transporter block: seconds on a CPU."""
    c.update(
        data=dict(batch_size=8, workers=0, mock=""),
        model=dict(dtype="float32", remat="none", scan=False, transporter_blocks=1),
        train=dict(steps=4, save_every=2, evaluate_every=0, log_every=1, keep=0),
        optimizer=dict(warmup_steps=1),
        mesh=dict(fsdp=1),
        evaluate=dict(split="test[:16]", trajectories=2, batch_size=16),
        sample=dict(num=16),  # as many as an evaluation draws: one program serves both
    )
