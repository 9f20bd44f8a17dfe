"""Images from a model: sampled by index, so that image i is the same image whatever the batch, mesh or number of processes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ntm_jax.core import denoising, sampling
from ntm_jax.core.trajectory import per_example
from ntm_jax.data import transforms
from ntm_jax.data.pipeline import DataSpec
from ntm_jax.runtime import sharding, state
from ntm_jax.runtime.config import Config


@functools.partial(jax.jit, static_argnames=("config", "model", "steps", "guidance", "decoder", "trajectory"))
def _generate(params, root, index, label, *, config, model, steps, guidance, decoder, trajectory):
    t = state.levels(config, model, steps, jnp.full(len(index), config.trajectory.t_min))
    xs = sampling.sample(model, params, state.example_keys(root, "sample", index), t, label, guidance)
    x = denoising.score_denoise(model, params, xs, t, label) if decoder == "score" else xs[:, 0] / (1 - per_example(t[:, 0], xs[:, 0]))
    return x, xs if trajectory else None


def generate(config: Config, model, params, spec: DataSpec, mesh, index, label=None, *, seed: int | None = None, steps: int | None = None,
             guidance: float | None = None, decoder: str | None = None, trajectory: bool = False):
    """Samples of the image indices index [n]; label [n] is index modulo the classes if not given.

    seed, steps, guidance and decoder are the configuration's unless given. Returns uint8 images [n, H, W, C]; with trajectory also the levels
    from pure noise down, [n, K, H, W, C].
    """
    index = np.asarray(index)
    label = index % max(model.config.num_classes, 1) if label is None else label
    batch = {"index": index, "label": np.asarray(label)}
    count, shards = len(index), sharding.batch_shards(mesh)
    batch = {k: np.resize(v, -(-count // shards) * shards).astype(np.int32) for k, v in batch.items()}  # the mesh needs whole shards
    batch = {k: jax.make_array_from_callback(v.shape, sharding.batch_sharding(mesh), lambda i, v=v: v[i]) for k, v in batch.items()}
    s = config.sample
    with sharding.use(mesh):
        x, xs = _generate(
            params, jax.random.key(config.seed if seed is None else seed), batch["index"], batch["label"],
            config=config, model=state.exact(model), steps=s.steps if steps is None else steps,
            guidance=s.guidance if guidance is None else guidance, decoder=s.decoder if decoder is None else decoder, trajectory=trajectory)

    def images(tokens):
        tokens = sharding.to_host(tokens)[:count]
        return transforms.unscale(transforms.unpatchify(tokens, spec.image_shape, spec.patch_size), spec.levels)

    return (images(x), images(xs)[:, ::-1]) if trajectory else images(x)


def displayable(images, levels: int) -> np.ndarray:
    """Pixel values 0..levels-1 -> 0..255."""
    return (np.asarray(images, np.float32) * (255 / (levels - 1))).round().astype(np.uint8)


def in_batches(n: int, batch: int):
    """Index ranges that cover 0..n-1."""
    return [np.arange(start, min(start + batch, n)) for start in range(0, n, batch)]
