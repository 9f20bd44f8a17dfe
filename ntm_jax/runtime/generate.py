"""Images from a model: sampled by index, so that image i is the same image whatever the batch, mesh or number of processes."""

import dataclasses
import functools
import hashlib
import json
import math
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from etils import epath
from jax.experimental import multihost_utils

from ntm_jax import files
from ntm_jax.core import denoising, flow_matching, layers, sampling
from ntm_jax.core.layers import Text, null
from ntm_jax.core.trajectory import example_noise, per_example
from ntm_jax.data import latents, transforms
from ntm_jax.data.pipeline import DataSpec
from ntm_jax.errors import UserError
from ntm_jax.runtime import checkpoint, distill, plots, processes, prompts, sharding, state
from ntm_jax.runtime import config as configuration
from ntm_jax.runtime.config import SOLVERS, Config


@functools.partial(jax.jit, static_argnames=("config", "model", "steps", "guidance", "decoder", "inverse", "trajectory", "denoiser"))
def _generate(params, root, index, y, denoiser_params=None, *, config, model, steps, guidance, decoder, inverse, trajectory,
              denoiser=None):
    if decoder in SOLVERS:
        noise = example_noise(state.example_keys(root, "sample", index), (model.config.tokens, model.config.dim))
        t = state.levels(config, model, steps, jnp.zeros(len(index)))
        with layers.precision(model.config.precision):
            xs = flow_matching.solve(
                model.backbone, flow_matching.backbone_params(params), noise, t, y,
                null(y, model.config.num_classes), guidance, decoder == "heun")
        return xs[:, 0], xs if trajectory else None
    t = state.levels(config, model, steps, jnp.full(len(index), config.trajectory.t_min))
    us = sampling.sample_latents(model, params, state.example_keys(root, "sample", index), t, y, guidance)
    xs = sampling.invert_trajectory(model, params, us, t, y, inverse) if trajectory or decoder == "score" else None
    if decoder == "denoiser":
        x = distill.denoise(state.exact(denoiser), denoiser_params, us[:, 0], t[:, 0], steps, y)
    elif decoder == "score":
        x = denoising.score_denoise(model, params, xs, t, y, config.sample.percentile)
    else:
        x_0 = xs[:, 0] if trajectory else sampling.invert_level(model, params, us, t, y, 0, inverse)
        x = x_0 / (1 - per_example(t[:, 0], x_0))
    return x, xs if trajectory else None


@functools.lru_cache(maxsize=2)
def _records(data, split: str):
    """The records of a split, opened once for all batches."""
    return data.open(split).records


def conditions(config: Config, model, index):
    """What the images of these indices show if nothing is asked for: the classes in turn, or the texts of the held-out records in turn."""
    if not model.config.text_width:
        return index % max(model.config.num_classes, 1)
    records = _records(config.data, config.evaluate.split)
    chosen = [records[int(i) % len(records)] for i in index]
    return Text(*(np.stack([record[name] for record in chosen]) for name in ("text", "text_mask")))


def generate(config: Config, model, params, spec: DataSpec, mesh, index, y=None, *, seed: int | None = None, steps: int | None = None,
             guidance: float | tuple[float, ...] | None = None, decoder: str | None = None, inverse: str | None = None,
             trajectory: bool = False, denoiser=None):
    """Samples of the image indices index [n] on condition y, labels [n] or Text; see conditions for what it is if not given.

    seed, steps, guidance (see sampling.sample_latents), decoder and inverse are the configuration's unless given; denoiser: see load.Run.
    Returns images [n, H, W, C], uint8, or float32 latents where the data are; with trajectory also the levels from pure noise down,
    [n, K, H, W, C].
    """
    decoder = config.sample.decoder if decoder is None else decoder
    check_decoder(config, decoder, denoiser)
    module, denoiser_params = denoiser if decoder == "denoiser" else (None, None)
    index = np.asarray(index, np.int32)
    y = conditions(config, model, index) if y is None else y
    count, s = len(index), config.sample
    index, y = sharding.place((index, y if isinstance(y, Text) else np.asarray(y, np.int32)), mesh)
    with sharding.use(mesh):
        x, xs = _generate(
            params, jax.random.key(config.seed if seed is None else seed), index, y, denoiser_params, denoiser=module,
            config=config, model=state.exact(model), steps=s.steps if steps is None else steps,
            guidance=s.guidance if guidance is None else guidance, decoder=decoder,
            inverse=s.inverse if inverse is None else inverse, trajectory=trajectory)

    def images(tokens):
        values = transforms.unpatchify(sharding.to_host(tokens)[:count], spec.image_shape, spec.patch_size)
        return transforms.unscale(values, spec.levels) if spec.levels else values

    return (images(x), images(xs)[:, ::-1]) if trajectory else images(x)


