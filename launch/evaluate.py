"""Held-out likelihood and image scores of a run.

    python -m launch.evaluate --workdir=runs/digits
"""

from absl import flags

from . import program

flags.DEFINE_string("split", None, "The split, such as test or train[1350:], written to "
                    "evaluation-SPLIT.json; the configuration's by default.")
flags.DEFINE_integer("trajectories", None, "Trajectories a record for the importance-weighted "
                     "bound.", lower_bound=1)
flags.DEFINE_string("against", None, "Another run's folder, or WORKDIR/checkpoints/STEP, to "
                    "compare with on the same records.")
flags.DEFINE_bool("per_example", False, "Also writes the scores of every record, as parquet.")
flags.DEFINE_integer("steps", None, "Number of steps T, or of the ODE for samples, into "
                     "evaluation-Nsteps.json; the configuration's by default.", lower_bound=1)
flags.DEFINE_integer("images", None, "Samples that are scored; config.evaluate.num_samples by "
                     "default.", lower_bound=0)
flags.DEFINE_multi(program.Scales(), flags.ArgumentSerializer(), "guidance", None, "Also scores "
                   "samples at this guidance. Repeat it to compare several with the first.")
flags.DEFINE_enum("unit", None, ["bits", "nats"], "Unit of the printed likelihoods; by default "
                  "bits for pixels and nats for latents.")
flags.DEFINE_string("inception_weights", None, "Inception's weights, a file of torch-fidelity's, "
                    "for features=inception; the configuration's by default.")
flags.DEFINE_string("reference", None, "An .npz of feature statistics, mu and sigma, to compare "
                    "samples with in place of the training images; the configuration's by default.")
flags.DEFINE_string("write_reference", None, "A new .npz, for the statistics of the training "
                    "images, which --reference takes.")
flags.DEFINE_enum("pixel_likelihood", None, ["binned", "bayes", "histogram", "network"],
                  "p(x | x_0) in place of the run's own, fitted anew to the training data where it "
                  "needs them; into evaluation-NAME.json.")
flags.DEFINE_enum("features", None, ["none", "pixels", "cnn", "inception"], "What samples are "
                  "compared by; the configuration's by default.")


def main():
    import dataclasses

    from ntm_jax import api
    from ntm_jax.evaluation.evaluate import EvaluationOptions
    from ntm_jax.evaluation.report import check_unit
    from ntm_jax.sampling.generate import override

    f = program.FLAGS
    run = program.load_run().best_of(f.candidates, f.judge, f.stop_nats)
    own = run.config
    sample = override(own, steps=f.steps)
    config = own.with_sampling(steps=sample.steps).with_evaluation(
        num_samples=own.evaluate.num_samples if f.images is None else f.images)
    run = dataclasses.replace(run, config=config)
    if f.pixel_likelihood:
        run = run.with_pixel_likelihood(f.pixel_likelihood, progress=True)
    unit = f"{f.unit}_per_dim" if f.unit else None
    if unit:
        check_unit(unit, run)
    options = program.from_flags(EvaluationOptions, guidance=tuple(f.guidance or ()))
    against = api.load(f.against, raw=f.raw) if f.against else None
    result, scores = run.scores(options, against, progress=True)
    step = program.asked_step(run)
    parts = ["evaluation"] + ([] if step is None else [str(step)]) + ["raw"] * f.raw
    if sample.steps != own.sample.steps:
        parts.append(f"{sample.steps}steps")
    if f.pixel_likelihood:
        parts.append(f.pixel_likelihood)
    if run.selection:
        parts.append(f"{f.candidates}candidates")
    if f.split not in (None, run.config.evaluate.split):
        parts.append(f.split.replace("[", "-").replace(":", "to").replace("]", ""))
    run.report("-".join(parts) + ".json", result, scores, f.per_example, unit)


if __name__ == "__main__":
    program.define_run(raw=True)
    program.define_processes()
    program.define_selection()
    program.run(main)
