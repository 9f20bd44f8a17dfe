"""Text-to-image NTM of Twemoji's 1,903 pictures (32 x 32 pixels in colour, on white), told their names: 1,600 to train on, 303 held out.

Needs `pip install -e '.[emoji]'`: all-MiniLM-L6-v2 reads the names.
Expected, in 50 minutes of one CPU core: bound 4.82 bits/dim, a held-out name's own picture among the five nearest of all for 3.6% of them
(chance 0.26%).
`:runlocal`: a few steps of a tiny model, in seconds.
"""

import ml_collections


def get_config(variant: str = "ntm"):
    if variant not in ("ntm", "runlocal"):
        raise ValueError(f"emoji.py:{variant} is not a variant: expected ntm or runlocal")
    c = ml_collections.ConfigDict()
    c.seed = 0
    c.init_from = ""
    c.data = dict(
        source="emoji", split="train", batch_size=32, patch_size=8, image_size=32, workers=0, mock="",
        text="minilm:20")  # the longest name has 18 tokens
    c.trajectory = dict(
        schedule="shifted", shift=1.5, steps=(4,), t_min=0.07, t_min_range=(0.05, 0.09))
    c.model = dict(
        width=128, head_size=32, kv_heads=4, mlp_ratio=4, positions="rotary", transporter_width=128, transporter_blocks=2,
        transporter_layers=2, predictor_layers=4, head="preconditioned", log_scale_bound=5.0, data_std=0.6, condition="text",
        dtype="float32", remat="none", scan=False)
    c.train = dict(
        objective="end_to_end", steps=2000, save_every=500, evaluate_every=500, log_every=20, keep=0, accumulate=1,
        condition_dropout=0.1)
    c.optimizer = dict(learning_rate=2e-3, floor=1e-6, warmup_steps=100, weight_decay=0.3, clip=1.0, ema_decay=0.999)
    c.mesh = dict(slices=1, data=-1, fsdp=1, tensor=1, sequence=1)
    c.evaluate = dict(split="test", trajectories=8, batch_size=101, images=303, features="cnn")
    c.sample = dict(
        num=100, steps=4, guidance=ml_collections.FieldReference(0.5, object),  # or one for each step: (1.0, 0.5, 0.0, 0.0)
        decoder="score", inverse="auto")
    if variant == "runlocal":
        c.data.update(batch_size=8, image_size=16, split="train[:64]")
        c.model.update(width=32, head_size=16, kv_heads=2, transporter_width=32, transporter_blocks=1, transporter_layers=1,
                       predictor_layers=1)
        c.train.update(steps=4, save_every=2, evaluate_every=0, log_every=1)
        c.optimizer.warmup_steps = 1
        c.evaluate.update(split="test[:16]", trajectories=2, batch_size=16, images=16, features="pixels")
        c.sample.num = 4
    return c
