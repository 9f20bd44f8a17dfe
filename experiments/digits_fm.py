"""Class-conditional flow matching of digits: baseline of digits.py, start of digits_finetune.py.

The transformer of digits.py with a velocity head. Samples solve its ODE in 50 Euler steps. Its
likelihood is that of the exact Gaussian posterior at the velocity's clean image, in the 4 steps of
digits.py, and not a good one.
"""

from ntm_jax.experiments import default, digits


@default.Experiment
def get_config():
    c = digits.base()
    c.data.batch_size = 128
    c.model.update(transporter_blocks=0, transporter_layers=1, head="flow_matching")
    c.train.objective = "flow_matching"
    c.optimizer.update(learning_rate=3e-3, weight_decay=0.3)
    c.sample.update(steps=50, decoder="euler")
    return c
