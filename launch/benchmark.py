"""How fast this machine does what a run does, and how near its limits: python -m launch.benchmark --config=experiments/digits.py.

Other work on the machine disturbs the figures, and threads that wander between cores too. On a CPU give it cores of its own:
OMP_NUM_THREADS=1 taskset -c 0-3 python -m launch.benchmark --config=experiments/digits.py
"""

from absl import flags

from launch import program

flags.DEFINE_integer("runs", 5, "Timed runs of each row, of which the median counts.", lower_bound=1)
flags.DEFINE_string("json", None, "A file for the rows as JSON.")


def main():
    import json

    import jax
    from etils import epath

    from ntm_jax.runtime import benchmark, config

    settings = config.read(program.FLAGS.config)
    rows = benchmark.benchmark(settings, program.FLAGS.runs)
    if jax.process_index() == 0:
        kind = jax.devices()[0].device_kind
        print(f"{jax.device_count()} x {kind}, jax {jax.__version__}, medians of {program.FLAGS.runs} runs")
        print(benchmark.table(rows), flush=True)
        if program.FLAGS.json:
            epath.Path(program.FLAGS.json).write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    program.define_config()
    program.define_processes()
    program.run(main)
