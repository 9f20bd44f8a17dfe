"""The folder of an export: its files, and programs that give the run's own numbers."""


import numpy as np
import pytest

from ntm_jax import files
from ntm_jax.core.conditions import Text
from ntm_jax.data.pipeline import spec_to_json
from ntm_jax.errors import UserError
from ntm_jax.export.write import write_export
from ntm_jax.runtime import config
from tests.common import ROOT, alike
from tests.export.common import FILES, assert_close, program


def test_the_folder(run, exported):
    assert sorted(path.name for path in exported.iterdir()) == FILES
    assert list(exported.parent.iterdir()) == [exported]  # no temporary folder is left
    about = files.read_json(exported / "config.json", "")
    assert (about["format"], about["step"], about["parameters"]) == (1, 4, "ema")
    assert config.read(about["config"]) == run.config
    assert about["spec"] == spec_to_json(run.spec)
    assert about["spec"]["levels"] == 17  # the key by which sample.py and older readers know it
    assert about["programs"]["log_likelihood"] == {
        "seed": "uint32[]", "index": "int32[b]", "images": "uint8[b,8,8,1]", "label": "int32[b]"}


@pytest.mark.parametrize("name", ["sampler", "log_likelihood"])
def test_the_programs_are_for_every_platform_and_hold_no_parameters(exported, name):
    found, parameters = program(exported, name)
    assert found.platforms == ("cpu", "cuda", "tpu")
    content = (exported / f"{name}.bin").read_bytes()
    assert not [array for array in parameters.values() if array.tobytes() in content]
    assert b"write.py" in content  # lines name their file, without this machine's folders
    assert str(ROOT).encode() not in content
    assert b"site-packages" not in content


def test_the_sampler_gives_the_images_of_the_run(run, exported):
    sampler, parameters = program(exported, "sampler")
    index = np.array([7, 3, 0, 12, 4], np.int32)
    label = (index + 1) % 10
    expected = run.sample_at(index, label, seed=3)
    images = sampler.call(parameters, np.uint32(3), index, label)
    assert (images.shape, images.dtype) == (expected.shape, np.uint8)
    assert alike(images, expected)
    assert (expected != run.sample_at(index, label, seed=4)).mean() > 0.1


@pytest.mark.slow
def test_programs_of_texts_and_latents(on_texts):
    run, folder = on_texts
    source = run.config.data.open("test")
    records, index = [source.records[i] for i in range(4)], np.arange(4, dtype=np.int32)
    text, mask, latents = (np.stack([record[name] for record in records])
                           for name in ("text", "text_mask", "image"))
    sampler, parameters = program(folder, "sampler")
    found = sampler.call(parameters, np.uint32(0), index, text, mask)
    expected = run.sample_at(index, Text(text, mask))
    assert found.dtype == expected.dtype == np.float32
    assert_close(found, expected)
    log_likelihood, _ = program(folder, "log_likelihood")
    found = log_likelihood.call(parameters, np.uint32(0), index, latents, text, mask)
    expected = run.log_prob(latents, Text(text, mask), trajectories=2)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_exports_that_cannot_be_written_are_refused(run, exported, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in exported.iterdir()}
    with pytest.raises(UserError, match=r"tiny already exists: choose a new --out \(nothing was "
                                        r"overwritten\)"):
        write_export(run, str(exported))
    assert {path: path.stat().st_mtime_ns for path in exported.iterdir()} == before
    with pytest.raises(UserError, match="decoder=denoiser needs a denoiser, and this run has none"):
        write_export(run, str(tmp_path / "out"), decoder="denoiser")
    assert list(tmp_path.iterdir()) == []
