"""Times the parts of an experiment on this machine, each beside the machine's limit for it.

    python -m launch.benchmark --config=experiments/digits.py

With --workdir=runs/digits in place of --config it times only the sampler and its parts, with that
run's parameters, on which the sweeps of the parallel inverse depend, and its denoiser if any.

Other work on the machine, and threads that move between cores, disturb the figures. On a CPU,
reserve cores for it:

    OMP_NUM_THREADS=1 taskset -c 0-3 python -m launch.benchmark --config=experiments/digits.py
"""

from absl import flags

from ntm_jax.errors import UserError

from . import program

flags.DEFINE_integer(
    "runs", 5, "Timed runs of each row; their median is printed.", lower_bound=1)
flags.DEFINE_integer(
    "batch", None, "Images sampled at a time; config.sample.num by default.", lower_bound=1)
flags.DEFINE_string("workdir", None, "A run's folder, an export, or hf://OWNER/NAME; times only "
                    "its sampler.")
flags.DEFINE_string("rows", "", "Only rows whose name contains this, such as train or inverse.")
flags.DEFINE_string("json", None, "A file to write the rows to, as JSON.")


def main():
    f = program.FLAGS
    if bool(f.config) == bool(f.workdir):
        raise UserError("give either --config, an experiment, or --workdir, a run's folder")

    import json

    import jax

    from ntm_jax import files
    from ntm_jax.analysis import benchmark
    from ntm_jax.export.read import load_run

    if f.workdir:
        rows = benchmark.benchmark_run(load_run(f.workdir), f.runs, f.batch, f.rows)
    else:
        rows = benchmark.benchmark(program.read_config(), f.runs, f.batch, f.rows)
    if jax.process_index() == 0:
        kind = jax.devices()[0].device_kind
        print(f"{jax.device_count()} x {kind}, jax {jax.__version__}, medians of {f.runs} runs")
        print(benchmark.table(rows), flush=True)
        if f.json:
            files.write(f.json, json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    program.define_config(required=False)
    program.define_processes()
    program.run(main)
