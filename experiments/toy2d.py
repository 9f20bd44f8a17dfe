"""NTM of points of the plane whose true density is known: eight Gaussians on a circle, a checkerboard, two moons.

Expected of gaussians: an importance-weighted bound (1,000 trajectories) 0.02 nats below the true mean log-density at t_0, -0.99. After the
density's name may follow `,no-transporter`, the ablation with a deeper predictor.
"""

import ml_collections


def get_config(variant: str = "gaussians"):
    name, _, ablation = variant.partition(",")
    if name not in ("gaussians", "checkerboard", "moons") or ablation not in ("", "no-transporter"):
        raise ValueError(
            f"toy2d.py:{variant} is not a variant: expected gaussians, checkerboard or moons, and after it perhaps ,no-transporter")
    c = ml_collections.ConfigDict()
    c.seed = 0
    c.init_from = ""
    c.data = dict(source=f"toy:{name}", split="train", batch_size=64, patch_size=1, image_size=0, workers=0, mock="")
    c.trajectory = dict(
        schedule="shifted", shift=0.0, steps=(16,), t_min=0.04,
        t_min_range=(0.03, 0.05))  # levels k/16: a few long steps are hardest between t = 0.1 and 0.4, where modes part
    c.model = dict(
        width=32, head_size=16, kv_heads=2, mlp_ratio=4, positions="learned", transporter_width=32, transporter_blocks=4,
        transporter_layers=1, predictor_layers=2, head="preconditioned", log_scale_bound=3.0, data_std=1.0, condition="none",
        dtype="float32", remat="none", scan=False)
    c.train = dict(
        objective="end_to_end", steps=2000, save_every=500, evaluate_every=500, log_every=50, keep=0, accumulate=1, condition_dropout=0.0)
    c.optimizer = dict(learning_rate=3e-3, floor=1e-6, warmup_steps=100, weight_decay=1e-4, clip=1.0, ema_decay=0.999)
    c.mesh = dict(slices=1, data=-1, fsdp=1, tensor=1, sequence=1)
    c.evaluate = dict(split="test", trajectories=32, batch_size=2000, images=0, features="none")
    c.sample = dict(num=1000, steps=16, guidance=0.0, decoder="inverse", inverse="auto")
    if ablation:
        c.model.update(transporter_blocks=0, predictor_layers=6)
    return c
