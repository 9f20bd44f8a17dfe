"""Trains an experiment: python -m launch.train --config=experiments/digits.py --workdir=runs/digits. The same command resumes."""

import sys

from absl import flags

from . import program

flags.DEFINE_string("profile", None, "START:STOP, steps of which a trace, and where their time goes, are written in WORKDIR/profile.")
flags.DEFINE_integer("stop_status", 0, "Exit status of a run that SIGTERM stopped early, for schedulers that restart a failed job.")


def main():
    from ntm_jax.runtime import config, train

    finished = train.train(config.read(program.FLAGS.config), program.FLAGS.workdir, profile=program.span("profile"))
    if finished is None:
        sys.exit(program.FLAGS.stop_status)


if __name__ == "__main__":
    program.define_config()
    program.define_workdir("The run's folder, local or on object storage.")
    program.define_processes()
    program.run(main)
