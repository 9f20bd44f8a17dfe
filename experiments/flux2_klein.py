"""The paper's fine-tuning: an NTM of 512 x 512 pictures from FLUX.2-klein 4B, four steps, latents of 32 x 32 x 128 with 512 text states.

--config.init_from names the public weights: diffusers' folder or the original .safetensors file. Latents and text states are those of the
FLUX.2 autoencoder and of Qwen3 (ntm_jax.data.latents, ntm_jax.data.text); see data.source. Expected: fits v5p:8x8x8 and v6e:16x16 with the
mesh given here (launch/compile.py), the frozen copy included. Not trained by us.

Variants: `denoiser`, the learned denoiser of such a run, --config.teacher=WORKDIR; `runlocal` and `runlocal-denoiser`: a few steps of tiny
networks on made-up data, in seconds on a CPU; without --config.init_from from random weights and unaligned.
"""

import ml_collections


def get_config(variant: str = ""):
    if variant not in ("", "denoiser", "runlocal", "runlocal-denoiser"):
        raise ValueError(f"flux2_klein.py:{variant} is not a variant: expected denoiser, runlocal, runlocal-denoiser or none")
    c = ml_collections.ConfigDict()
    c.seed = 0
    c.init_from = "/data/FLUX.2-klein-base-4B"
    c.teacher = ""
    c.data = dict(
        source="records:/data/flux2-latents", mock="mock:32x32x128,text=512x7680", split="train", batch_size=1024, patch_size=1,
        image_size=0, workers=8, text="")
    c.trajectory = dict(
        schedule="shifted", shift=ml_collections.config_dict.placeholder(float), steps=(4,), t_min=0.02, t_min_range=(0.01, 0.05))
    c.model = dict(
        width=3072, head_size=128, kv_heads=24, mlp_ratio=3, positions="rotary", transporter_width=3072, transporter_blocks=2,
        transporter_layers=4, predictor_layers=20, double_layers=5, backbone="flux2", head="posterior", log_scale_bound=3.0, data_std=1.0,
        condition="text", dtype="bfloat16", remat="full", scan=True)
    c.train = dict(
        objective="end_to_end", steps=50_000, save_every=2500, evaluate_every=5000, log_every=50, keep=10_000, accumulate=1,
        condition_dropout=0.1, align_weight=2.5)
    c.optimizer = dict(learning_rate=5e-5, floor=1e-6, warmup_steps=2000, weight_decay=1e-4, clip=1.0, ema_decay=0.9999)
    c.mesh = dict(slices=1, data=-1, fsdp=32, tensor=1, sequence=1)
    c.evaluate = dict(split="test", trajectories=8, batch_size=512, images=0, features="none")
    c.sample = dict(
        num=64, steps=4, guidance=ml_collections.FieldReference(0.0, object),  # or one for each step: (1.0, 0.5, 0.0, 0.0)
        decoder="score", inverse="auto")
    if variant.startswith("runlocal"):
        c.init_from = ""
        c.data.update(source="mock:4x4x16,text=8x16", mock="", batch_size=8, workers=0)
        c.model.update(width=64, head_size=32, kv_heads=2, transporter_width=64, transporter_layers=1, predictor_layers=2, double_layers=1,
                       dtype="float32", remat="none", scan=False)
        c.train.update(steps=4, save_every=2, evaluate_every=0, log_every=1, keep=0, align_weight=0.0)
        c.optimizer.warmup_steps = 1
        c.mesh.fsdp = 1
        c.evaluate.update(split="test[:16]", trajectories=2, batch_size=16)
        c.sample.num = 4
    if variant.endswith("denoiser"):
        c.init_from = ""
        c.model.update(transporter_blocks=0, double_layers=0, backbone="transformer", head="preconditioned", mlp_ratio=4)
        c.train.update(objective="denoiser", align_weight=0.0, condition_dropout=0.0)
        c.sample.decoder = "denoiser"
    return c
