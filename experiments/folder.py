"""Class-conditional NTM of a folder of your own images: --config.data.source=folder:PATH.

Sub-folders of PATH are classes; without them the model is unconditional. Images may have any sizes
and modes. What is left open here is chosen for the data and the device, printed, and a flag. On a
CPU images are 32 x 32 pixels.
"""

from ntm_jax.experiments import default


@default.variants("", smoke_source="digits")
def get_config():
    c = default.get_config()
    c.data.source = ""
    c.trajectory.update(shift=1.5, t_min=0.04, t_min_range=(0.03, 0.05))
    c.model.update(positions="rotary", log_scale_bound=5.0, predictor_layers=3)
    c.train.update(save_every=250, evaluate_every=250)
    c.optimizer.update(learning_rate=1.5e-3, ema_decay=0.998)
    default.leave_open(
        c, "data.image_size", "data.patch_size", "data.batch_size", "model.data_std",
        "model.pixel_likelihood", "model.condition", "train.condition_dropout",
        "evaluate.num_samples", "evaluate.batch_size", "sample.num", "sample.guidance")
    return c
