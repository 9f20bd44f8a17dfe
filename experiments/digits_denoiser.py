"""The learned denoiser of a digits run: one pass from its latent u_0 replaces inverse and score.

`--config.teacher=WORKDIR` names the run of experiments/digits.py; see docs/concepts.md, section 8.
Expected: class accuracy 99%, Frechet distance (proxy features) 2.0, and five times as many images
per second as score denoising.
"""

from ntm_jax.experiments import default, digits


@default.Experiment
def get_config():
    c = digits.base()
    c.trajectory.t_min = 0.08  # the teacher's
    c.model.update(transporter_blocks=0, transporter_layers=1)
    c.train.update(objective="denoiser", condition_dropout=0.0)
    c.optimizer.weight_decay = 1e-4
    c.sample.decoder = "denoiser"
    return c
