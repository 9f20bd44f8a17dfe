"""Reads FLUX.2's public checkpoints into the parameters of flux2.Flux2, one shard at a time.

A file's matrices are [out, in], and some hold several of ours; ours are [in, out] with layers
stacked in front. Names are those of black-forest-labs/flux2, src/flux2/model.py, and of diffusers,
as in scripts/convert_flux2_to_diffusers.py.
"""

import contextlib
import itertools
from pathlib import Path

import flax.traverse_util
import jax
import numpy as np
import safetensors

from ntm_jax.errors import UserError, few
from ntm_jax.files import regular

SHOWN = 10  # names of tensors in an error

# A tensor's name, with * for the layer's number -> the parameters along its first axis, in order.
# Tensors in ACROSS hold them along the second axis.
ORIGINAL = {
    "img_in.weight": "image_in",
    "txt_in.weight": "text_in",
    "time_in.in_layer.weight": "time_in",
    "time_in.out_layer.weight": "time_out",
    "double_stream_modulation_img.lin.weight": "double_image_modulation",
    "double_stream_modulation_txt.lin.weight": "double_text_modulation",
    "single_stream_modulation.lin.weight": "single_modulation",
    "final_layer.adaLN_modulation.1.weight": "final_shift_modulation final_scale_modulation",
    "final_layer.linear.weight": "project",
    "double_blocks.*.img_attn.qkv.weight": "double/image_query double/image_key double/image_value",
    "double_blocks.*.img_attn.norm.query_norm.scale": "double/image_query_norm",
    "double_blocks.*.img_attn.norm.key_norm.scale": "double/image_key_norm",
    "double_blocks.*.img_attn.proj.weight": "double/image_out",
    "double_blocks.*.img_mlp.0.weight": "double/image_mlp_gate double/image_mlp_up",
    "double_blocks.*.img_mlp.2.weight": "double/image_mlp_down",
    "double_blocks.*.txt_attn.qkv.weight": "double/text_query double/text_key double/text_value",
    "double_blocks.*.txt_attn.norm.query_norm.scale": "double/text_query_norm",
    "double_blocks.*.txt_attn.norm.key_norm.scale": "double/text_key_norm",
    "double_blocks.*.txt_attn.proj.weight": "double/text_out",
    "double_blocks.*.txt_mlp.0.weight": "double/text_mlp_gate double/text_mlp_up",
    "double_blocks.*.txt_mlp.2.weight": "double/text_mlp_down",
    "single_blocks.*.linear1.weight":
        "single/query single/key single/value single/mlp_gate single/mlp_up",
    "single_blocks.*.linear2.weight": "single/out single/mlp_down",
    "single_blocks.*.norm.query_norm.scale": "single/query_norm",
    "single_blocks.*.norm.key_norm.scale": "single/key_norm",
}
DIFFUSERS = {
    "x_embedder.weight": "image_in",
    "context_embedder.weight": "text_in",
    "time_guidance_embed.timestep_embedder.linear_1.weight": "time_in",
    "time_guidance_embed.timestep_embedder.linear_2.weight": "time_out",
    "double_stream_modulation_img.linear.weight": "double_image_modulation",
    "double_stream_modulation_txt.linear.weight": "double_text_modulation",
    "single_stream_modulation.linear.weight": "single_modulation",
    "norm_out.linear.weight": "final_scale_modulation final_shift_modulation",
    "proj_out.weight": "project",
    "transformer_blocks.*.attn.to_q.weight": "double/image_query",
    "transformer_blocks.*.attn.to_k.weight": "double/image_key",
    "transformer_blocks.*.attn.to_v.weight": "double/image_value",
    "transformer_blocks.*.attn.norm_q.weight": "double/image_query_norm",
    "transformer_blocks.*.attn.norm_k.weight": "double/image_key_norm",
    "transformer_blocks.*.attn.to_out.0.weight": "double/image_out",
    "transformer_blocks.*.ff.linear_in.weight": "double/image_mlp_gate double/image_mlp_up",
    "transformer_blocks.*.ff.linear_out.weight": "double/image_mlp_down",
    "transformer_blocks.*.attn.add_q_proj.weight": "double/text_query",
    "transformer_blocks.*.attn.add_k_proj.weight": "double/text_key",
    "transformer_blocks.*.attn.add_v_proj.weight": "double/text_value",
    "transformer_blocks.*.attn.norm_added_q.weight": "double/text_query_norm",
    "transformer_blocks.*.attn.norm_added_k.weight": "double/text_key_norm",
    "transformer_blocks.*.attn.to_add_out.weight": "double/text_out",
    "transformer_blocks.*.ff_context.linear_in.weight": "double/text_mlp_gate double/text_mlp_up",
    "transformer_blocks.*.ff_context.linear_out.weight": "double/text_mlp_down",
    "single_transformer_blocks.*.attn.to_qkv_mlp_proj.weight":
        "single/query single/key single/value single/mlp_gate single/mlp_up",
    "single_transformer_blocks.*.attn.to_out.weight": "single/out single/mlp_down",
    "single_transformer_blocks.*.attn.norm_q.weight": "single/query_norm",
    "single_transformer_blocks.*.attn.norm_k.weight": "single/key_norm",
}
ACROSS = ("single_blocks.*.linear2.weight", "single_transformer_blocks.*.attn.to_out.weight")


