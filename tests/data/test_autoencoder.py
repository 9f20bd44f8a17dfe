"""Autoencoders in JAX: against diffusers, on a mesh, under earlier names, and bad folders."""

import json
import re
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from ntm_jax.data.autoencoder import open_autoencoder
from ntm_jax.errors import UserError
from ntm_jax.runtime import autoencode, sharding
from ntm_jax.runtime.config import Mesh
from tests.common import python
from tests.data.common import AUTOENCODER, write_autoencoder

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 12, 8, 3), np.uint8)
FILE = "diffusion_pytorch_model.safetensors"


def both_ways(folder):
    """(latents [5, 6, 4, 3] of images, and images of these latents) on the devices there are."""
    kl, mesh = open_autoencoder(f"kl:{folder}"), sharding.make_mesh(Mesh(data=1, tensor=-1))
    latents = autoencode.encode(kl, np.resize(IMAGES, (5, 12, 8, 3)), mesh, 2)
    return latents, autoencode.decode(kl, latents, mesh)


def main(folder, out):
    """Writes both_ways of a folder on 8 devices."""
    latents, images = both_ways(folder)
    np.savez(out, latents=latents, images=images)


@pytest.mark.filterwarnings("default")  # deprecations in other packages
def test_both_ways_equal_diffusers(tmp_path):
    """With attention in blocks, and none of the parameters trivial."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(
        down_block_types=("AttnDownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "AttnUpDecoderBlock2D"), block_out_channels=(8, 16),
        latent_channels=3, norm_num_groups=4, scaling_factor=0.7, shift_factor=0.3).eval()
    with torch.inference_mode():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
        model.save_pretrained(tmp_path)
        x = torch.from_numpy(IMAGES.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1)
        mean = model.encode(x).latent_dist.mode()
        latents = ((mean - 0.3) * 0.7).numpy().transpose(0, 2, 3, 1)
        images = model.decode(mean).sample.numpy().transpose(0, 2, 3, 1)
    assert latents.std() > 0.1 < images.std()
    kl = open_autoencoder(f"kl:{tmp_path}")
    # float32 convolutions that sum in another order
    np.testing.assert_allclose(jax.jit(kl.encode)(kl.params, IMAGES), latents, atol=1e-5)
    np.testing.assert_allclose(jax.jit(kl.decode)(kl.params, latents), images, atol=1e-5)


def test_every_product_is_at_full_precision(tmp_path):
    """A TPU would take float32's factors as bfloat16, a GPU as TF32."""
    write_autoencoder(tmp_path)
    kl = open_autoencoder(f"kl:{tmp_path}")
    there_and_back = jax.jit(lambda params, x: kl.decode(params, kl.encode(params, x)))
    program = there_and_back.lower(kl.params, IMAGES).as_text()
    products = re.findall(r"stablehlo\.(?:convolution|dot_general).*", program)
    assert len(products) > 30
    assert all("HIGHEST" in product for product in products)


@pytest.mark.slow
def test_a_mesh_gives_the_same(tmp_path):
    write_autoencoder(tmp_path)
    python(__file__, str(tmp_path), f"{tmp_path}/out.npz", devices=8)
    latents, images = both_ways(tmp_path)
    assert latents.shape == (5, 6, 4, 3)
    assert latents[::2].std() > 0.1
    np.testing.assert_array_equal(latents[0], latents[4])
    with np.load(tmp_path / "out.npz") as found:
        np.testing.assert_allclose(found["latents"], latents, atol=1e-5)
        assert np.abs(found["images"].astype(int) - images).max() <= 1


def test_earlier_names_parts_and_half_precision(tmp_path):
    """Attention as convolutions of other names, in two bfloat16 files."""
    tensors = write_autoencoder(tmp_path / "now")
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    earlier = {}
    for name, tensor in tensors.items():
        for new, old in names.items():
            if f"attentions.0.{new}." in name:
                name = name.replace(new, old)
                tensor = tensor[..., None, None] if tensor.ndim == 2 else tensor
        earlier[name] = tensor.astype(ml_dtypes.bfloat16)
    assert len(earlier.keys() - tensors.keys()) == 16
    folder = tmp_path / "earlier"
    folder.mkdir()
    (folder / "config.json").write_bytes((tmp_path / "now/config.json").read_bytes())
    for number in range(2):
        some = {name: earlier[name] for name in list(earlier)[number::2]}
        part = FILE.replace(".safe", f"-0000{number + 1}-of-00002.safe")
        safetensors.numpy.save_file(some, folder / part)
    one, other = (open_autoencoder(f"kl:{tmp_path}/{name}") for name in ("now", "earlier"))
    assert jax.tree.structure(one.params) == jax.tree.structure(other.params)
    assert one.digest != other.digest
    for a, b in zip(*map(jax.tree.leaves, (one.params, other.params)), strict=True):
        assert (b.shape, b.dtype) == (a.shape, np.float32)
        np.testing.assert_allclose(b, a, rtol=2**-8)  # bfloat16


@pytest.mark.parametrize(("keys", "change", "message"), [
    ({"down_block_types": ["DownBlock2D", "DownEncoderBlock2D"]}, {},
     "down_block_types is ('DownBlock2D', 'DownEncoderBlock2D'): expected one of DownEncoderBlock"),
    ({"_class_name": "AutoencoderDC"}, {}, "is of a AutoencoderDC, expected AutoencoderKL: open"),
    ({"block_out_channels": [4]}, {}, "config.json describes no autoencoder ("),
    ({}, {"encoder.conv_in.bias": None, "decoder.conv_in.weight": (4, 5, 3, 3), "extra": (1,)},
     "missing encoder.conv_in.bias; left over extra; wrong decoder.conv_in.weight is [4, 5, 3, 3], "
     "expected [8, 3, 3, 3]: fetch both again")])
def test_bad_folders_are_refused(tmp_path, keys, change, message):
    tensors = write_autoencoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(AUTOENCODER | keys))
    for name, shape in change.items():
        tensors.pop(name, None)
        if shape:
            tensors[name] = np.zeros(shape, np.float32)
    safetensors.numpy.save_file(tensors, tmp_path / FILE)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        open_autoencoder(f"kl:{tmp_path}")
    assert "\n" not in str(error.value)


if __name__ == "__main__":
    main(*sys.argv[1:])
