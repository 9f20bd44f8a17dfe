"""FLUX.2's latents: against the klein pipeline's own helpers, into records, and from samples back.

With a tiny autoencoder of random weights: 32 channels at a sixteenth of an image's sides.
"""

import jax
import numpy as np
import pytest

import ntm_jax
from ntm_jax.data import transforms
from ntm_jax.data.autoencoder import open_autoencoder
from ntm_jax.data.records import read_manifest
from ntm_jax.data.sources import open_source
from ntm_jax.runtime import autoencode, sharding
from ntm_jax.runtime.config import Mesh
from ntm_jax.sampling.write import SampleRequest
from ntm_jax.tools.prepare import PrepareOptions, captioned, inputs, prepare
from tests.common import tiny_config, write_photos, write_run

pytestmark = pytest.mark.filterwarnings("default")  # deprecations in other packages
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 48, 32, 3), np.uint8)
WORDS = "words:8:a red blue circle"


def encode(folder, images) -> np.ndarray:
    mesh = sharding.make_mesh(Mesh())
    return autoencode.encode(open_autoencoder(f"flux2:{folder}"), images, mesh, len(images))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in the pipeline's layout."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.AutoencoderKLFlux2(
        block_out_channels=(4, 4, 4, 8), layers_per_block=1, latent_channels=8, norm_num_groups=2,
        decoder_block_out_channels=(4, 8, 8, 8))
    with torch.inference_mode():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms' and biases, which are trivial in a new one
                parameter += 0.3 * torch.randn_like(parameter)
    model.bn.running_mean += torch.randn(32)
    model.bn.running_var *= 0.01 + torch.rand(32)
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

    found = encode(folder, IMAGES)
    assert (found.shape, found.dtype) == ((2, 3, 2, 32), np.float32)
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

    given = np.random.default_rng(1).normal(size=(2, 3, 2, 32)).astype(np.float32)
    flux2 = open_autoencoder(f"flux2:{folder}/vae")
    found = jax.jit(flux2.decode)(flux2.params, given)
    vae = pipeline.vae
    with torch.inference_mode():
        tokens = torch.from_numpy(given.reshape(2, 6, 32))
        z = pipeline._unpack_latents_with_ids(
            tokens, pipeline._prepare_latent_ids(torch.zeros(2, 1, 3, 2)), 3, 2
        )
        std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps)
        z = pipeline._unpatchify_latents(z * std + vae.bn.running_mean.view(1, -1, 1, 1))
        expected = pipeline.image_processor.postprocess(vae.decode(z).sample, output_type="np")
    assert found.shape == expected.shape == (2, 48, 32, 3)
    assert expected.std() > 0.05
    # float32 convolutions that sum in another order
    np.testing.assert_allclose(np.clip(found / 2 + 0.5, 0, 1), expected, atol=1e-5)


@pytest.fixture(scope="module")
def prepared(folder):
    """The folder with photos/ and their latents in records/, too."""
    write_photos(folder / "photos", 40, 300)
    options = PrepareOptions(
        f"folder:{folder}/photos", image_size=128, flip=True, test=16, shard_size=9, text=WORDS,
        autoencoder=f"flux2:{folder}")
    prepare(options, f"{folder}/records", workers=1)
    return folder


@pytest.mark.slow
def test_prepared_latents_have_mean_0_and_variance_1_over_the_training_records(prepared):
    layout, splits, _ = read_manifest(f"{prepared}/records")
    assert splits["train"].counts == [18, 18, 12]
    assert layout.image_shape == (8, 8, 32)
    assert (layout.text, layout.choices["latent_scale"]) == (WORDS, "measured")
    train, test = (
        open_source(f"records:{prepared}/records", split) for split in ("train", "test"))
    assert (len(train.records), len(test.records)) == (48, 16)
    values = np.stack([train.records[i]["image"] for i in range(48)]).reshape(-1, 32)
    np.testing.assert_allclose(values.mean(0, np.float64), 0, atol=1e-4)
    np.testing.assert_allclose(values.std(0, np.float64), 1, atol=1e-4)
    assert np.std(layout.mean) > 0.1


@pytest.mark.slow
def test_records_are_the_autoencoders_latents(prepared):
    source = open_source(f"records:{prepared}/records", "all")
    record = source.records[0]
    stored = record["image"] * np.float32(source.std) + np.float32(source.mean)
    given = inputs.open_input(PrepareOptions(f"folder:{prepared}/photos"))
    photos = [captioned.load(given.read, 128, item).image for item in given.items]
    found = encode(prepared, np.stack(photos))
    errors = np.abs(found - stored).max((1, 2, 3))
    assert errors.min() < 0.01 < np.sort(errors)[1]  # one photograph's in float16, and no other's
    colour = ("red", "blue")[int(errors.argmin()) % 2]
    assert record["caption"] == f"a {colour} circle"
    assert record["text"].argmax(1)[1] == ["a", "red", "blue"].index(colour)


@pytest.mark.slow
def test_samples_are_photographs_again(prepared):
    settings = tiny_config(**{
        "data.source": f"records:{prepared}/records", "data.text_encoder": WORDS,
        "data.patch_size": 1, "model.condition": "text", "evaluate.split": "test"})
    run = ntm_jax.load(str(write_run(prepared / "run", settings)))
    run.write_samples(f"{prepared}/images", SampleRequest(3, autoencoder=f"flux2:{prepared}"))
    run.write_samples(f"{prepared}/raw", SampleRequest(3))
    images, raw = (np.load(prepared / name / "samples.npz")["arr_0"] for name in ("images", "raw"))
    assert (images.shape, images.dtype) == ((3, 128, 128, 3), np.uint8)
    assert raw.shape == (3, 8, 8, 32)
    scaled = raw * np.float32(run.spec.std) + np.float32(run.spec.mean)
    expected = autoencode.decode(open_autoencoder(f"flux2:{prepared}"), scaled, run.mesh)
    assert np.abs(images.astype(int) - expected).max() <= 1  # rounding to a level
