"""How fast this machine does what a run does, and how near its limits: python -m launch.benchmark --config=experiments/digits.py.

With --workdir=runs/digits in the place of --config only the sampler and its parts, with that run's parameters: what they make of the
parallel inverse, and a denoiser's run its own denoiser.

Other work on the machine disturbs the figures, and threads that wander between cores too. On a CPU give it cores of its own:
OMP_NUM_THREADS=1 taskset -c 0-3 python -m launch.benchmark --config=experiments/digits.py
"""

from absl import flags

from . import program
from ntm_jax.errors import UserError

flags.DEFINE_integer("runs", 5, "Timed runs of each row, of which the median counts.", lower_bound=1)
flags.DEFINE_integer("batch", None, "Images that are sampled at a time; config.sample.num if not given.", lower_bound=1)
flags.DEFINE_string("workdir", None, "A run's folder: the sampler alone, with its parameters.")
flags.DEFINE_string("rows", "", "Only the rows whose name holds this, such as train or inverse.")
flags.DEFINE_string("json", None, "A file for the rows as JSON.")


def main():
    f = program.FLAGS
    if bool(f.config) == bool(f.workdir):
        raise UserError("give either --config, an experiment, or --workdir, a run's folder")

    import json

    import jax

    from ntm_jax import files
    from ntm_jax.runtime import benchmark, config, load

    if f.workdir:
        rows = benchmark.benchmark_run(load.load(f.workdir), f.runs, f.batch, f.rows)
    else:
        rows = benchmark.benchmark(config.read(f.config), f.runs, f.batch, f.rows)
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