def check(config: Config, steps: int | None, guidance: float | tuple[float, ...] | None) -> None:
    """UserError for a guidance that is negative, not one scale for each step, or that the model was not trained for; a warning for a number
    of steps that it was not trained with. None: the configuration's."""
    asked = config.sample.guidance if guidance is None else guidance
    configuration.check_guidance("guidance", asked, config.sample.steps if steps is None else steps)
    if min(asked if isinstance(asked, tuple) else (asked,)) < 0:
        raise UserError(f"guidance is {asked}: expected numbers that are not negative")
    if configuration.guided(guidance) and not config.train.condition_dropout:
        raise UserError(f"guidance is {guidance}, and the model was trained without condition dropout: sample with guidance 0")
    if steps is not None and steps not in config.trajectory.steps and config.train.objective != "flow_matching":
        trained = ", ".join(map(str, config.trajectory.steps))
        warnings.warn(f"{steps} steps were not trained, only {trained}: expect worse images", stacklevel=2)


def check_decoder(config: Config, decoder: str | None, denoiser) -> None:
    """UserError where images are asked of a denoiser or an ODE and the run has none."""
    if decoder in SOLVERS and config.train.objective != "flow_matching":
        raise UserError(f"decoder={decoder} solves the ODE of a flow-matching model, and this run is none: take inverse or score")
    if decoder == "denoiser" and not denoiser:
        raise UserError("decoder=denoiser needs a denoiser, and this run has none: give as --workdir the run of one, trained with "
                        "experiments/digits_denoiser.py and --config.teacher")


def displayable(images, levels: int) -> np.ndarray:
    """Pixel values 0..levels-1 [..., C] -> 0..255. Of latents (levels 0), the first three channels in false colours, -3 to 3."""
    if not levels:
        shown = np.asarray(images)[..., : 3 if np.shape(images)[-1] >= 3 else 1]
        return ((shown.clip(-3, 3) + 3) * (255 / 6)).round().astype(np.uint8)
    return (np.asarray(images, np.float32) * (255 / (levels - 1))).round().astype(np.uint8)


