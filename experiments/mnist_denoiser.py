"""The learned denoiser of a run of experiments/mnist.py, which --config.teacher=WORKDIR names: see digits_denoiser.py.

Needs `pip install -e '.[mnist]'`. Expected: the teacher's class accuracy, 90%,
and a Frechet distance (proxy features) within 10% of its own.
"""

import ml_collections


def get_config():
    c = ml_collections.ConfigDict()
    c.seed = 0
    c.init_from = ""
    c.teacher = ""
    c.data = dict(source="mnist_5k", split="train", batch_size=32, patch_size=7, image_size=0, workers=0, mock="")
    c.trajectory = dict(
        schedule="linear", shift=ml_collections.config_dict.placeholder(float), steps=(4,), t_min=0.07, t_min_range=(0.05, 0.09))
    c.model = dict(
        width=128, head_size=32, kv_heads=4, mlp_ratio=4, positions="learned", transporter_width=128, transporter_blocks=0,
        transporter_layers=1, predictor_layers=4, head="preconditioned", log_scale_bound=5.0, data_std=0.62, condition="class",
        dtype="float32", remat="none", scan=False)
    c.train = dict(
        objective="denoiser", steps=4000, save_every=500, evaluate_every=1000, log_every=50, keep=0, accumulate=1, condition_dropout=0.0)
    c.optimizer = dict(learning_rate=1e-3, floor=1e-6, warmup_steps=100, weight_decay=1e-4, clip=1.0, ema_decay=0.999)
    c.mesh = dict(slices=1, data=-1, fsdp=1, tensor=1, sequence=1)
    c.evaluate = dict(split="test", trajectories=8, batch_size=100, images=1000, features="cnn")
    c.sample = dict(
        num=100, steps=4, guidance=ml_collections.FieldReference(0.0, object),  # or one for each step: (1.0, 0.5, 0.0, 0.0)
        decoder="denoiser", inverse="auto")
    return c
