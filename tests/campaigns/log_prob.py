"""A job that prints the log-likelihoods of ten digits, for a test of several processes."""

import json

from launch import program


def main():
    import dataclasses

    import numpy as np

    import ntm_jax

    run = ntm_jax.load(program.FLAGS.workdir)
    # Three batches, of which the last one repeats images.
    config = run.config.with_evaluation(batch_size=4)
    run = dataclasses.replace(run, config=config)
    images = np.stack([record["image"] for record in config.data.open("test[:10]").records])
    nats = run.log_prob(images, label=np.arange(10), trajectories=2)
    print(json.dumps(nats.tolist()))


if __name__ == "__main__":
    program.define_workdir("A run's folder.")
    program.define_processes()
    program.run(main)
