"""Times the parts of an experiment on this machine, each beside the machine's limit for it.

    python -m launch.benchmark --config=experiments/digits.py

With --workdir=runs/digits in place of --config it times only the sampler and its parts, with that
run's parameters, on which the sweeps of the parallel inverse depend, and its denoiser if any.

With --vary=SETTING:VALUE,VALUE,... it times the training step at each value of a setting, and its
compilation:

    python -m launch.benchmark --config=digits --vary=model.predictor_layers:3,6,12

With --peers=FOLDER it compares this package with other public normalizing flows on this CPU, at
equal FLOPs, each in a process of its own: their training step and the inverse of their
transformation. FOLDER holds their checkouts. The program names those that are missing, and how to
get them:

    OMP_NUM_THREADS=1 taskset -c 0 python -m launch.benchmark --peers=../peers

With --frontier=RUN,RUN,... it trains nothing: it compares the speed and the scores of the samples
of trained runs, in one table and, with --out, a chart:

    python -m launch.benchmark --frontier=runs/digits,runs/digits_fm --out=runs/frontier

Other work on the machine, and threads that move between cores, disturb the figures. On a CPU,
reserve cores for it:

    OMP_NUM_THREADS=1 taskset -c 0-3 python -m launch.benchmark --config=experiments/digits.py
"""

from absl import flags

from ntm_jax.errors import UserError

from . import program

flags.DEFINE_integer(
    "runs", 5, "Timed runs of each row; their median is printed.", lower_bound=1)
flags.DEFINE_list(
    "frontier", None, "RUN,RUN,...: runs or exports of one data set; compares images/s, scores and "
    "training FLOPs by decoder and steps. Runs that differ in their seed alone are one model.")
flags.DEFINE_integer(
    "num", None, "Samples that are scored for each row of --frontier; the first run's "
    "config.evaluate.num_samples by default.", lower_bound=5)
flags.DEFINE_string(
    "out", None, "With --frontier: a folder for frontier.json, frontier.md and frontier.png, a new "
    "one or that of the same call.")
flags.DEFINE_integer(
    "batch", None, "Images sampled at a time; config.sample.num by default.", lower_bound=1)
flags.DEFINE_string("workdir", None, "A run's folder, an export, or hf://OWNER/NAME; times only "
                    "its sampler.")
flags.DEFINE_string(
    "peers", None, "A folder with checkouts of other flows; compares this package with them, on "
    "CPUs only.")
flags.DEFINE_string(
    "vary", None, "SETTING:VALUE,VALUE,...; times the train step of --config, and its compilation, "
    "at each value. Several settings, with commas between them, take the same value.")
flags.DEFINE_string("rows", "", "Only rows whose name contains this, such as train or inverse.")
flags.DEFINE_string("json", None, "A file to write the rows to, as JSON.")


def main():
    import json

    import jax

    from ntm_jax import files

    f = program.FLAGS
    if sum(map(bool, (f.config, f.workdir, f.peers, f.frontier))) != 1 or (
            f.vary and not f.config):
        raise UserError("give one of --config, an experiment, which --vary changes, --workdir, a "
                        "run's folder, --frontier, several of them, and --peers, a folder of other "
                        "flows")
    measure = _compare if f.peers else _frontier if f.frontier else _benchmark
    rows, text = measure()
    if not f.peers and jax.process_index():
        return
    print(text, flush=True)
    if f.json:
        files.write(f.json, json.dumps(rows, indent=2) + "\n")


def _compare() -> tuple[list[dict], str]:
    f = program.FLAGS
    try:
        from tests.peers import compare
    except ImportError:
        raise UserError("--peers needs the adapters in tests/peers: run it in a checkout of this "
                        "package's repository") from None
    rows = compare.compare(f.peers, f.runs, f.rows)
    return rows, "\n".join([f"{compare.machine()}, medians of {f.runs} runs in turn",
                            compare.table(rows), *compare.missing(f.peers)])


def _frontier() -> tuple[list[dict], str]:
    from ntm_jax.tools.rates import frontier

    f = program.FLAGS
    given = f.frontier, f.runs, f.num, f.batch, f.rows
    if f.out:
        frontier.check_out(f.out, frontier.call(*given))
    result = frontier.frontier(*given)
    if f.out:
        frontier.write(result, f.out)
    return result["rows"], frontier.table(result)


def _benchmark() -> tuple[list[dict], str]:
    import jax

    from ntm_jax.export.read import load_run
    from ntm_jax.tools.rates import benchmark

    f = program.FLAGS
    if f.vary:
        rows = benchmark.vary(f.config.to_dict(), f.vary, f.runs)
    elif f.workdir:
        rows = benchmark.benchmark_run(load_run(f.workdir), f.runs, f.batch, f.rows)
    else:
        rows = benchmark.benchmark(program.read_config(), f.runs, f.batch, f.rows)
    heads = (f"{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}, "
             f"medians of {f.runs} runs")
    return rows, f"{heads}\n{(benchmark.growth if f.vary else benchmark.table)(rows)}"


if __name__ == "__main__":
    program.define_config(required=False)
    program.define_processes()
    program.run(main)
