"""Class-conditional flow matching of digits: baseline of digits.py, start of digits_finetune.py.

The transformer of digits.py with a velocity head. Samples solve its ODE in 50 Euler steps. Its
likelihood is that of the exact Gaussian posterior at the velocity's clean image, in the 4 steps of
digits.py, and not a good one.
"""

from ntm_jax.experiments import default


def get_config():
    c = default.get_config()
    c.data.update(source="digits", batch_size=128, patch_size=2)
    c.model.update(
        width=64, head_size=16, transporter_width=64, transporter_blocks=0, transporter_layers=1,
        predictor_layers=3, head="posterior", data_std=0.75)
    c.train.objective = "flow_matching"
    c.optimizer.update(learning_rate=3e-3, weight_decay=0.3)
    c.evaluate.update(trajectories=32, batch_size=297, images=4500, features="cnn")
    c.sample.update(steps=50, decoder="euler")
    return c
