"""The commands of docs/howto/flux2.md, from a checkpoint on disk to an export.

They run on a tiny network with random weights.
"""

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
from ntm_jax.core.trajectory import Schedule, posterior
from ntm_jax.data import pipeline, sources
from ntm_jax.errors import UserError
from ntm_jax.runtime import config, sharding
from ntm_jax.runtime.run import Run, untrained
from ntm_jax.training import finetune, loop, reference_model, state
from tests.backbones.common import original, random_diffusers
from tests.common import ROOT, bits, experiment, python, write_photos, write_run

MOCK = "mock:4x4x16,text=8x16"
SHORT = {"trajectory.steps": (2,), "sample.steps": 2}
FLAGS = [f"--config.{key}={value}" for key, value in SHORT.items()]


def settings(**changes) -> config.Config:
    values = experiment("flux2_klein", "runlocal")
    values.update_from_flattened_dict(changes)
    return config.read(values)


def new_run(c: config.Config) -> Run:
    """The run that a configuration starts, before it has parameters."""
    spec = pipeline.spec(sources.open_source(c.data.source, "train"), 1)
    return untrained(c, spec, sharding.make_mesh(c.mesh))


def write_checkpoint(folder, names=lambda tensors: tensors):
    """Writes a checkpoint of the runlocal network and returns its path.

    It is a folder in diffusers' layout, or one file of the original names.
    """
    tensors = names(random_diffusers(new_run(settings()).model.backbone.config))
    folder.mkdir(parents=True)
    if "x_embedder.weight" in tensors:
        safetensors.numpy.save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
        return folder
    safetensors.numpy.save_file(tensors, folder / "klein.safetensors")
    return folder / "klein.safetensors"