def picture(images, levels: int, columns: int = 10) -> np.ndarray:
    """One grid [H, W, C] of images [n, H, W, C], small ones enlarged."""
    return plots.image_grid(displayable(images, levels), min(len(images), columns), max(1, 64 // images.shape[1]))


def in_batches(n: int, batch: int) -> list[np.ndarray]:
    """Image indices 0..n-1, `batch` at a time."""
    return [np.arange(start, min(start + batch, n)) for start in range(0, n, batch)]


def parse_guidance(scales) -> float | tuple[float, ...] | None:
    """The flag --guidance -> one scale, or a tuple of one for each step; None where it was not given. UserError for what is no number."""
    if not scales:
        return None
    try:
        scales = tuple(float(scale) for scale in scales)
    except ValueError:
        scales = (math.nan,)
    if not all(map(math.isfinite, scales)):
        raise UserError("--guidance takes a number, or one for each step, such as 1,0.5,0,0")
    return scales[0] if len(scales) == 1 else scales


def parse_labels(names, num_classes: int) -> np.ndarray | None:
    """The flag --labels -> integers; None where it was not given. UserError for a label that is no class of the model."""
    if not names:
        return None
    for name in names:
        if not (name.isdecimal() and int(name) < num_classes):
            expected = f"0 to {num_classes - 1}" if num_classes else "none, since it is told of no classes"
            raise UserError(f"label {name!r} is not a class of the model: expected {expected}")
    return np.array([int(name) for name in names], np.int32)


def write_samples(run, out: str, num: int, batch: int, labels=None, save_trajectories: bool = False, autoencoder: str | None = None,
                  asked_for=None, layout: str | None = None, encoder: str | None = None, **options) -> None:
    """Writes `num` images of a run into a folder: PNG files, grid.png, and samples.npz (ADM's layout, arr_0: uint8 [n, H, W, 3], or
    latents as they are, arr_1: labels, or numbers of prompts); with save_trajectories trajectories.npz (arr_0: [n, K, H, W, C] from pure
    noise down).

    autoencoder: the folder of FLUX.2's, which decodes the latents to images (not those of the trajectories).
    asked_for: prompts, see prompts.parse, of which each is shown num / len(asked_for) times; layout: geneval or dpg, the folders
      of a benchmark; encoder: see prompts.encoder. Beside the images then lie contact_sheet.png and prompts.jsonl.

    What a stopped call has written there is kept, and the rest made: to the bit what an uninterrupted call makes. UserError where the
    folder holds anything else, other samples among it; nothing is overwritten.
    """
    folder = epath.Path(out)
    check(run.config, options.get("steps"), options.get("guidance"))
    check_decoder(run.config, options.get("decoder"), run.denoiser)
    if labels and run.model.config.text_width:
        raise UserError(f"--labels are given, and the model of {run.workdir} is told texts: give --prompts")
    labels = parse_labels(labels, run.model.config.num_classes)
    if autoencoder and run.spec.levels:
        raise UserError(f"{run.workdir} is of pixels, and an autoencoder decodes latents: leave --autoencoder out")
    encode = prompts.encoder(run, encoder) if asked_for else None
    per_prompt = num // len(asked_for) if asked_for else 1
    vae = latents.Autoencoder(autoencoder) if autoencoder and jax.process_index() == 0 else None
    pixel_levels = latents.LEVELS if autoencoder else run.spec.levels
    prompts.check_layout(layout, asked_for, per_prompt, run.spec.image_shape)
    asked = {"--workdir": run.workdir, "step": run.step, "--num": num, "--batch": batch, "--save_trajectories": save_trajectories,
             "--labels": None if labels is None else labels.tolist(), "--autoencoder": autoencoder, "--layout": layout,
             "--prompts": asked_for and _described(asked_for), "--encoder": encode and encode.name,
             **{f"--{name}": value for name, value in options.items()}}
    # Here no process has written yet: one that came late would find its own job's files.
    processes.agree({"--out": out} | asked)
    asked |= {"checksum": checkpoint.digest((run.params, run.denoiser and run.denoiser[1]))}
    batches = in_batches(num, batch)
    done = _claim(folder, asked, len(batches))
    begin, made, first = time.perf_counter(), 0, 0
    for number, index in enumerate(tqdm.tqdm(batches, "sample", unit="batch", disable=None)):
        if done[number]:
            continue
        y = None if labels is None else np.resize(labels, num)[index]
        if asked_for:
            y = prompts.states(encode, [asked_for[i // per_prompt].text for i in index])
        found = run.sample_at(index, y, trajectory=save_trajectories, **options)
        if jax.process_index() == 0:
            images, *levels = found if save_trajectories else (found,)
            images = vae.decode(images * np.float32(run.spec.std or 1) + np.float32(run.spec.mean or 0)) if vae else images
            paths = [prompts.place(folder, layout, i, per_prompt, num) for i in index]
            _write_batch(folder, number, paths, (images, *levels), pixel_levels)
        made += len(index)
        if not first:  # it compiled
            begin, first = time.perf_counter(), made
    if jax.process_index() == 0 and not (folder / "samples.npz").exists():
        if labels is not None:
            shown = np.resize(labels, num)
        else:
            shown = np.arange(num) // per_prompt if asked_for else np.arange(num) % max(run.model.config.num_classes, 1)
        _gather(folder, run, shown, len(batches), pixel_levels, asked_for, layout)
    if jax.process_index() == 0:
        rate = f", {(made - first) / (time.perf_counter() - begin):.1f} images/s after the first batch" if made > first else ""
        print(f"{num} images in {out}, {num - made} of them found there{rate}, step {run.step}", flush=True)


def _described(asked_for) -> str:
    """Prompts in a few words: their number and digest."""
    content = json.dumps([dataclasses.astuple(prompt) for prompt in asked_for])
    return f"{len(asked_for)} of digest {hashlib.sha256(content.encode()).hexdigest()[:16]}"


def _claim(folder, asked: dict, batches: int) -> np.ndarray:
    """Which batches the folder holds already, [batches]; the same in every process. UserError where it holds what was not asked for."""
    path, finished = folder / "samples.json", (folder / "samples.npz").exists()
    if path.exists():
        before = files.read_json(path, "give another --out")
        for key in sorted(before | asked):
            if before.get(key) != files.plain(asked.get(key)):
                raise UserError(f"{folder} holds samples of {key} {before.get(key)!r}, and this call has {asked.get(key)!r}: give another "
                                "--out, or the same settings to go on; nothing was overwritten")
    elif folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is there and not empty: give a new folder as --out, nothing was overwritten")
    done = np.array([finished or _part(folder, number).exists() for number in range(batches)])
    done = multihost_utils.broadcast_one_to_all(done)  # of process 0: a folder of another host may lag behind
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        files.write_json(path, asked, sealed=True)
    return done


def _part(folder, number: int):
    return folder / f"part-{number:06d}.npz"


def _write_batch(folder, number, paths, arrays, levels) -> None:
    """A batch's PNG files, and then its arrays, whole or not at all: what says that the batch is done."""
    for path, image in zip(paths, displayable(arrays[0], levels), strict=True):
        plots.save_png(path, image)
    with files.aside(_part(folder, number)) as file:
        np.savez(file, *arrays)


def _gather(folder, run, labels, batches, pixel_levels, asked_for, layout) -> None:
    """The files of all images, from those of the batches, which are removed; labels [n]."""
    arrays = []
    for number in range(batches):
        with _part(folder, number).open("rb") as file, np.load(file, allow_pickle=False) as part:
            arrays.append([part[name] for name in part.files])
    images, *levels = (np.concatenate(a) for a in zip(*arrays, strict=True))
    shown = displayable(images, pixel_levels) if pixel_levels else images
    if levels:
        with files.aside(folder / "trajectories.npz") as file:
            np.savez(file, displayable(levels[0], run.spec.levels) if run.spec.levels else levels[0])
    plots.save_png(folder / "grid.png", picture(images[:100], pixel_levels))
    if asked_for:
        prompts.write_pictures(folder, layout, asked_for, displayable(images, pixel_levels))
    with files.aside(folder / "samples.npz") as file:
        np.savez(file, np.repeat(shown, 3, -1) if shown.shape[-1] == 1 else shown, labels)
    for number in range(batches):
        _part(folder, number).unlink()
