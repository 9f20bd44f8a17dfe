"""Exports a run: python -m launch.export --workdir=runs/digits --out=exports/digits.

The folder runs without this package: parameters as safetensors, a compiled sampler and likelihood
for CPU, CUDA and TPU, the configuration, a model card and a script that samples. ntm_jax.load and
the programs' --workdir accept it like a run's folder.
"""

from absl import flags

from . import program

flags.DEFINE_string("out", None, "A new folder.")
flags.DEFINE_integer("step", None, "The checkpoint's step; the latest by default.")
flags.DEFINE_bool("raw", False, "The raw parameters in place of their moving average.")
flags.DEFINE_integer("steps", None, "Number of steps T; the configuration's by default.",
                     lower_bound=1)
flags.DEFINE_list("guidance", None, "Guidance scale w, or one for each step, from pure noise down: "
                  "1,0.5,0,0.")
flags.DEFINE_enum("decoder", None, ["inverse", "score", "denoiser", "euler", "heun"],
                  "How the last level becomes an image.")
flags.mark_flag_as_required("out")


def main():
    from ntm_jax import api
    from ntm_jax.sampling import generate

    f = program.FLAGS
    run = api.load(f.workdir, f.step, f.raw)
    run.export(f.out, f.steps, generate.parse_guidance(f.guidance), f.decoder)


if __name__ == "__main__":
    program.define_workdir("A run's folder, or an export, for other settings of sampling.")
    program.define_processes()
    program.run(main)
