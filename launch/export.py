"""A run as a folder that runs without this package: python -m launch.export --workdir=runs/digits --out=exports/digits.

Parameters as safetensors, a compiled sampler and likelihood for CPU, CUDA and TPU, the configuration, a model card and a script that
samples. ntm_jax.load and the programs' --workdir take the folder like a run's.
"""

from absl import flags

from . import program

flags.DEFINE_string("out", None, "A new folder.")
flags.DEFINE_integer("step", None, "The checkpoint's step; the latest if not given.")
flags.DEFINE_bool("raw", False, "The raw parameters in place of their moving average.")
flags.DEFINE_integer("steps", None, "Number of steps T; the configuration's if not given.", lower_bound=1)
flags.DEFINE_list("guidance", None, "Guidance scale w, or one for each step, from pure noise down: 1,0.5,0,0.")
flags.DEFINE_enum("decoder", None, ["inverse", "score", "denoiser", "euler", "heun"], "How the last level becomes an image.")
flags.mark_flag_as_required("out")


def main():
    from ntm_jax.runtime import export, generate, load

    f = program.FLAGS
    export.write_export(load.load(f.workdir, f.step, f.raw), f.out, f.steps, generate.parse_guidance(f.guidance), f.decoder)


if __name__ == "__main__":
    program.define_workdir("A run's folder, or an export, for other settings of sampling.")
    program.define_processes()
    program.run(main)
