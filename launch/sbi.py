"""Posteriors of a run of sbi:TASK against the benchmark's references, and their calibration.

    python -m launch.sbi --workdir=runs/two_moons

Needs the files of sbibm: pip install --no-deps sbibm.
"""

from absl import flags

from . import program

flags.DEFINE_integer("observations", 10, "Observations of the benchmark that are scored.",
                     lower_bound=1, upper_bound=10)
flags.DEFINE_integer("samples", 10_000, "Samples of each that are compared with its reference.",
                     lower_bound=100, upper_bound=10_000)
flags.DEFINE_integer("weighted", 500_000,
                     "The most samples of each that are weighted, so that --samples of them count; "
                     "never fewer than twice --samples.",
                     lower_bound=1)
flags.DEFINE_integer("simulations", 1000, "Fresh simulations that calibration is measured on.",
                     lower_bound=10)
flags.DEFINE_integer("draws", 100, "Draws of the posterior of each of these.", lower_bound=1)


def main():
    from ntm_jax.projects.sbi.benchmark import Amounts, benchmark, write_benchmark

    run = program.load_run()
    result, drawn = benchmark(run, program.from_flags(Amounts))
    write_benchmark(result, drawn, run.workdir, program.asked_step(run))


if __name__ == "__main__":
    program.define_run()
    program.run(main)
