"""The learned denoiser of a run of mnist.py, which `--config.teacher=WORKDIR` names.

Needs `pip install -e '.[mnist]'`; see digits_denoiser.py. Expected: the teacher's class accuracy,
90%, and a Frechet distance (proxy features) within 10% of its own.
"""

from ntm_jax.experiments import default, mnist


@default.variants("", smoke_source=mnist.MOCK)
def get_config():
    c = mnist.base()
    c.trajectory.t_min = 0.09  # the teacher's
    c.model.update(transporter_blocks=0, transporter_layers=1)
    c.train.update(objective="denoiser", steps=4000, evaluate_every=1000, condition_dropout=0.0)
    c.optimizer.update(learning_rate=1e-3, weight_decay=1e-4)
    c.sample.decoder = "denoiser"
    return c
