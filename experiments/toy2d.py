"""NTM of data whose density is known: gaussians, checkerboard and moons in the plane.

`mixture` is a mixture of Gaussians in 16 dimensions, and `field` are images of correlated Gaussians
in 64. Expected of gaussians, eight on a circle: an importance-weighted bound (1,000 trajectories)
0.02 nats below the true mean log-density at t_0, -0.99. After the density's name, `,no-transporter`
is the ablation with a deeper predictor, `,flow-matching` a velocity network of its size, and
`,flow-map` that network with a predicted divergence (F2D2, arXiv 2512.02636), for launch.truth.
"""

from ntm_jax.experiments import default

NAMES = ("gaussians", "checkerboard", "moons", "mixture", "field")
KINDS = ("no-transporter", "flow-matching", "flow-map")


@default.variants(*NAMES, *(f"{name},{kind}" for name in NAMES for kind in KINDS))
def get_config(variant: str):
    name, _, kind = variant.partition(",")
    c = default.get_config()
    # of the plane each coordinate is a token, of the others squares of four numbers are
    c.data.update(source=f"toy:{name}", batch_size=64,
                  patch_size=2 if name in ("mixture", "field") else 1)
    # levels k/16: a few long steps are hardest between t = 0.1 and 0.4, where modes part
    c.trajectory.update(shift=0.0, steps=(16,))
    c.model.update(
        width=32, head_size=16, kv_heads=2, transporter_width=32, transporter_blocks=4,
        transporter_layers=1, predictor_layers=2, condition="none")
    c.train.condition_dropout = 0.0
    c.optimizer.update(learning_rate=3e-3, weight_decay=1e-4)
    c.evaluate.update(trajectories=32, batch_size=2000)
    c.sample.update(num=1000, steps=16, decoder="inverse")
    if kind:
        c.model.update(transporter_blocks=0, predictor_layers=6)
    if kind in ("flow-matching", "flow-map"):
        c.model.update(head="flow_matching",
                       backbone="flow_map" if kind == "flow-map" else "transformer")
        c.train.objective = kind.replace("-", "_")
        c.data.batch_size = 256  # each example trains one level
        c.trajectory.steps = (4,)  # of the bounds that a flow-matching run reports, too
        c.sample.update(steps=50, decoder="euler")
    return c
