"""Compares the log-density estimates of runs with a known density.

    python -m launch.truth --workdir=runs/toy --workdir=runs/toy-flow-matching --out=runs/truth
"""

from absl import flags

from . import program

flags.DEFINE_multi_string("workdir", None, "A run's folder or an export, of data whose density is "
                          "known, such as toy:gaussians. Repeat it to compare several.",
                          required=True)
flags.DEFINE_string("out", None, "Folder of truth.json and truth.png.", required=True)
flags.DEFINE_string("split", None, "The split; the first run's by default.")
flags.DEFINE_integer("trajectories", 32, "Trajectories a record for the bounds of an NTM.",
                     lower_bound=1)


def main():
    from ntm_jax.projects.densities.known_density import compare_with_truth

    f = program.FLAGS
    compare_with_truth(f.workdir, f.out, f.split, f.trajectories)


if __name__ == "__main__":
    program.run(main)
