"""A tiny FLUX.2, its inputs, and its checkpoints in both namings."""

import functools
import json

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from ntm_jax.core.conditions import Text
from ntm_jax.projects.flux2 import network as flux2
from ntm_jax.projects.flux2 import weights as flux2_weights

TINY = flux2.Flux2Config((3, 5), dim=6, text_width=10, heads=2, head_size=16, double_layers=2,
                         single_layers=2, axes=(4, 4, 4, 4), dtype=jnp.float32)


def inputs(config=TINY, batch: int = 2, text_tokens: int = 4, seed: int = 0):
    """Random (x [B, N, D], t [B], Text without padding)."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(batch, config.grid[0] * config.grid[1], config.dim)).astype(np.float32)
    states = rng.normal(size=(batch, text_tokens, config.text_width)).astype(np.float32)
    return x, np.linspace(0.3, 0.9, batch).astype(np.float32), Text(
        states, np.ones((batch, text_tokens), bool))


@functools.cache
def abstract(config=TINY) -> dict:
    """The parameters' shapes, without logical names."""
    return nn.unbox(jax.eval_shape(flux2.Flux2(config).init, jax.random.key(0),
                                   *inputs(config, 1)))["params"]


@functools.cache
def weights(config=TINY, seed: int = 1) -> dict:
    """Random parameters, none of them trivial, that keep the size of their input."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        values = rng.normal(size=leaf.shape)
        return (1 + 0.3 * values if path[-1].key == "scale" else values
                / np.sqrt(leaf.shape[-2])).astype(np.float32)

    return jax.tree_util.tree_map_with_path(fill, abstract(config))


def random_tensors(names: dict = flux2_weights.DIFFUSERS, config=TINY) -> dict:
    """The tensors of a checkpoint, random. names: ORIGINAL or DIFFUSERS of the reader."""
    rng = np.random.default_rng(2)
    _, shapes = flux2_weights._places(names,
                                      flax.traverse_util.flatten_dict(abstract(config), sep="/"))
    return {name: (rng.normal(size=shape) / np.sqrt(shape[-1])).astype(np.float32)
            for name, shape in shapes.items()}


def as_diffusers(tensors: dict) -> dict:
    """A checkpoint's torch tensors in the original names -> in diffusers', by its converter."""
    from diffusers.loaders import single_file_utils

    return single_file_utils.convert_flux2_transformer_checkpoint_to_diffusers(tensors)


def write_folder(folder, tensors: dict, files: int = 2) -> None:
    """Writes tensors as diffusers' save_pretrained does: several files and their index."""
    folder.mkdir(parents=True)
    index = {}
    for number in range(files):
        name = f"diffusion_pytorch_model-{number + 1:05d}-of-{files:05d}.safetensors"
        part = {key: tensors[key] for key in list(tensors)[number::files]}
        safetensors.numpy.save_file(part, folder / name)
        index |= dict.fromkeys(part, name)
    content = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(content)
