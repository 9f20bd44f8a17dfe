"""NTM of a posterior of the benchmark sbibm, --config=sbi:TASK: simulation-based inference.

TASK is two_moons, slcp, slcp_moments, gaussian_mixture or bernoulli_glm (arXiv 2101.04653).
launch.sbi scores the run. `,no-transporter` after the task's name is the Gaussian ablation with a
deeper predictor. Figures: docs/results/sbi.md.
"""

from ntm_jax.experiments import default

TASKS = {  # simulations, steps T, and the shift of the noise levels: low ones put more near 0
    "two_moons": (10_000, 8, -1.5),
    "slcp": (30_000, 8, -1.0),
    "slcp_moments": (30_000, 8, -1.0),  # of sufficient statistics of slcp's points
    "gaussian_mixture": (10_000, 8, -2.5),
    "bernoulli_glm": (10_000, 4, -1.0),  # nearly Gaussian posteriors
}


@default.variants(*TASKS, *(f"{task},no-transporter" for task in TASKS))
def get_config(variant: str):
    task, _, ablation = variant.partition(",")
    count, steps, shift = TASKS[task]
    c = default.get_config()
    c.data.update(source=f"sbi:{task},count={count}", batch_size=128)
    # posteriors have structure of a hundredth of the prior's width: t_0 is finer still
    c.trajectory.update(shift=shift, steps=(steps,), t_min=0.004, t_min_range=(0.003, 0.006))
    c.model.update(
        width=64, head_size=16, kv_heads=4, transporter_width=64, transporter_blocks=2,
        transporter_layers=1, predictor_layers=2, condition="vector", condition_shift=True)
    c.train.update(steps=6000, condition_dropout=0.0, evaluate_every=2000, save_every=1000)
    c.optimizer.update(learning_rate=2e-3, weight_decay=1e-4)
    c.evaluate.update(trajectories=32, batch_size=1000)
    c.sample.update(num=1000, steps=steps, decoder="inverse")
    if task == "bernoulli_glm":  # the model of the others overfits
        c.model.update(width=32, head_size=8, transporter_width=32)
        c.data.batch_size, c.train.steps = 256, 1500
        c.optimizer.update(learning_rate=4e-3, weight_decay=0.3)
    if task == "slcp":  # the statistics of its points are harder to learn than the posterior
        c.model.condition_layers = 4
        c.data.batch_size, c.train.steps = 256, 2500
        c.optimizer.update(learning_rate=4e-3, weight_decay=0.1)
    if task == "slcp_moments":  # learned sooner than from the points
        c.train.update(steps=3000, evaluate_every=1000)
        c.optimizer.learning_rate = 4e-3
    if ablation:
        c.model.update(transporter_blocks=0, predictor_layers=6)
    return c
