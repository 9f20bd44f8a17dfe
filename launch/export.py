"""Exports a run: python -m launch.export --workdir=runs/digits --out=exports/digits.

The folder runs without this package: parameters as safetensors, a compiled sampler and likelihood
for CPU, CUDA and TPU, the configuration, a model card and a script that samples. ntm_jax.load and
the programs' --workdir accept it like a run's folder. --push=OWNER/NAME also uploads it to the
Hugging Face Hub, where they accept it as hf://OWNER/NAME.
"""

from absl import flags

from . import program

flags.DEFINE_string("out", None, "A new folder.", required=True)
flags.DEFINE_integer("steps", None, "Number of steps T; the configuration's by default.",
                     lower_bound=1)
flags.DEFINE_string("push", None, "OWNER/NAME, a repository on the Hugging Face Hub to upload the "
                    "folder to; created if needed. Needs the extra [hub] and `hf auth login`.")
flags.DEFINE_bool("private", False, "With --push: creates a private repository.")


def main():
    import jax

    from ntm_jax import api
    from ntm_jax.export import publish

    f = program.FLAGS
    repository = f.push if jax.process_index() == 0 else None
    if repository is not None:
        publish.check(repository)  # before the work
    program.load_run().export(f.out, f.steps, f.guidance, f.decoder)
    if repository is not None:
        print(f"pushed: {api.push(f.out, repository, f.private)}", flush=True)


if __name__ == "__main__":
    program.define_run(raw=True)
    program.define_sampling()
    program.define_processes()
    program.run(main)
