"""Images from a model: sampled by index, so that image i is the same image whatever the batch, mesh or number of processes."""

import functools
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from etils import epath

from ntm_jax.core import denoising, sampling
from ntm_jax.core.layers import Text
from ntm_jax.core.trajectory import per_example
from ntm_jax.data import sources, transforms
from ntm_jax.data.pipeline import DataSpec
from ntm_jax.errors import UserError
from ntm_jax.runtime import plots, processes, sharding, state
from ntm_jax.runtime.config import Config


@functools.partial(jax.jit, static_argnames=("config", "model", "steps", "guidance", "decoder", "trajectory"))
def _generate(params, root, index, y, *, config, model, steps, guidance, decoder, trajectory):
    t = state.levels(config, model, steps, jnp.full(len(index), config.trajectory.t_min))
    xs = sampling.sample(model, params, state.example_keys(root, "sample", index), t, y, guidance)
    x = denoising.score_denoise(model, params, xs, t, y) if decoder == "score" else xs[:, 0] / (1 - per_example(t[:, 0], xs[:, 0]))
    return x, xs if trajectory else None


def conditions(config: Config, model, index):
    """What the images of these indices show if nothing is asked for: the classes in turn, or the texts of the held-out records in turn."""
    if not model.config.text_width:
        return index % max(model.config.num_classes, 1)
    records = sources.open_source(config.data.source, config.evaluate.split).records
    chosen = [records[int(i) % len(records)] for i in index]
    return Text(*(np.stack([record[name] for record in chosen]) for name in ("text", "text_mask")))


def generate(config: Config, model, params, spec: DataSpec, mesh, index, y=None, *, seed: int | None = None, steps: int | None = None,
             guidance: float | None = None, decoder: str | None = None, trajectory: bool = False):
    """Samples of the image indices index [n] on condition y, labels [n] or Text; see conditions for what it is if not given.

    seed, steps, guidance and decoder are the configuration's unless given. Returns images [n, H, W, C], uint8, or float32 latents where the
    data are; with trajectory also the levels from pure noise down, [n, K, H, W, C].
    """
    index = np.asarray(index, np.int32)
    y = conditions(config, model, index) if y is None else y
    count, shards = len(index), sharding.batch_shards(mesh)

    def place(a):  # the mesh needs whole shards
        a = np.resize(a, (-(-count // shards) * shards, *np.shape(a)[1:]))
        a = a.astype(np.int32) if a.ndim == 1 else a
        return jax.make_array_from_callback(a.shape, sharding.batch_sharding(mesh), lambda i: a[i])

    index, y = place(index), jax.tree.map(place, y)
    s = config.sample
    with sharding.use(mesh):
        x, xs = _generate(
            params, jax.random.key(config.seed if seed is None else seed), index, y,
            config=config, model=state.exact(model), steps=s.steps if steps is None else steps,
            guidance=s.guidance if guidance is None else guidance, decoder=s.decoder if decoder is None else decoder, trajectory=trajectory)

    def images(tokens):
        values = transforms.unpatchify(sharding.to_host(tokens)[:count], spec.image_shape, spec.patch_size)
        return transforms.unscale(values, spec.levels) if spec.levels else values

    return (images(x), images(xs)[:, ::-1]) if trajectory else images(x)


def check(config: Config, steps: int | None, guidance: float | None) -> None:
    """UserError for a guidance that the model was not trained for; a warning for a number of steps that it was not trained with."""
    if guidance and not config.train.condition_dropout:
        raise UserError(f"guidance is {guidance}, and the model was trained without condition dropout: sample with guidance 0")
    if steps is not None and steps not in config.trajectory.steps:
        trained = ", ".join(map(str, config.trajectory.steps))
        warnings.warn(f"{steps} steps were not trained, only {trained}: expect worse images", stacklevel=2)


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


def parse_labels(names, num_classes: int) -> np.ndarray | None:
    """The flag --labels -> integers; None where it was not given. UserError for a label that is no class of the model."""
    if not names:
        return None
    for name in names:
        if not (name.isdecimal() and int(name) < num_classes):
            expected = f"0 to {num_classes - 1}" if num_classes else "none, the model being unconditional"
            raise UserError(f"label {name!r} is not a class of the model: expected {expected}")
    return np.array([int(name) for name in names], np.int32)


def write_samples(run, out: str, num: int, batch: int, labels=None, **options) -> None:
    """Writes `num` images of a run into a new folder: PNG files, grid.png, and samples.npz (ADM's layout, arr_0: uint8
    [n, H, W, 3], or latents as they are, arr_1: labels)."""
    folder = epath.Path(out)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{out} is there and not empty: give a new folder as --out, nothing was overwritten")
    check(run.config, options.get("steps"), options.get("guidance"))
    labels = parse_labels(labels, run.model.config.num_classes)
    # Here no process has written yet: one that came late would find its own job's files.
    processes.agree({"--out": out, "--num": num, "--batch": batch, "--labels": None if labels is None else labels.tolist()} | options)
    folder.mkdir(parents=True, exist_ok=True)
    digits, images = len(str(num - 1)), []
    begin = time.perf_counter()
    for index in tqdm.tqdm(in_batches(num, batch), "sample", unit="batch", disable=None):
        label = None if labels is None else np.resize(labels, num)[index]
        images.append(run.sample_at(index, label, **options))
        if jax.process_index() == 0:
            for i, image in zip(index, displayable(images[-1], run.spec.levels), strict=True):
                plots.save_png(folder / f"{i:0{digits}d}.png", image)
    seconds, images = time.perf_counter() - begin, np.concatenate(images)
    if jax.process_index() == 0:
        index = np.arange(num)
        label = index % max(run.model.config.num_classes, 1) if labels is None else np.resize(labels, num)
        shown = displayable(images, run.spec.levels) if run.spec.levels else images
        with (folder / "samples.npz").open("wb") as file:
            np.savez(file, np.repeat(shown, 3, -1) if shown.shape[-1] == 1 else shown, label)
        plots.save_png(folder / "grid.png", picture(images[:100], run.spec.levels))
        print(f"{num} images in {out}, {num / seconds:.1f} images/s with compilation, step {run.step}", flush=True)
