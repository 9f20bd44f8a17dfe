"""The README's commands that fine-tune FLUX.2-klein, from a checkpoint on disk to an export, on a tiny network with random weights."""

import dataclasses
import functools
import json
import re
import shlex

import jax
import numpy as np
import pytest
import safetensors.numpy

import ntm_jax
from ntm_jax.core.model import NTM
from ntm_jax.core.trajectory import levels, posterior
from ntm_jax.data import pipeline, sources
from ntm_jax.errors import UserError
from ntm_jax.runtime import build, config, sharding
from ntm_jax.training import finetune, loop, state
from tests.backbones.common import original, random_diffusers
from tests.common import ROOT, as_run, bits, experiment, python, rehearsal, write_photos

pytestmark = pytest.mark.usefixtures("quick_compilation")
MOCK = "mock:4x4x16,text=8x16"


def settings(**changes) -> config.Config:
    values = experiment("flux2_klein", "runlocal")
    values.update_from_flattened_dict(changes)
    return config.read(values)


def built(c: config.Config):
    """(the data's spec, the model, a mesh) of a configuration."""
    spec, mesh = pipeline.spec(sources.open_source(c.data.source, "train"), 1), sharding.make_mesh(c.mesh)
    return spec, build.make_model(c, spec), mesh


def write_checkpoint(folder, names=lambda tensors: tensors):
    """A checkpoint of the runlocal network, in diffusers' layout or one file of the original names: its path."""
    _, model, _ = built(settings())
    tensors = names(random_diffusers(model.backbone.config))
    folder.mkdir(parents=True)
    path = folder / ("diffusion_pytorch_model.safetensors" if "x_embedder.weight" in tensors else "klein.safetensors")
    safetensors.numpy.save_file(tensors, path)
    return folder if path.name.startswith("diffusion") else path


