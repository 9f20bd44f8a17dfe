"""Images of a run: python -m launch.sample --workdir=runs/digits --num=100. PNG files, a grid, and an .npz in the layout of FID tools.

Of a model of texts: --prompts='a red fox' --prompts=captions.txt --per_prompt=4, and a benchmark's folders with --layout.
"""

from absl import flags

from . import program

flags.DEFINE_integer("num", None, "How many images; the configuration's if not given.", lower_bound=1)
flags.DEFINE_integer("batch", 500, "Images at a time.", lower_bound=1)
flags.DEFINE_integer("steps", None, "Number of steps T.", lower_bound=1)
flags.DEFINE_list("guidance", None, "Guidance scale w, or one for each step, from pure noise down: 1,0.5,0,0.")
flags.DEFINE_list("labels", None, "Classes, repeated over the images in turn; all classes if not given.")
flags.DEFINE_multi_string("prompts", None, "A prompt, a file with one a line or .jsonl with \"prompt\", or a folder of .txt files with one "
                          "each; give it several times for more. Held-out captions if not given.")
flags.DEFINE_integer("per_prompt", None, "Images of each prompt; 1 if not given, 4 with --layout.", lower_bound=1)
flags.DEFINE_enum("layout", None, ["geneval", "dpg"], "Folders for evaluators: GenEval's, of OUT, or DPG-Bench's, of OUT/dpg.")
flags.DEFINE_string("encoder", None, "The prompts' text encoder, such as flux2:FOLDER where the folder has moved; the run's if not given.")
flags.DEFINE_enum("decoder", None, ["inverse", "score", "denoiser", "euler", "heun"],
                  "How the last level becomes an image; of a flow-matching model, how its ODE is solved.")
flags.DEFINE_enum("inverse", None, ["auto", "parallel", "sequential"], "How the transporter is inverted: all tokens at once or in turn.")
flags.DEFINE_integer("step", None, "The checkpoint's step; the latest if not given.")
flags.DEFINE_integer("seed", None, "Image i of a seed is the same image in any batch size.")
flags.DEFINE_string("out", None, "A new folder, or that of the same call, stopped; WORKDIR/samples if not given.")
flags.DEFINE_string("autoencoder", None, "The folder of FLUX.2's autoencoder (diffusers' layout), which decodes latents: needs [flux2].")
flags.DEFINE_bool("save_trajectories", False, "Also writes every image's levels from pure noise down, trajectories.npz.")


def main():
    from ntm_jax.errors import UserError
    from ntm_jax.runtime import generate, load, prompts

    f = program.FLAGS
    asked_for = prompts.parse(f.prompts) if f.prompts else None
    if not asked_for and (f.per_prompt or f.encoder):
        raise UserError("--per_prompt and --encoder are of prompts, and there are none: give --prompts, or leave them out")
    number = len(asked_for) * (f.per_prompt or (4 if f.layout else 1)) if asked_for else None
    if number and f.num not in (None, number):
        raise UserError(f"--num is {f.num}, and {len(asked_for)} prompts make {number} images: leave it out, or change --per_prompt")
    run = load.load(f.workdir, f.step)
    generate.write_samples(run, f.out or f"{f.workdir}/samples", number or f.num or run.config.sample.num, f.batch, f.labels,
                           f.save_trajectories, f.autoencoder, asked_for, f.layout, f.encoder, steps=f.steps,
                           guidance=generate.parse_guidance(f.guidance), decoder=f.decoder, inverse=f.inverse, seed=f.seed)


if __name__ == "__main__":
    program.define_workdir("A run's folder, or an export.")
    program.define_processes()
    program.run(main)
