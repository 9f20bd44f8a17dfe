"""Samples that a reward accepts, as a folder of captioned images to train on.

    python -m launch.collect --workdir=runs/shapes --reward=shapes --min_reward=1 --num=8000 \
      --guidance=0 --out=data/own

The same command goes on after an interruption. Train on the folder with
--config.data.source=folder:data/own; see docs/howto/reward.md.
"""

from absl import flags

from . import program

flags.DEFINE_integer("num", 8000, "Samples to draw, of the training captions in turn.",
                     lower_bound=1)
flags.DEFINE_string("reward", None, "A reward, such as shapes; config.reward.name by "
                    "default.")
flags.DEFINE_float("min_reward", None, "The lowest reward of the samples that are kept.",
                   required=True)
flags.DEFINE_integer("batch", 500, "Samples at a time.", lower_bound=1)
flags.DEFINE_integer("seed", None, "Sample i of a seed is the same in any batch size, within "
                     "rounding.")
flags.DEFINE_string("out", None, "A new folder, or the folder of an interrupted identical call.",
                    required=True)


def main():
    from ntm_jax.projects.reward.collect import CollectRequest

    program.load_run().collect(program.FLAGS.out, program.from_flags(CollectRequest))


if __name__ == "__main__":
    program.define_run()
    program.define_sampling()
    program.define_processes()
    program.run(main)
