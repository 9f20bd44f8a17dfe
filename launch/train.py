"""Trains an experiment: python -m launch.train --config=digits --workdir=runs/digits.

The same command resumes a stopped run.
"""

import sys

from absl import flags

from . import program

flags.DEFINE_string("profile", None, "START:STOP, steps that are traced; the trace, and a summary "
                    "of where their time went, are written in WORKDIR/profile.")
flags.DEFINE_integer("stop_status", 0, "Exit status of a run that SIGTERM, SIGHUP or Ctrl-C "
                     "stopped early, for schedulers that restart a failed job.")
flags.DEFINE_multi_string("writer", [], "Also sends the metrics and pictures there: wandb:PROJECT "
                          "for Weights & Biases (needs the extra [wandb] and `wandb login`), or a "
                          "writer that --import registers. Repeat it for more.")


def main():
    from etils import epath

    from ntm_jax import api
    from ntm_jax.analysis.profile import Trace

    f, span = program.FLAGS, program.span("profile")
    tracer = Trace(epath.Path(f.workdir) / "profile", span) if span else None
    if not api.train(program.read_config(f.workdir), f.workdir, tracer=tracer, writers=f.writer):
        sys.exit(f.stop_status)


if __name__ == "__main__":
    program.define_config()
    program.define_workdir("The run's folder, local or on object storage.")
    program.define_processes()
    program.run(main)
