"""The commands of docs/howto/flux2.md, from a checkpoint on disk to an export.

They run on a tiny network with random weights.
"""

import dataclasses
import functools
import re
import shlex

import jax
import numpy as np
import pytest
import safetensors.numpy

import ntm_jax
from ntm_jax.core.model import NTM
from ntm_jax.core.trajectory import Schedule, posterior
from ntm_jax.data import pipeline, sources
from ntm_jax.errors import UserError
from ntm_jax.runtime import config, sharding
from ntm_jax.runtime.run import Run, untrained
from ntm_jax.training import finetune, reference_model, state
from tests.common import ROOT, bits, experiment, logged, python, write_photos
from tests.projects.flux2.common import original, random_diffusers

MOCK = "mock:4x4x16,text=8x16"
SHORT = {"trajectory.steps": (2,), "sample.steps": 2, "evaluate.num_samples": 0,
         "evaluate.trajectories": 1}
FLAGS = [f"--config.{key}={value}" for key, value in SHORT.items()]


def settings(**changes) -> config.Config:
    values = experiment("flux2_klein", "smoke")
    values.update_from_flattened_dict(changes)
    return config.read(values)


def new_run(c: config.Config) -> Run:
    """The run that a configuration starts, before it has parameters."""
    spec = pipeline.spec(sources.open_source(c.data.source, "train"), 1)
    return untrained(c, spec, sharding.make_mesh(c.mesh))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Checkpoints of the smoke network: a folder in diffusers' layout, a file of other names."""
    folder = tmp_path_factory.mktemp("klein")
    tensors = random_diffusers(new_run(settings()).model.backbone.config)
    safetensors.numpy.save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    safetensors.numpy.save_file(original(tensors), folder / "klein.safetensors")
    return folder, folder / "klein.safetensors"


@pytest.mark.slow
def test_step_0_is_the_checkpoints_posterior_whatever_its_names(checkpoints):
    runs = [new_run(settings(init_from=str(path))) for path in checkpoints]
    new, model = state.initialize(runs[0]), runs[0].model
    started = [finetune.start_from(run, new).params for run in runs]
    assert bits(started[0]["params"]["backbone"]) == bits(started[1]["params"]["backbone"])
    batch = next(pipeline.evaluation_batches(sources.open_source(MOCK, "train"), 1, 2))
    y = model.config.condition.stack(batch)
    t = Schedule("shifted", 0.5).levels(4, np.full(2, 0.02))
    predict = jax.jit(functools.partial(model.apply, method=NTM.predict))
    backbone = jax.jit(model.backbone.apply)
    transport = jax.jit(functools.partial(model.apply, method=NTM.transport))
    for k in range(4):
        mean, log_scale = predict(started[0], batch["x"], t[:, k + 1], t[:, k], np.full(2, 4), y)
        velocity, _ = backbone(
            {"params": started[0]["params"]["backbone"]}, batch["x"], t[:, k + 1], y)
        a, b, c = (v[:, None, None] for v in posterior(t[:, k], t[:, k + 1]))
        expected = a * batch["x"] + b * (batch["x"] - t[:, k + 1, None, None] * velocity)
        np.testing.assert_allclose(mean, expected, rtol=1e-5, atol=1e-5)
        log_c = np.broadcast_to(np.log(c), log_scale.shape)
        np.testing.assert_allclose(log_scale, log_c, atol=1e-6)
        u, log_det = transport(started[0], batch["x"], t[:, k], np.full(2, 4), y)
        np.testing.assert_array_equal(u, batch["x"])
        np.testing.assert_array_equal(log_det, 0)


@pytest.mark.slow
def test_a_checkpoint_of_another_kind_is_refused(checkpoints):
    path = str(checkpoints[1])
    run = new_run(settings(init_from=path))
    scaled = dataclasses.replace(run.spec, mean=(0.0,) * 16, std=(2.0,) * 16)
    with pytest.raises(UserError, match=r"prepare them with --latent_scale=encoder"):
        finetune.start_from(dataclasses.replace(run, spec=scaled), None)


@pytest.mark.slow
def test_the_pages_commands_go_from_a_checkpoint_to_an_export(tmp_path):
    """Every command of the page's first block, in turn."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    c = new_run(settings()).model.backbone.config
    torch.manual_seed(0)
    transformer = diffusers.Flux2Transformer2DModel(
        patch_size=1, in_channels=c.dim, num_layers=c.double_layers,
        num_single_layers=c.single_layers, attention_head_dim=c.head_size,
        num_attention_heads=c.heads, joint_attention_dim=c.text_width,
        timestep_guidance_channels=256, mlp_ratio=float(c.mlp_ratio), axes_dims_rope=c.axes,
        rope_theta=c.theta, guidance_embeds=False)
    transformer.save_pretrained(tmp_path / "FLUX.2-klein" / "transformer")
    autoencoder = diffusers.AutoencoderKLFlux2(
        block_out_channels=(4, 4, 4, 8), layers_per_block=1, latent_channels=4, norm_num_groups=2)
    autoencoder.save_pretrained(tmp_path / "FLUX.2-klein" / "vae")
    write_photos(tmp_path / "photos", 48, 80)
    page = (ROOT / "docs/howto/flux2.md").read_text()
    block = re.search(r"```sh\n(FLUX2=/data/FLUX.2-klein RECORDS.*?)```", page, re.S)[1]
    for name, place in (("$FLUX2", "FLUX.2-klein"), ("$RECORDS", "records"), ("runs/", "runs/"),
                        ("exports/", "exports/"), ("/data/photos", "photos")):
        block = block.replace(name, f"{tmp_path}/{place}")
    printed = []
    for line in re.findall(r"^python (.*?)(?:  #.*)?$", block.replace("\\\n", " "), re.M):
        flags = FLAGS if "launch.train" in line else ()
        if "init_from" in line:
            flags = (*FLAGS, "--config.sample.decoder=inverse")  # compiles in less time
        # An export's script writes its images into the current folder.
        cwd = tmp_path if "sample.py" in line else ROOT
        printed.append(python(*shlex.split(line), *flags, cwd=cwd).stdout)
    assert len(printed) == 6
    assert "16 images float32[4, 4, 16]" in printed[-1]
    folder = tmp_path / "runs/klein"
    first, *_, last = logged(folder)
    assert first["misalignment/level_0"] < 1e-9 < last["misalignment/level_0"]
    images = np.load(f"{folder}-denoiser/samples/samples.npz")["arr_0"]
    assert (images.shape, images.dtype) == ((4, 64, 64, 3), np.uint8)  # 16 pixels a token
    exported = {path.name for path in (tmp_path / "exports/klein").iterdir()}
    assert {"model.safetensors", "sampler.bin", "sample.py"} <= exported
    # The reference parameters are the checkpoint's.
    run = ntm_jax.load(str(folder))
    assert run.config.train.align_weight == 2.5
    current = state.abstract(run)
    fresh = finetune.start_from(run, current).params["params"]["backbone"]
    kept = reference_model.kept_reference(run)
    assert bits(kept["params"]) == bits(fresh)
