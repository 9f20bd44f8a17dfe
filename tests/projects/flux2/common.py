"""A tiny FLUX.2, its inputs, and its checkpoints in both namings, as NumPy arrays."""

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


def random_diffusers(config=TINY, seed: int = 2) -> dict:
    """The tensors of a checkpoint in diffusers' names, random."""
    rng = np.random.default_rng(seed)
    _, shapes = flux2_weights._places(flux2_weights.DIFFUSERS,
                                      flax.traverse_util.flatten_dict(abstract(config), sep="/"))
    return {name: (rng.normal(size=shape) / np.sqrt(shape[-1])).astype(np.float32)
            for name, shape in shapes.items()}


SINGLE = {  # diffusers' names -> the original ones
    "attn.to_qkv_mlp_proj.weight": "linear1.weight", "attn.to_out.weight": "linear2.weight",
    "attn.norm_q.weight": "norm.query_norm.scale", "attn.norm_k.weight": "norm.key_norm.scale"}


def original(tensors: dict, xp=np) -> dict:
    """A checkpoint's tensors in diffusers' names -> in the original ones.

    It is the inverse of diffusers' convert_flux2_to_diffusers.py. xp: jax.numpy to trace shapes.
    """
    left = dict(tensors)
    out = {}
    for ours, theirs in (
        ("img_in", "x_embedder"), ("txt_in", "context_embedder"),
        ("final_layer.linear", "proj_out"),
        ("time_in.in_layer", "time_guidance_embed.timestep_embedder.linear_1"),
        ("time_in.out_layer", "time_guidance_embed.timestep_embedder.linear_2"),
        *((f"{name}.lin", f"{name}.linear")
          for name in ("double_stream_modulation_img", "double_stream_modulation_txt",
                       "single_stream_modulation")),
    ):
        out[f"{ours}.weight"] = left.pop(f"{theirs}.weight")
    scale, shift = xp.split(left.pop("norm_out.linear.weight"), 2)
    out["final_layer.adaLN_modulation.1.weight"] = xp.concatenate([shift, scale])
    count = 0
    while f"transformer_blocks.{count}.attn.to_q.weight" in left:
        def take(name, count=count):
            return left.pop(f"transformer_blocks.{count}.{name}.weight")

        block = f"double_blocks.{count}"
        out[f"{block}.img_attn.qkv.weight"] = xp.concatenate(
            [take("attn.to_q"), take("attn.to_k"), take("attn.to_v")])
        out[f"{block}.txt_attn.qkv.weight"] = xp.concatenate(
            [take("attn.add_q_proj"), take("attn.add_k_proj"), take("attn.add_v_proj")])
        for ours, theirs in (
            ("img_attn.norm.query_norm.scale", "attn.norm_q"),
            ("img_attn.norm.key_norm.scale", "attn.norm_k"),
            ("txt_attn.norm.query_norm.scale", "attn.norm_added_q"),
            ("txt_attn.norm.key_norm.scale", "attn.norm_added_k"),
            ("img_attn.proj.weight", "attn.to_out.0"), ("txt_attn.proj.weight", "attn.to_add_out"),
            ("img_mlp.0.weight", "ff.linear_in"), ("img_mlp.2.weight", "ff.linear_out"),
            ("txt_mlp.0.weight", "ff_context.linear_in"),
            ("txt_mlp.2.weight", "ff_context.linear_out"),
        ):
            out[f"{block}.{ours}"] = take(theirs)
        count += 1
    for name in list(left):
        _, number, *rest = name.split(".")
        assert name.startswith("single_transformer_blocks.")
        out[f"single_blocks.{number}.{SINGLE['.'.join(rest)]}"] = left.pop(name)
    return out


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
