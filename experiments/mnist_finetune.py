"""NTM of MNIST that starts from the flow-matching model of mnist_fm.py.

Needs `pip install -e '.[mnist]'`; `--config.init_from=WORKDIR` names the run of mnist_fm.py.
`:free` trains without alignment with the frozen flow-matching model (lambda = 0).
Expected, in 30 minutes of one CPU core: bound 2.70 bits/dim (`:free` 2.68), class accuracy 94%,
Frechet distance (proxy features) 34 (29).
"""

from ntm_jax.experiments import default, mnist


@default.variants("aligned", "free", smoke_source=mnist.MOCK)
def get_config(variant: str):
    c = mnist.base()
    c.model.update(
        transporter_blocks=4, transporter_layers=1, transporter_positions_std=1.0,
        transporter_condition="class", head="flow_matching")
    c.train.update(
        evaluate_every=1000, log_every=20, level_weight_power=1.0,
        align_weight=2.5 if variant == "aligned" else 0.0)
    c.optimizer.learning_rate = 1e-3
    return c
