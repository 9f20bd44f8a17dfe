"""The learned denoiser of a digits run: one pass from its latent u_0 replaces inverse and score.

`--config.teacher=WORKDIR` names the run of experiments/digits.py; see docs/concepts.md, section 8.
Expected: class accuracy 98%, Frechet distance (proxy features) within 3% of score denoising's,
about ten times as many images per second.
"""

from ntm_jax.experiments import default


def get_config():
    c = default.get_config()
    c.data.update(source="digits", patch_size=2)
    c.model.update(
        width=64, head_size=16, transporter_width=64, transporter_blocks=0, transporter_layers=1,
        predictor_layers=3, data_std=0.75)
    c.train.update(objective="denoiser", condition_dropout=0.0)
    c.optimizer.weight_decay = 1e-4
    c.evaluate.update(trajectories=32, batch_size=297, images=4500, features="cnn")
    c.sample.decoder = "denoiser"
    return c
