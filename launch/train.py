"""Trains an experiment: python -m launch.train --config=experiments/digits.py --workdir=runs/digits. The same command resumes."""

from absl import flags

from launch import program

flags.DEFINE_string("profile", None, "START:STOP, steps of which a trace is written in WORKDIR/profile, for TensorBoard or Perfetto.")


def main():
    from ntm_jax.runtime import config, train

    train.train(config.read(program.FLAGS.config), program.FLAGS.workdir, profile=program.span("profile"))


if __name__ == "__main__":
    program.define_config()
    program.define_workdir("The run's folder, local or on object storage.")
    program.define_processes()
    program.run(main)
