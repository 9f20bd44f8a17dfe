"""FLUX.2's latents, against the klein pipeline's own helpers with a tiny random autoencoder."""

import numpy as np
import pytest

from ntm_jax.data import transforms
from ntm_jax.errors import UserError
from ntm_jax.projects.flux2.autoencoder import Autoencoder, pack, unpack

pytestmark = pytest.mark.filterwarnings("default")  # deprecations in other packages
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 48, 32, 3), np.uint8)


def test_pack_orders_channels_before_neighbours():
    z = np.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6)
    packed = pack(z)
    assert packed.shape == (2, 2, 3, 12)
    for n, channel, row, column in np.ndindex(z.shape):
        assert (
            packed[n, row // 2, column // 2, 4 * channel + 2 * (row % 2) + column % 2]
            == z[n, channel, row, column]
        )
    np.testing.assert_array_equal(unpack(packed), z)
    np.testing.assert_array_equal(transforms.patchify(packed, 1), packed.reshape(2, 6, 12))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in the pipeline's layout with a tiny autoencoder of random statistics."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.AutoencoderKLFlux2(
        block_out_channels=(4, 4, 4, 8), layers_per_block=1, latent_channels=6, norm_num_groups=2
    )
    model.bn.running_mean += torch.randn(24)
    model.bn.running_var *= 0.01 + torch.rand(24)
    path = tmp_path_factory.mktemp("flux2")
    model.save_pretrained(path / "vae")
    return path


@pytest.fixture(scope="module")
def pipeline(folder):
    """The pipeline with only the autoencoder."""
    import diffusers

    vae = diffusers.AutoencoderKLFlux2.from_pretrained(folder / "vae")
    return diffusers.Flux2KleinPipeline(None, vae.eval(), None, None, None)


def test_latents_equal_the_pipelines(folder, pipeline):
    import torch
    from PIL import Image

    found = Autoencoder(str(folder)).encode(IMAGES)
    assert found.shape == (2, 3, 2, 24)
    assert found.dtype == np.float32
    with torch.inference_mode():
        x = pipeline.image_processor.preprocess([Image.fromarray(image) for image in IMAGES])
        expected = pipeline._pack_latents(pipeline._encode_vae_image(x, None)).numpy()
    assert expected.std() > 0.3
    np.testing.assert_allclose(
        transforms.patchify(found, 1), expected, atol=1e-5
    )  # float32 convolutions with other batch sizes


def test_images_equal_the_pipelines(folder, pipeline):
    """Decodes tokens in the pretrained network's order with the pipeline's own helpers."""
    import torch

    given = np.random.default_rng(1).normal(size=(2, 3, 2, 24)).astype(np.float32)
    found = Autoencoder(str(folder / "vae")).decode(given)
    assert found.shape == (2, 48, 32, 3)
    vae = pipeline.vae
    with torch.inference_mode():
        tokens = torch.from_numpy(given.reshape(2, 6, 24))
        z = pipeline._unpack_latents_with_ids(
            tokens, pipeline._prepare_latent_ids(torch.zeros(2, 1, 3, 2)), 3, 2
        )
        std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps)
        z = pipeline._unpatchify_latents(z * std + vae.bn.running_mean.view(1, -1, 1, 1))
        expected = pipeline.image_processor.postprocess(vae.decode(z).sample, output_type="np")
    assert expected.std() > 0.05
    assert np.abs(found - 255 * expected).max() < 0.51  # rounding to a pixel level


def test_sides_that_are_no_multiples_of_a_latents_are_refused(folder):
    with pytest.raises(UserError, match=r"images of 40x32 pixels .* expected multiples of 16"):
        Autoencoder(str(folder)).encode(IMAGES[:, :40])


def test_an_incomplete_folder_is_refused(folder, tmp_path):
    """Pickled weights, which are not opened; a missing tensor; a damaged file."""
    import safetensors.torch
    import torch

    original = folder / "vae"
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_bytes((original / "config.json").read_bytes())
    tensors = safetensors.torch.load_file(original / "diffusion_pytorch_model.safetensors")
    torch.save(tensors, tmp_path / "vae" / "diffusion_pytorch_model.bin")
    weights = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    incomplete = {name: tensors[name] for name in tensors if name != "bn.running_mean"}
    for damage, message in (
        (lambda: None, "not read as a AutoencoderKLFlux2 in safetensors"),
        (lambda: safetensors.torch.save_file(incomplete, weights),
         "1 tensors are missing or of another shape, such as bn.running_mean"),
        (lambda: weights.write_bytes(b"12345"), "not read as a AutoencoderKLFlux2"),
    ):
        damage()
        with pytest.raises(UserError, match=message) as error:
            Autoencoder(str(tmp_path))
        assert "\n" not in str(error.value)
