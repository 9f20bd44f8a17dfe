"""Images of a run: python -m launch.sample --workdir=runs/digits --num=100. PNG files, a grid, and an .npz in the layout of FID tools."""

from absl import flags

from launch import program

flags.DEFINE_integer("num", None, "How many images; the configuration's if not given.", lower_bound=1)
flags.DEFINE_integer("batch", 500, "Images at a time.", lower_bound=1)
flags.DEFINE_integer("steps", None, "Number of steps T.", lower_bound=1)
flags.DEFINE_list("guidance", None, "Guidance scale w, or one for each step, from pure noise down: 1,0.5,0,0.")
flags.DEFINE_list("labels", None, "Classes, repeated over the images in turn; all classes if not given.")
flags.DEFINE_enum("decoder", None, ["inverse", "score", "denoiser", "euler", "heun"],
                  "How the last level becomes an image; of a flow-matching model, how its ODE is solved.")
flags.DEFINE_enum("inverse", None, ["auto", "parallel", "sequential"], "How the transporter is inverted: all tokens at once or in turn.")
flags.DEFINE_integer("step", None, "The checkpoint's step; the latest if not given.")
flags.DEFINE_integer("seed", None, "Image i of a seed is the same image in any batch size.")
flags.DEFINE_string("out", None, "A new folder, or that of the same call, stopped; WORKDIR/samples if not given.")
flags.DEFINE_string("autoencoder", None, "The folder of FLUX.2's autoencoder (diffusers' layout), which decodes latents: needs [flux2].")
flags.DEFINE_bool("save_trajectories", False, "Also writes every image's levels from pure noise down, trajectories.npz.")


def main():
    from ntm_jax.runtime import generate, load

    f = program.FLAGS
    run = load.load(f.workdir, f.step)
    generate.write_samples(run, f.out or f"{f.workdir}/samples", f.num or run.config.sample.num, f.batch, f.labels, f.save_trajectories,
                           f.autoencoder, steps=f.steps, guidance=generate.parse_guidance(f.guidance), decoder=f.decoder, inverse=f.inverse,
                           seed=f.seed)


if __name__ == "__main__":
    program.define_workdir("A run's folder.")
    program.define_processes()
    program.run(main)
