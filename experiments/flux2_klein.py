"""Fine-tunes FLUX.2-klein 4B into a four-step NTM of 512 x 512 pictures, as in the paper.

Latents are 32 x 32 x 128, with 512 text states: those of FLUX.2's autoencoder and of Qwen3, as
launch/prepare.py writes them. `--config.init_from` names the public weights: diffusers' folder or
the original .safetensors file. Expected: fits v5p:8x8x8 and v6e:16x16 with this mesh
(launch/compile.py), the frozen copy included. Not trained by us.

Variants: `denoiser` is the learned denoiser of such a run, `--config.teacher=WORKDIR`. `reward`
post-trains such a run, `--config.init_from=WORKDIR`, with a policy gradient on 8 samples of each of
64 captions; it maximises a reward of your own, registered as `my_reward` in a module that
`--import` names (docs/howto/reward.md).
"""

from ntm_jax.experiments import default


@default.variants("", "denoiser", "reward", smoke_source="mock:4x4x16,text=8x16")
def get_config(variant: str):
    c = default.get_config()
    c.init_from = "/data/FLUX.2-klein-base-4B"
    c.data.update(
        source="records:/data/flux2-latents", mock="mock:32x32x128,text=512x7680", batch_size=1024,
        workers=8)
    c.trajectory.update(t_min=0.02, t_min_range=(0.01, 0.05))
    c.model.update(
        width=3072, head_size=128, kv_heads=24, mlp_ratio=3, positions="rotary",
        transporter_width=3072, transporter_layers=4, predictor_layers=20, double_layers=5,
        backbone="flux2", head="flow_matching", condition="text", dtype="bfloat16", remat="full",
        scan=True)
    c.train.update(
        steps=50_000, save_every=2500, evaluate_every=5000, keep=10_000, align_weight=2.5)
    c.optimizer.update(
        learning_rate=5e-5, warmup_steps=2000, weight_decay=1e-4, ema_decay=0.9999)
    c.mesh.fsdp = 32
    c.evaluate.batch_size = 512
    c.sample.num = 64
    if variant == "reward":
        c.init_from = "runs/klein"
        c.data.batch_size = 64
        c.train.update(
            objective="policy_gradient", steps=2000, save_every=100, evaluate_every=500, keep=500,
            log_every=10, align_weight=0.0)
        c.reward.update(name="my_reward", samples=8, kl=1e-3)
        c.optimizer.update(learning_rate=1e-5, warmup_steps=20, weight_decay=0.0, ema_decay=0.99)
        c.mesh.tensor = 8
        c.evaluate.num_samples = 512
    if variant == "denoiser":
        c.init_from = ""
        c.model.update(
            transporter_blocks=0, double_layers=0, backbone="transformer", head="preconditioned",
            mlp_ratio=4)
        c.train.update(objective="denoiser", align_weight=0.0, condition_dropout=0.0)
        c.sample.decoder = "denoiser"
    return c
