"""NTM of MNIST that starts from the flow-matching model of mnist_fm.py.

Needs `pip install -e '.[mnist]'`; `--config.init_from=WORKDIR` names the run of mnist_fm.py.
`:free` trains without alignment with the frozen flow-matching model (lambda = 0).
Expected, in 30 minutes of one CPU core: bound 2.70 bits/dim (`:free` 2.68), class accuracy 94%,
Frechet distance (proxy features) 34 (29).
"""

from ntm_jax.experiments import default


def get_config(variant: str = "aligned"):
    default.check_variant(__file__, variant, "aligned", "free")
    c = default.get_config()
    c.data.update(source="mnist_5k", patch_size=7)
    c.trajectory.update(schedule="linear", t_min=0.07, t_min_range=(0.05, 0.09))
    c.model.update(
        transporter_blocks=4, transporter_layers=1, transporter_positions_std=1.0,
        head="posterior", log_scale_bound=5.0, data_std=0.62)
    c.train.update(
        evaluate_every=1000, log_every=20, level_power=1.0,
        align_weight=2.5 if variant == "aligned" else 0.0)
    c.optimizer.learning_rate = 1e-3
    c.evaluate.update(images=1000, features="cnn")
    return c
