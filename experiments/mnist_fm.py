"""Class-conditional flow matching of MNIST: baseline of mnist.py, start of mnist_finetune.py.

Needs `pip install -e '.[mnist]'`. The transformer of mnist.py with a velocity head. Samples solve
its ODE in 50 Euler steps. Its likelihood is that of the exact Gaussian posterior at the velocity's
clean image, in the 4 steps of mnist.py: the figure of mnist_finetune.py at step 0, and not a good
one. Expected: class accuracy 82% in 50 steps, 87% in 8, 90% in 4 (--steps), held-out velocity error
0.232.
"""

from ntm_jax.experiments import default, mnist


@default.variants("", smoke_source=mnist.MOCK)
def get_config():
    c = mnist.base()
    c.data.batch_size = 128
    c.model.update(transporter_blocks=0, transporter_layers=1, head="flow_matching")
    c.train.objective = "flow_matching"
    c.sample.update(steps=50, decoder="euler")
    return c
