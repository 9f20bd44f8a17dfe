"""Held-out likelihood and image scores of a run: python -m launch.evaluate --workdir=runs/digits."""

from absl import flags

from launch import program

flags.DEFINE_integer("step", None, "The checkpoint's step; the latest if not given. Writes evaluation-STEP.json.")
flags.DEFINE_string("split", None, "The split, such as test or train[1350:]; the configuration's if not given.")
flags.DEFINE_integer("trajectories", None, "Trajectories a record for the importance-weighted bound.", lower_bound=1)
flags.DEFINE_bool("raw", False, "The raw parameters in place of their moving average.")


def main():
    from etils import epath

    from ntm_jax.runtime import evaluate, load

    f = program.FLAGS
    run = load.load(f.workdir, f.step, f.raw)
    result = evaluate.evaluate(run.config, run.model, run.params, run.mesh, run.step, split=f.split, trajectories=f.trajectories,
                               progress=True)
    evaluate.report(result, epath.Path(f.workdir) / ("evaluation.json" if f.step is None else f"evaluation-{f.step}.json"))


if __name__ == "__main__":
    program.define_workdir("A run's folder.")
    program.define_processes()
    program.run(main)
