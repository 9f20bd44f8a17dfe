"""Trains an experiment: python -m launch.train --config=experiments/digits.py --workdir=runs/digits. The same command resumes."""

from launch import program


def main():
    from ntm_jax.runtime import config, train

    train.train(config.read(program.FLAGS.config), program.FLAGS.workdir)


if __name__ == "__main__":
    program.define_config()
    program.define_workdir("The run's folder, local or on object storage.")
    program.run(main)
