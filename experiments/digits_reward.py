"""Post-trains experiments/digits.py on the log-probability of the asked class.

`--config.init_from=WORKDIR` names the run to improve; see docs/howto/reward.md. The reward is that
of a classifier which the run trains at its start. Rewards are not normalised: among right samples
differences of almost nothing would count as much as mistakes, and all would become alike. A bonus
for samples that differ from the others of their class keeps them as far apart as before. The last
two steps of four learn: they make the mistakes, and the others would add noise to the gradient.
"""

from ntm_jax.experiments import default, digits


@default.Experiment
def get_config():
    c = digits.get_config()
    c.train.update(
        objective="policy_gradient", steps=3000, save_every=500, evaluate_every=500, log_every=10)
    c.reward.update(name="classifier", samples=8, normalise=False, kl=0.002, diversity=1.0,
                    data_loss_weight=0.05, levels=(0, 2))
    c.optimizer.update(
        learning_rate=3e-4, warmup_steps=10, weight_decay=0.0, ema_decay=0.998)
    return c
