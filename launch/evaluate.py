"""Held-out likelihood and image scores of a run: python -m launch.evaluate --workdir=runs/digits."""

from absl import flags

from . import program

flags.DEFINE_integer("step", None, "The checkpoint's step; the latest if not given. Writes evaluation-STEP.json.")
flags.DEFINE_string("split", None, "The split, such as test or train[1350:]; the configuration's if not given.")
flags.DEFINE_integer("trajectories", None, "Trajectories a record for the importance-weighted bound.", lower_bound=1)
flags.DEFINE_bool("raw", False, "The raw parameters in place of their moving average.")
flags.DEFINE_string("against", None, "Another run's folder, or WORKDIR/checkpoints/STEP, to compare with on the same records.")
flags.DEFINE_bool("per_example", False, "Also writes every record's scores, as parquet.")
flags.DEFINE_integer("steps", None, "Number of steps T, or of an ODE's samples; the configuration's if not given.", lower_bound=1)
flags.DEFINE_integer("images", None, "Samples that are scored; config.evaluate.images if not given.", lower_bound=1)
flags.DEFINE_multi_string("guidance", None, "Also image scores or tasks at this guidance; give it often, the first is compared with.")
flags.DEFINE_enum("unit", None, ["bits", "nats"], "Of the printed likelihoods; bits of pixels and nats of latents if not given.")
flags.DEFINE_string("inception_weights", None, "Inception's weights, a file of torch-fidelity's, for config.evaluate.features=inception.")
flags.DEFINE_enum("features", None, ["none", "pixels", "cnn", "inception"], "What samples are compared by; else the configuration tells.")


def main():
    import dataclasses

    from etils import epath

    from ntm_jax.runtime import evaluate, generate, load

    f = program.FLAGS
    run = load.load(f.workdir, f.step, f.raw)
    generate.check(run.config, f.steps, None)
    config = run.config
    run = dataclasses.replace(run, config=dataclasses.replace(
        config, evaluate=dataclasses.replace(config.evaluate, images=f.images or config.evaluate.images),
        sample=dataclasses.replace(config.sample, steps=f.steps or config.sample.steps)))
    unit = f"{f.unit}_per_dim" if f.unit else None
    if unit:
        evaluate.check_unit(unit, run)
    against = load.load(f.against, raw=f.raw) if f.against else None
    result, scored = evaluate.evaluate(run, split=f.split, trajectories=f.trajectories, against=against, features=f.features,
                                       inception_weights=f.inception_weights, progress=True,
                                       guidance=tuple(generate.parse_guidance(scales.split(",")) for scales in f.guidance or ()))
    name = "evaluation.json" if f.step is None and run.workdir == f.workdir else f"evaluation-{run.step}.json"
    evaluate.report(run, result, scored, epath.Path(run.workdir) / name, f.per_example, unit)


if __name__ == "__main__":
    program.define_workdir("A run's folder, or an export.")
    program.define_processes()
    program.run(main)
