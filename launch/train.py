"""Trains an experiment: python -m launch.train --config=digits --workdir=runs/digits.

The same command resumes a stopped run.
"""

import re
import sys

from absl import flags

from ntm_jax.errors import UserError

from . import program

flags.DEFINE_string("workdir", None, "The run's folder, local or on object storage.", required=True)
flags.DEFINE_string("profile", None, "START:STOP, steps that jax.profiler traces into "
                    "WORKDIR/profile, for xprof and Perfetto.")
flags.DEFINE_integer("stop_status", 0, "Exit status of a run that SIGTERM, SIGHUP or Ctrl-C "
                     "stopped early, for schedulers that restart a failed job.")
flags.DEFINE_multi_string("writer", [], "Also sends the metrics and pictures there: wandb:PROJECT "
                          "for Weights & Biases (needs the extra [wandb] and `wandb login`), or a "
                          "writer that --import registers. Repeat it for more.")


def main():
    from ntm_jax import api
    from ntm_jax.runtime import stops

    f = program.FLAGS
    span = _steps(f.profile) if f.profile else None
    with stops.Watch(f.stop_status):
        run = api.train(program.read_config(f.workdir), f.workdir, profile=span, writers=f.writer)
    if not run:
        sys.exit(f.stop_status)


def _steps(span: str) -> tuple[int, int]:
    """The steps START:STOP."""
    match = re.fullmatch(r"(\d+):(\d+)", span)
    if not match or int(match[1]) >= int(match[2]):
        raise UserError(f"--profile={span}: expected START:STOP, two numbers of steps, the first "
                        "the smaller")
    return int(match[1]), int(match[2])


if __name__ == "__main__":
    program.define_config()
    program.define_processes()
    program.run(main)
