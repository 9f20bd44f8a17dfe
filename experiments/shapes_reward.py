"""Post-trains experiments/shapes.py on the exact check of its captions, by preferences.

Of the samples of a caption, those that show it are preferred to those that do not.
`--config.init_from=WORKDIR` names the run to improve; see docs/howto/reward.md. The transporter
stays as it is. Samples are drawn without guidance, whose density is not the model's. Only the steps
to levels 2 and 1 learn: they decide 9 tenths of whether a caption is shown.
"""

from ntm_jax.experiments import default, shapes


@default.Experiment
def get_config():
    c = shapes.get_config()
    c.data.batch_size = 24
    c.train.update(
        objective="preference", steps=1700, save_every=425, evaluate_every=425, log_every=10)
    # a larger anchor drowns the gradient of the pairs in that of 24 images
    c.reward.update(name="shapes", samples=8, levels=(1, 3), kl=0.1, data_loss_weight=0.05)
    c.optimizer.update(
        learning_rate=3e-4, warmup_steps=10, weight_decay=0.0, ema_decay=0.99)
    c.sample.guidance = 0.0
    return c
