"""Images of a run: python -m launch.sample --workdir=runs/digits --num=100.

Writes PNG files, a grid, and an .npz in the layout that FID tools read. For a model of texts:
--prompts='a red fox' --prompts=captions.txt --per_prompt=4, and a benchmark's folders with
--layout.
"""

from absl import flags

from . import program

flags.DEFINE_integer("num", None, "Number of images; the configuration's by default.",
                     lower_bound=1)
flags.DEFINE_integer("batch", 500, "Images at a time.", lower_bound=1)
flags.DEFINE_integer("steps", None, "Number of steps T.", lower_bound=1)
flags.DEFINE_list("labels", None, "Classes, by name or number, repeated over the images in "
                  "turn; all by default.")
flags.DEFINE_multi_string("prompts", None, "A prompt, a file with one a line or .jsonl with "
                          "\"prompt\", or a folder of .txt files with one each. Repeat it for "
                          "more. Held-out captions by default.")
flags.DEFINE_integer("per_prompt", None, "Images of each prompt; 1 by default, 4 with --layout.",
                     lower_bound=1)
flags.DEFINE_enum("layout", None, ["geneval", "dpg"], "Folders for evaluators: GenEval's in OUT, "
                  "or DPG-Bench's in OUT/dpg.")
flags.DEFINE_string("encoder", None, "The prompts' text encoder, such as flux2:FOLDER where the "
                    "folder has moved; the run's by default.")
flags.DEFINE_enum("inverse", None, ["auto", "parallel", "sequential"], "How the transporter is "
                  "inverted: all tokens at once or in turn.")
flags.DEFINE_integer("seed", None, "Image i of a seed is the same in any batch size, within "
                     "rounding.")
flags.DEFINE_string("out", None, "A new folder, or the folder of an interrupted identical call; "
                    "WORKDIR/samples by default.")
flags.DEFINE_string("autoencoder", None, "Decodes latents: kl:FOLDER or flux2:FOLDER, in "
                    "diffusers' layout; the configuration's by default.")
flags.DEFINE_bool("log_prob", False, "Also writes the log-density of every sample's trajectory, in "
                  "nats, into samples.npz.")
flags.DEFINE_multi_string("condition", None, "A vector that samples are conditioned on, such as "
                          "0.5,-1.2. Repeat it for more, in turn over the samples. Held-out "
                          "vectors by default.")
flags.DEFINE_bool("save_trajectories", False, "Also writes every image's levels from pure noise "
                  "down, trajectories.npz.")


def main():
    from ntm_jax.data.conditions import vector
    from ntm_jax.errors import UserError
    from ntm_jax.sampling import prompts
    from ntm_jax.sampling.write import SampleRequest

    f = program.FLAGS
    texts = prompts.parse(f.prompts) if f.prompts else None
    number = len(texts) * (f.per_prompt or (4 if f.layout else 1)) if texts else None
    if texts and f.num not in (None, number):
        raise UserError(f"--num is {f.num}, and {len(texts)} prompts make {number} images: leave "
                        "it out, or change --per_prompt")
    run = program.load_run().best_of(f.candidates, f.judge, f.stop_nats)
    run.write_samples(f.out or f"{run.workdir}/samples", program.from_flags(
        SampleRequest, num=number or f.num or run.config.sample.num, prompts=texts,
        condition=vector.parse(f.condition)))


if __name__ == "__main__":
    program.define_run()
    program.define_sampling()
    program.define_processes()
    program.define_selection()
    program.run(main)
