"""NTM of an array [n, D] conditioned on vectors [n, E], for simulation-based inference.

Give the arrays from Python, ntm_jax.experiment("arrays", data=theta, condition=x), or a file,
--config.data.source=npz:PATH. `unconditional` after a colon leaves conditions out. Sizes suit up to
about ten columns and some 10,000 records on a CPU.
"""

from ntm_jax.experiments import default


@default.variants("", "unconditional", smoke_source="sbi:two_moons,count=1000")
def get_config(variant: str):
    c = default.get_config()
    c.data.update(source="npz:arrays.npz", batch_size=128)
    c.trajectory.update(shift=0.0, steps=(4,), t_min=0.02, t_min_range=(0.015, 0.03))
    c.model.update(
        width=64, head_size=16, kv_heads=4, transporter_width=64, transporter_blocks=2,
        transporter_layers=1, predictor_layers=2, condition="vector")
    c.train.update(steps=3000, condition_dropout=0.0)
    c.optimizer.update(learning_rate=2e-3, weight_decay=1e-4)
    c.evaluate.update(trajectories=32, batch_size=1000)
    c.sample.update(num=1000, decoder="inverse")
    if variant:
        c.model.condition = "none"
    return c
