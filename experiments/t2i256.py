"""Text-to-image NTM at 256 x 256 from scratch, in a latent of 16 x 16 x 32 with 128 text states of width 2048: 3.2 billion parameters.

The latents and text states are those that launch/prepare.py writes; see data.source. Expected: fits v5p:8x8x8 and v6e:16x16 with the mesh
given here (launch/compile.py). Not trained by us. Variant `runlocal`: a few steps of a tiny model on made-up data, in seconds on a CPU.
"""

import ml_collections


def get_config(variant: str = ""):
    if variant not in ("", "runlocal"):
        raise ValueError(f"t2i256.py:{variant} is not a variant: expected runlocal or none")
    c = ml_collections.ConfigDict()
    c.seed = 0
    c.init_from = ""
    c.data = dict(
        source="records:/data/t2i256-latents", mock="mock:16x16x32,text=128x2048", split="train", batch_size=1024, patch_size=1,
        image_size=0, workers=8, text="")
    c.trajectory = dict(
        schedule="shifted", shift=ml_collections.config_dict.placeholder(float), steps=(4,), t_min=0.02, t_min_range=(0.01, 0.05))
    c.model = dict(
        width=3072, head_size=128, kv_heads=8, mlp_ratio=4, positions="rotary", transporter_width=3072, transporter_blocks=2,
        transporter_layers=4, predictor_layers=24, head="preconditioned", log_scale_bound=3.0, data_std=1.0, condition="text",
        dtype="bfloat16", remat="dots", scan=True)
    c.train = dict(
        objective="end_to_end", steps=500_000, save_every=5000, evaluate_every=25_000, log_every=100, keep=50_000, accumulate=1,
        condition_dropout=0.1)
    c.optimizer = dict(learning_rate=1e-4, floor=1e-6, warmup_steps=5000, weight_decay=1e-4, clip=1.0, ema_decay=0.9999)
    c.mesh = dict(slices=1, data=-1, fsdp=16, tensor=1, sequence=1)  # fsdp over all of a large slice: XLA reduces where it could gather
    c.evaluate = dict(split="test", trajectories=8, batch_size=1024, images=0, features="none")
    c.sample = dict(
        num=100, steps=4, guidance=ml_collections.FieldReference(0.5, object),  # or one for each step: (1.0, 0.5, 0.0, 0.0)
        decoder="score", inverse="auto")
    if variant == "runlocal":
        c.data.update(source="mock:16x16x32,text=8x32", mock="", batch_size=8, workers=0)
        c.model.update(width=64, head_size=16, kv_heads=2, transporter_width=64, transporter_layers=1, predictor_layers=2, dtype="float32",
                       remat="none", scan=False)
        c.train.update(steps=4, save_every=2, evaluate_every=0, log_every=1, keep=0)
        c.optimizer.warmup_steps = 1
        c.mesh.fsdp = 1
        c.evaluate.update(split="test[:16]", trajectories=2, batch_size=16)
        c.sample.num = 4
    return c
