"""From captioned photographs to latents in records, and from samples of a model of them back.

That a run trains on such records is in test_flux2.py.
"""

import numpy as np
import pytest

import ntm_jax
from ntm_jax.data.records import read_manifest
from ntm_jax.data.sources import open_source
from ntm_jax.projects.flux2.autoencoder import Autoencoder
from ntm_jax.sampling.write import SampleRequest
from ntm_jax.tools.prepare import PrepareOptions, captioned, inputs, prepare
from tests.common import tiny_config, write_photos, write_run

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # diffusers' deprecations
WORDS = "words:8:a red blue circle"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with photos/, autoencoder/ and the photos' latents in records/.

    The autoencoder is random, with 32 channels at a sixteenth of the size.
    """
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("prepared")
    torch.manual_seed(0)
    model = diffusers.AutoencoderKLFlux2(
        block_out_channels=(4, 4, 4, 8), layers_per_block=1, latent_channels=8, norm_num_groups=2)
    model.bn.running_mean += torch.randn(32)
    model.bn.running_var *= 0.01 + torch.rand(32)
    model.save_pretrained(folder / "autoencoder")
    write_photos(folder / "photos", 40, 300)
    options = PrepareOptions(
        f"folder:{folder}/photos", image_size=128, flip=True, test=16, shard_size=9, text=WORDS,
        latents=f"flux2:{folder}/autoencoder")
    prepare(options, f"{folder}/records", workers=1)
    return folder


def test_latents_have_mean_0_and_variance_1_over_the_training_records(prepared):
    layout, splits, _ = read_manifest(f"{prepared}/records")
    assert splits["train"].counts == [18, 18, 12]
    assert layout.image_shape == (8, 8, 32)
    assert (layout.text, layout.choices["latent_scale"]) == (WORDS, "measured")
    train, test = (
        open_source(f"records:{prepared}/records", split) for split in ("train", "test"))
    assert (len(train.records), len(test.records)) == (48, 16)
    values = np.stack([train.records[i]["image"] for i in range(48)]).reshape(-1, 32)
    values = values.astype(np.float64)
    np.testing.assert_allclose(values.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(values.std(0), 1, atol=1e-4)
    assert np.std(layout.mean) > 0.1


def test_records_are_the_autoencoders_latents(prepared):
    source = open_source(f"records:{prepared}/records", "all")
    record = source.records[0]
    stored = record["image"] * np.float32(source.std) + np.float32(source.mean)
    given = inputs.open_input(f"folder:{prepared}/photos")
    photos = [captioned.load(given.read, 128, item).image for item in given.items]
    found = Autoencoder(str(prepared / "autoencoder")).encode(np.stack(photos))
    errors = np.abs(found - stored).max((1, 2, 3))
    assert errors.min() < 0.01 < np.sort(errors)[1]  # one photograph's in float16, and no other's
    colour = ("red", "blue")[int(errors.argmin()) % 2]
    assert record["caption"] == f"a {colour} circle"
    assert record["text"].argmax(1)[1] == ["a", "red", "blue"].index(colour)


def test_samples_are_photographs_again(prepared):
    settings = tiny_config(**{
        "data.source": f"records:{prepared}/records", "data.text_encoder": WORDS,
        "data.patch_size": 1, "model.condition": "text", "evaluate.split": "test"})
    run = ntm_jax.load(str(write_run(prepared / "run", settings)))
    layout, autoencoder = read_manifest(f"{prepared}/records")[0], f"{prepared}/autoencoder"
    assert (run.spec.text, run.spec.text_tokens, run.spec.text_width) == (WORDS, 8, 16)
    assert (run.spec.mean, run.spec.std) == (layout.mean, layout.std)
    run.write_samples(f"{prepared}/images", SampleRequest(3, autoencoder=autoencoder))
    run.write_samples(f"{prepared}/raw", SampleRequest(3))
    images, raw = (np.load(prepared / name / "samples.npz")["arr_0"] for name in ("images", "raw"))
    assert (images.shape, images.dtype) == ((3, 128, 128, 3), np.uint8)
    assert raw.shape == (3, 8, 8, 32)
    scaled = raw * np.float32(layout.std) + np.float32(layout.mean)
    expected = Autoencoder(autoencoder).decode(scaled)
    assert np.abs(images.astype(int) - expected).max() <= 1  # rounding to a level
