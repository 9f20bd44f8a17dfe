"""Class-conditional NTM of scikit-learn's digits (8 x 8 pixels of 17 levels): 1,500 training images, 297 held out.

Expected: bound 2.21 and importance-weighted bound (32 trajectories) 2.04 bits/dim, class accuracy 98%. `:gaussian` is the ablation without
transporter, a deeper predictor with parameters within 2%: 2.36, 2.17 and 98%.
"""

import ml_collections


def get_config(variant: str = "ntm"):
    if variant not in ("ntm", "gaussian"):
        raise ValueError(f"digits.py:{variant} is not a variant: expected ntm or gaussian")
    c = ml_collections.ConfigDict()
    c.seed = 0
    c.init_from = ""
    c.data = dict(source="digits", split="train", batch_size=32, patch_size=2, image_size=0, workers=0, mock="")
    c.trajectory = dict(
        schedule="shifted", shift=ml_collections.config_dict.placeholder(float), steps=(4,), t_min=0.04,
        t_min_range=(0.03, 0.05))  # of the order of half a pixel level, 1/16: less makes the density spiky, more blurs the levels
    c.model = dict(
        width=64, head_size=16, kv_heads=4, mlp_ratio=4, positions="learned", transporter_width=64, transporter_blocks=2,
        transporter_layers=2, predictor_layers=3, head="preconditioned", log_scale_bound=3.0, data_std=0.75, condition="class",
        transporter_positions_std=0.02, dtype="float32", remat="none", scan=False)  # unrolled: faster at this size on a CPU
    c.train = dict(
        objective="end_to_end", steps=2000, save_every=400, evaluate_every=400, log_every=20, keep=0, accumulate=1, condition_dropout=0.1,
        level_power=0.0)
    c.optimizer = dict(learning_rate=3e-3, floor=1e-6, warmup_steps=100, weight_decay=0.3, clip=1.0, ema_decay=0.999)
    c.mesh = dict(slices=1, data=-1, fsdp=1, tensor=1, sequence=1)
    c.evaluate = dict(split="test", trajectories=32, batch_size=297, images=4500, features="cnn")
    c.sample = dict(
        num=100, steps=4, guidance=ml_collections.FieldReference(0.0, object),  # or one for each step: (1.0, 0.5, 0.0, 0.0)
        decoder="score", inverse="auto")
    if variant == "gaussian":
        c.model.update(transporter_blocks=0, width=72, head_size=24, kv_heads=3, predictor_layers=6)
    return c