def read(path: str, abstract: dict) -> dict:
    """The parameters of a checkpoint, with the shapes, dtypes and shardings of `abstract`.

    path: a .safetensors file with original or diffusers' names, a folder of diffusers' files, or
    one with such a folder transformer/. Each process reads what its own devices hold, a shard at a
    time: the host holds at most one shard besides what it keeps.

    Raises UserError, before anything is read, if there is no checkpoint, it is not safetensors
    (pickled files are never opened) or truncated, or tensors are missing, surplus or of another
    shape or type.
    """
    leaves = flax.traverse_util.flatten_dict(abstract, sep="/")
    with contextlib.ExitStack() as stack:
        tensors = _open(path, stack)
        places, shapes = _places(ORIGINAL if "img_in.weight" in tensors else DIFFUSERS, leaves)
        _check(path, tensors, shapes)
        return flax.traverse_util.unflatten_dict(
            {name: _place(leaf, *places[name], tensors) for name, leaf in leaves.items()}, sep="/")


def _places(table: dict, leaves: dict) -> tuple[dict[str, tuple[str, int, int]], dict]:
    """({leaf's path: (tensor's template, axis, start)}, {required tensor: its shape})."""
    places, shapes = {}, {}
    for template, names in table.items():
        names = [f"{name}/{'scale' if name.endswith('_norm') else 'kernel'}"
                 for name in names.split()]
        axis, stacked = int(template in ACROSS), "*" in template
        parts = [leaves[name].shape[stacked:][::-1] for name in names]
        sizes = [part[axis] for part in parts]
        starts = itertools.accumulate([0, *sizes])
        places |= {name: (template, axis, start)
                   for name, start in zip(names, starts, strict=False)}
        shape = list(parts[0])
        shape[axis] = sum(sizes)
        for layer in range(leaves[names[0]].shape[0] if stacked else 1):
            shapes[template.replace("*", str(layer))] = shape
    return places, shapes


def _place(leaf, template: str, axis: int, start: int, tensors: dict) -> jax.Array:
    """One parameter; each shard is read and sent to its device before the next."""
    stacked = "*" in template

    def matrix(layer: int, index) -> np.ndarray:
        cut = list(index)[::-1]
        offset = slice(start + cut[axis].start, start + cut[axis].stop)
        cut[axis] = offset
        return tensors[template.replace("*", str(layer))][tuple(cut)].T

    def shard(index) -> np.ndarray:
        index = [slice(*i.indices(size)[:2]) for i, size in zip(index, leaf.shape, strict=True)]
        if not stacked:
            return np.ascontiguousarray(matrix(0, index), leaf.dtype)
        out = np.empty([i.stop - i.start for i in index], leaf.dtype)
        for row, layer in enumerate(range(index[0].start, index[0].stop)):
            out[row] = matrix(layer, index[1:])
        return out

    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    homes = sharding.addressable_devices_indices_map(leaf.shape)
    shards = [jax.block_until_ready(jax.device_put(shard(index), device))
              for device, index in homes.items()]
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards)


def _open(path: str, stack: contextlib.ExitStack) -> dict:
    """{name: tensor that can be sliced} of all files, open until the stack closes."""
    tensors = {}
    for file in _files(Path(path)):
        try:
            opened = stack.enter_context(safetensors.safe_open(regular(file), "np"))
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(f"{file} is not a complete safetensors file ({error}): fetch it "
                            "again") from None
        tensors |= {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
    return tensors


def _files(path: Path) -> list[Path]:
    """The files of a checkpoint; UserError where there are none."""
    if path.is_file():
        return [path]
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    files = sorted(folder.glob("diffusion_pytorch_model*.safetensors"))
    if not files:
        raise UserError(f"{path} is no FLUX.2 checkpoint: expected a .safetensors file, or a "
                        "folder with diffusion_pytorch_model*.safetensors")
    return files


def _check(path: str, tensors: dict, shapes: dict) -> None:
    """Raises UserError unless the tensors are those of `shapes`."""
    wrong = [f"{name} is {tensors[name].get_shape()}, expected {list(shape)}"
             for name, shape in shapes.items()
             if name in tensors and tensors[name].get_shape() != list(shape)]
    missing = [name for name in shapes if name not in tensors]
    surplus = [name for name in tensors if name not in shapes]
    faults = [f"{what} {few(names, SHOWN)}" for what, names in
              (("missing", missing), ("left over", surplus), ("wrong", wrong)) if names]
    if faults:
        raise UserError(f"{path} is not a FLUX.2 checkpoint of the configured sizes ({len(shapes)} "
                        f"tensors): {'; '.join(faults)}: change the sizes or the checkpoint")