@pytest.mark.slow
def test_step_0_is_the_checkpoints_posterior_whatever_its_names(tmp_path):
    paths = [write_checkpoint(tmp_path / "klein" / "transformer"),
             write_checkpoint(tmp_path / "original", original)]
    runs = [new_run(settings(init_from=str(path))) for path in paths]
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
def test_a_checkpoint_of_another_kind_is_refused(tmp_path):
    path, new = write_checkpoint(tmp_path / "original", original), str(tmp_path / "new")
    wide = new_run(settings(init_from=str(path), **{"model.width": 128}))
    refused = (r"config\.init_from is .*klein\.safetensors is not a FLUX\.2 checkpoint of the "
               r"configured sizes")
    with pytest.raises(UserError, match=refused):
        finetune.start_from(wide, None)
    refused = r"config\.init_from is .*nothing is no FLUX\.2 checkpoint"
    with pytest.raises(UserError, match=refused):
        loop.train(settings(init_from=str(tmp_path / "nothing")), new, progress=False)
    assert not (tmp_path / "new").exists()
    run = new_run(settings(init_from=str(path)))
    scaled = dataclasses.replace(run.spec, mean=(0.0,) * 16, std=(2.0,) * 16)
    with pytest.raises(UserError, match=r"prepare them with --latent_scale=encoder"):
        finetune.start_from(dataclasses.replace(run, spec=scaled), None)


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """(folder, outputs) after every command of the page's first block has run in turn."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("klein")
    c = new_run(settings()).model.backbone.config
    torch.manual_seed(0)
    transformer = diffusers.Flux2Transformer2DModel(
        patch_size=1, in_channels=c.dim, num_layers=c.double_layers,
        num_single_layers=c.single_layers, attention_head_dim=c.head_size,
        num_attention_heads=c.heads, joint_attention_dim=c.text_width,
        timestep_guidance_channels=256, mlp_ratio=float(c.mlp_ratio), axes_dims_rope=c.axes,
        rope_theta=c.theta, guidance_embeds=False)
    transformer.save_pretrained(folder / "FLUX.2-klein" / "transformer")
    autoencoder = diffusers.AutoencoderKLFlux2(
        block_out_channels=(4, 4, 4, 8), layers_per_block=1, latent_channels=4, norm_num_groups=2)
    autoencoder.save_pretrained(folder / "FLUX.2-klein" / "vae")
    write_photos(folder / "photos", 48, 80)
    page = (ROOT / "docs/howto/flux2.md").read_text()
    block = re.search(r"```sh\n(FLUX2=/data/FLUX.2-klein RECORDS.*?)```", page, re.S)[1]
    places = {"$FLUX2": f"{folder}/FLUX.2-klein", "$RECORDS": f"{folder}/records",
              "/data/photos": f"{folder}/photos", "runs/": f"{folder}/runs/",
              "exports/": f"{folder}/exports/"}
    printed = []
    for line in block.replace("\\\n", " ").splitlines():
        if line.startswith("python "):
            line = line.partition("  #")[0]
            for name in ("runs/", "exports/", "$FLUX2", "$RECORDS", "/data/photos"):
                line = line.replace(name, places[name])
            # An export's script writes its images into the current folder.
            cwd = folder if "sample.py" in line else ROOT
            flags = FLAGS if "launch.train" in line else ()
            if "init_from" in line:
                flags = (*FLAGS, "--config.sample.decoder=inverse")  # compiles in less time
            printed.append(python(*shlex.split(line)[1:], *flags, cwd=cwd).stdout)
    return folder, printed


@pytest.mark.slow
def test_the_pages_commands_go_from_a_checkpoint_to_an_export(rehearsed):
    folder, printed = rehearsed
    assert len(printed) == 6
    metrics = (folder / "runs/klein/metrics.jsonl").read_text()
    lines = [json.loads(line) for line in metrics.splitlines()]
    assert lines[0]["misalignment/level_0"] < 1e-9 < lines[-1]["misalignment/level_0"]
    run = ntm_jax.load(f"{folder}/runs/klein")
    assert run.config.train.align_weight == 2.5
    assert (folder / "runs/klein/frozen").exists()
    images = np.load(folder / "runs/klein-denoiser/samples/samples.npz")["arr_0"]
    assert (images.shape, images.dtype) == ((4, 64, 64, 3), np.uint8)  # 16 pixels a token
    exported = {path.name for path in (folder / "exports/klein").iterdir()}
    assert {"model.safetensors", "sampler.bin", "sample.py"} <= exported
    assert "16 images float32[4, 4, 16]" in printed[-1]


@pytest.mark.slow
def test_the_reference_parameters_are_the_checkpoints(rehearsed):
    folder, _ = rehearsed
    run = ntm_jax.load(f"{folder}/runs/klein")
    current = state.abstract(run)
    fresh = finetune.start_from(run, current).params["params"]["backbone"]
    kept = reference_model.reference_params(run, dataclasses.replace(current, step=np.int32(4)))
    assert bits(kept["params"]) == bits(fresh)


REWARD = """
from ntm_jax.training.reward import rewards


def small(argument, source):
    return lambda latents, captions: -(latents**2).mean((1, 2, 3))


rewards.register("my_reward", small)
"""


@pytest.mark.slow
def test_post_training_is_rehearsed(tmp_path):
    (tmp_path / "own.py").write_text(REWARD)
    base, folder = write_run(tmp_path / "base", settings(**SHORT)), tmp_path / "run"
    python("-m", "launch.train", "--config=flux2_klein:runlocal-reward", "--import=own", *FLAGS,
           f"--config.init_from={base}", f"--workdir={folder}", "--config.sample.decoder=inverse",
           cwd=tmp_path)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "kl" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-3)  # of the model that it starts from
    assert all(line["reward"] < 0 < line["diversity"] for line in steps)
    found = json.loads((folder / "evaluation.json").read_text())
    assert found["reward"]["mean"] < 0 < found["kl"]["mean"]
    assert {"reward_before", "diversity_before"} <= set(found["measures"])
