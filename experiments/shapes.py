"""Text to image: captioned scenes of coloured shapes (24 x 24 pixels, drawn as they are read) for GenEval's six tasks, some combinations
held out.

Expected, in 70 minutes of one CPU core: trajectory NLL 0.565 nats/dim, 75% of the test captions shown exactly, 41% of those of held-out
combinations. `:gaussian` is the ablation without transporter, a deeper predictor with 4% more parameters. `:runlocal`: a few steps of a
tiny model, in seconds.
"""

import ml_collections

WORDS = ("a and of left right above below two three four red green blue yellow purple white "
         "circle square triangle cross circles squares triangles crosses")


def get_config(variant: str = ""):
    if variant not in ("", "gaussian", "runlocal"):
        raise ValueError(f"shapes.py:{variant} is not a variant: expected gaussian, runlocal or none")
    c = ml_collections.ConfigDict()
    c.seed = 0
    c.init_from = ""
    c.data = dict(
        source="shapes", split="train", batch_size=8, patch_size=6, image_size=0, workers=0, mock="", text=f"words:7:{WORDS}")
    c.trajectory = dict(
        schedule="shifted", shift=1.5,  # more than 16 tokens would give: layouts are decided in noise
        steps=(4,), t_min=0.08, t_min_range=(0.06, 0.1))
    c.model = dict(
        width=128, head_size=32, kv_heads=4, mlp_ratio=4, positions="rotary", transporter_width=128, transporter_blocks=4,
        transporter_layers=1, transporter_text=True, predictor_layers=3, head="preconditioned", log_scale_bound=3.0, data_std=0.95,
        condition="text", dtype="float32", remat="none", scan=False)  # unrolled: faster at this size on a CPU
    c.train = dict(
        objective="end_to_end", steps=30_000, save_every=2000, evaluate_every=10_000, log_every=100, keep=0, accumulate=1,
        condition_dropout=0.15)
    c.optimizer = dict(learning_rate=1.5e-3, floor=1e-6, warmup_steps=200, weight_decay=0.1, clip=1.0, ema_decay=0.9997)
    c.mesh = dict(slices=1, data=-1, fsdp=1, tensor=1, sequence=1)
    c.evaluate = dict(split="test[:800]", trajectories=8, batch_size=200, images=800, features="none")
    c.sample = dict(
        num=80, steps=4, guidance=ml_collections.FieldReference(2.0, object),  # or one for each step: (2.0, 1.0, 0.0, 0.0)
        decoder="score", inverse="auto")
    if variant == "gaussian":
        c.model.update(transporter_blocks=0, predictor_layers=9)
    if variant == "runlocal":
        c.data.batch_size = 8
        c.model.update(width=32, head_size=16, kv_heads=2, transporter_width=32, transporter_layers=1, predictor_layers=1)
        c.train.update(steps=4, save_every=2, evaluate_every=0, log_every=1)
        c.optimizer.warmup_steps = 1
        c.evaluate.update(split="test[:16]", trajectories=2, batch_size=16, images=16)
        c.sample.num = 4
    return c
