"""NTM of points of the plane whose density is known: gaussians, checkerboard or moons.

Expected of gaussians, eight on a circle: an importance-weighted bound (1,000 trajectories) 0.02
nats below the true mean log-density at t_0, -0.99. `,no-transporter` after the density's name is
the ablation with a deeper predictor.
"""

from ntm_jax.experiments import default


def get_config(variant: str = "gaussians"):
    names = ("gaussians", "checkerboard", "moons")
    default.check_variant(__file__, variant, *names, *(f"{name},no-transporter" for name in names))
    name, _, ablation = variant.partition(",")
    c = default.get_config()
    c.data.update(source=f"toy:{name}", batch_size=64)
    # levels k/16: a few long steps are hardest between t = 0.1 and 0.4, where modes part
    c.trajectory.update(shift=0.0, steps=(16,))
    c.model.update(
        width=32, head_size=16, kv_heads=2, transporter_width=32, transporter_blocks=4,
        transporter_layers=1, predictor_layers=2, condition="none")
    c.train.condition_dropout = 0.0
    c.optimizer.update(learning_rate=3e-3, weight_decay=1e-4)
    c.evaluate.update(trajectories=32, batch_size=2000)
    c.sample.update(num=1000, steps=16, decoder="inverse")
    if ablation:
        c.model.update(transporter_blocks=0, predictor_layers=6)
    return c
