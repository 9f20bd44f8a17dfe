"""What the tests of data share: records that are made up."""

import functools
import json

import flax.traverse_util
import jax
import numpy as np
import safetensors.numpy

from ntm_jax import typed
from ntm_jax.data import autoencoder_networks as networks
from ntm_jax.data.records import Split, sha256, write_manifest, write_shard


def write_records(path, splits, layout, shard_size=100):
    """Writes the examples of each split in shards, and then their manifest."""
    written = {name: Split() for name in splits}
    for name, split in written.items():
        for start in range(0, len(splits[name]), shard_size):
            file = path / f"{name}-{len(split.shards):05}.arrayrecord"
            split.shards.append(file.name)
            split.counts.append(
                write_shard(file, splits[name][start : start + shard_size], layout))
            split.sha256.append(sha256(file))
    write_manifest(str(path), layout, written)


def latents(count, dtype=np.float16, shape=(2, 2, 4)):
    random = np.random.default_rng(1)
    return [{"image": random.normal(size=shape).astype(dtype)} for _ in range(count)]


def captioned(count):
    """Record i has i % 7 tokens."""
    random = np.random.default_rng(2)
    return [
        {**example, "text": random.normal(size=(i % 7, 8)).astype(np.float16)}
        for i, example in enumerate(latents(count))
    ]


AUTOENCODER = {"_class_name": "AutoencoderKL", "block_out_channels": [4, 8], "latent_channels": 3,
               "norm_num_groups": 2, "down_block_types": ["DownEncoderBlock2D"] * 2,
               "up_block_types": ["UpDecoderBlock2D"] * 2, "scaling_factor": 0.5}


@functools.cache
def _random_autoencoder() -> dict:
    keys = {key: value for key, value in AUTOENCODER.items() if not key.startswith("_")}
    network = networks.KL(typed.parse_dataclass(networks.KLSizes, keys, "keys"))
    shapes = jax.eval_shape(network.init, jax.random.key(0), np.zeros((1, 2, 2, 3), np.float32))
    rng, tensors = np.random.default_rng(0), {}
    for (_, *path, kind), leaf in flax.traverse_util.flatten_dict(shapes).items():
        values = 0.5 * rng.normal(size=(*leaf.shape[:-3:-1], *leaf.shape[:-2]))
        if kind == "kernel":
            values /= np.sqrt(leaf.size / leaf.shape[-1])
        name = ".".join((*path, "bias" if kind == "bias" else "weight"))
        tensors[name] = (values + (kind == "scale")).astype(np.float32)
    return tensors


def write_autoencoder(folder) -> dict:
    """Writes a random AutoencoderKL as diffusers does; returns its tensors.

    A place has 2 x 2 pixels and 3 channels.
    """
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(AUTOENCODER))
    tensors = _random_autoencoder()
    safetensors.numpy.save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    return dict(tensors)