@rehearsal
def test_step_0_is_the_checkpoints_posterior_whatever_its_names(tmp_path):
    paths = write_checkpoint(tmp_path / "klein" / "transformer"), write_checkpoint(tmp_path / "original", original)
    spec, model, mesh = built(settings())
    new = state.initialize(as_run(settings(), model, mesh))
    started = [finetune.start_from(settings(init_from=str(path)), spec, model, mesh, new).params for path in paths]
    assert bits(started[0]["params"]["backbone"]) == bits(started[1]["params"]["backbone"])
    batch = next(pipeline.evaluation_batches(sources.open_source(MOCK, "train"), 1, 2))
    y, t = build.condition(model, batch), levels(4, np.full(2, 0.02), "shifted", 0.5)
    predict, backbone = jax.jit(functools.partial(model.apply, method=NTM.predict)), jax.jit(model.backbone.apply)
    transport = jax.jit(functools.partial(model.apply, method=NTM.transport))
    for k in range(4):
        mean, log_scale = predict(started[0], batch["x"], t[:, k + 1], t[:, k], np.full(2, 4), y)
        velocity, _ = backbone({"params": started[0]["params"]["backbone"]}, batch["x"], t[:, k + 1], y)
        a, b, c_ = (v[:, None, None] for v in posterior(t[:, k], t[:, k + 1]))
        np.testing.assert_allclose(mean, a * batch["x"] + b * (batch["x"] - t[:, k + 1, None, None] * velocity), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(log_scale, np.broadcast_to(np.log(c_), log_scale.shape), atol=1e-6)
        u, log_det = transport(started[0], batch["x"], t[:, k], np.full(2, 4), y)
        np.testing.assert_array_equal(u, batch["x"])
        np.testing.assert_array_equal(log_det, 0)


def test_what_is_no_such_checkpoint_is_refused(tmp_path):
    path = write_checkpoint(tmp_path / "original", original)
    with pytest.raises(UserError, match=r"config\.init_from is .*klein\.safetensors is not a FLUX\.2 checkpoint of the configured sizes"):
        loop.train(settings(init_from=str(path), **{"model.width": 128}), str(tmp_path / "new"), progress=False)
    with pytest.raises(UserError, match=r"config\.init_from is .*is not there: give a FLUX\.2 checkpoint"):
        loop.train(settings(init_from=str(tmp_path / "nothing")), str(tmp_path / "new"), progress=False)
    assert not (tmp_path / "new").exists()
    spec, model, mesh = built(settings())
    with pytest.raises(UserError, match=r"normalised by their own mean and std, .*: prepare them with --latent_scale=encoder"):
        finetune.start_from(settings(init_from=str(path)), dataclasses.replace(spec, mean=(0.0,) * 16, std=(2.0,) * 16), model, mesh, None)
    with pytest.raises(UserError, match=r"backbone=flux2 needs config\.model\.condition=text, double_layers > 0"):
        built(settings(**{"model.double_layers": 0}))


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """The folder in which every command of the README's rehearsal has run, one after the other."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("klein")
    _, model, _ = built(settings())
    c = model.backbone.config
    torch.manual_seed(0)
    diffusers.Flux2Transformer2DModel(
        patch_size=1, in_channels=c.dim, num_layers=c.double_layers, num_single_layers=c.single_layers, attention_head_dim=c.head_size,
        num_attention_heads=c.heads, joint_attention_dim=c.text_width, timestep_guidance_channels=256, mlp_ratio=float(c.mlp_ratio),
        axes_dims_rope=c.axes, rope_theta=c.theta, guidance_embeds=False).save_pretrained(folder / "FLUX.2-klein" / "transformer")
    diffusers.AutoencoderKLFlux2(block_out_channels=(4, 4, 4, 8), layers_per_block=1, latent_channels=4, norm_num_groups=2).save_pretrained(
        folder / "FLUX.2-klein" / "vae")
    write_photos(folder / "photos", 48, 80)
    block = re.search(r"```sh\n(FLUX2=.*?)```", (ROOT / "README.md").read_text(), re.S)[1].replace("\\\n", " ")
    names, printed = {"$FLUX2": f"{folder}/FLUX.2-klein", "$RECORDS": f"{folder}/records", "/data/photos": f"{folder}/photos"}, []
    for line in block.splitlines():
        if line.startswith("python "):
            line = line.partition("  #")[0].replace("runs/", f"{folder}/runs/").replace("exports/", f"{folder}/exports/")
            for name, value in names.items():
                line = line.replace(name, value)
            # An export's script leaves its images where it is run.
            printed.append(python(*shlex.split(line)[1:], cwd=folder if "sample.py" in line else ROOT).stdout)
    return folder, printed


@rehearsal
def test_the_whole_path_from_a_checkpoint_to_an_export(rehearsed):
    folder, printed = rehearsed
    assert len(printed) == 6
    lines = [json.loads(line) for line in (folder / "runs/klein/metrics.jsonl").read_text().splitlines()]
    assert lines[0]["misalignment/level_0"] < 1e-9 < lines[-1]["misalignment/level_0"]
    run = ntm_jax.load(f"{folder}/runs/klein")
    assert run.config.train.align_weight == 2.5
    assert (folder / "runs/klein/frozen").exists()
    images = np.load(folder / "runs/klein-denoiser/samples/samples.npz")["arr_0"]
    assert (images.shape, images.dtype) == ((4, 64, 64, 3), np.uint8)  # 16 pixels a token
    assert {"model.safetensors", "sampler.bin", "sample.py"} <= {path.name for path in (folder / "exports/klein").iterdir()}
    assert "16 images float32[4, 4, 16]" in printed[-1]


@rehearsal
def test_the_frozen_copy_is_the_checkpoint(rehearsed):
    folder, _ = rehearsed
    c = ntm_jax.load(f"{folder}/runs/klein").config
    spec, model, mesh = built(c)
    current = state.initialize(as_run(c, model, mesh))
    fresh = finetune.start_from(c, spec, model, mesh, current).params["params"]["backbone"]
    kept = finetune.reference_params(c, model, mesh, f"{folder}/runs/klein", dataclasses.replace(current, step=np.int32(4)))
    assert bits(kept["params"]) == bits(fresh)
