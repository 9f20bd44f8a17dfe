"""The commands of docs/howto/flux2.md, from a checkpoint on disk to an export.

They run on a tiny network with random weights.
"""

import dataclasses
import re
import shlex

import numpy as np
import pytest
import safetensors.numpy

import ntm_jax
from ntm_jax.data import pipeline, sources
from ntm_jax.errors import UserError
from ntm_jax.projects.flux2 import weights
from ntm_jax.runtime import config, sharding
from ntm_jax.runtime.run import Run, untrained
from ntm_jax.training import finetune, reference_model, state
from tests.common import ROOT, bits, experiment, logged, python, write_photos
from tests.projects.flux2.common import random_tensors

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


def test_latents_of_another_scale_are_refused(tmp_path):
    path = tmp_path / "klein.safetensors"
    sizes = new_run(settings()).model.backbone.config
    safetensors.numpy.save_file(random_tensors(weights.ORIGINAL, sizes), path)
    run = new_run(settings(init_from=str(path)))
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
    # at step 0 the model is the checkpoint's posterior
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
