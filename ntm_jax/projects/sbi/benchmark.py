"""A run of `sbi:TASK` against the benchmark's reference posteriors, and its calibration.

Symbols: n simulations; L draws of each posterior; m samples; D parameters; E numbers of x.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import numpy as np
from etils import epath

from ntm_jax import files
from ntm_jax.evaluation.statistics import mean_and_stderr
from ntm_jax.progress import track
from ntm_jax.projects.sbi import plots, references, scores, source, tasks
from ntm_jax.projects.weighing.reweight import Reweighted, reweight, systematic
from ntm_jax.runtime import sharding
from ntm_jax.runtime.run import Run
from ntm_jax.sampling import generate

FIGURES = ("c2st", "c2st_reweighted", "effective_share", "share_in_prior", "log_evidence")
BATCH = 2000  # draws at once
PROPOSALS = 2  # weighted samples for each one that is drawn by weight, at least
MARGIN = 1.1  # more samples than their effective share asks for


@dataclasses.dataclass(frozen=True)
class Amounts:
    """How much is drawn.

    observations: of the benchmark, at most 10. samples: for each of them, as many as are compared.
    weighted: the most that are drawn and weighted for each, beyond twice `samples`. simulations:
    fresh ones, for calibration. draws: of the posterior of each of these.
    """

    observations: int = references.OBSERVATIONS
    samples: int = 10_000
    weighted: int = 500_000
    simulations: int = 1000
    draws: int = 100


def benchmark(run: Run, amounts: Amounts) -> tuple[dict, plots.Drawn]:
    """The content of sbi.json, and what its pictures show.

    Raises UserError for a run of another source, and where the reference posteriors are missing.
    """
    config = run.config
    task = source.task_of(config.data.source)
    given = [references.read(task, number + 1) for number in range(amounts.observations)]
    rows, samples = [], []
    for number, reference in enumerate(track(given, "observations", "done"), 1):
        row, drawn = _observation(run, task, reference, amounts)
        rows.append({"observation": number, **row})
        samples.append(drawn)
    theta, draws = posterior_draws(run, task, amounts)
    ranks, shares = scores.ranks(theta, draws), scores.shares_nearer(theta, draws)
    means = {name: mean_and_stderr([row[name] for row in rows]) for name in FIGURES}
    result = {"task": task, "source": config.data.source, "workdir": run.workdir, "step": run.step,
              "samples": amounts.samples, **means, "observations": rows,
              "calibration": _calibration(ranks, shares, amounts.draws)}
    return result, plots.Drawn([r.samples for r in given], samples, ranks, shares)


def _observation(run: Run, task: str, reference: references.Reference, amounts: Amounts):
    """The scores of one observation, and its samples before and after weighting.

    Before: those inside the prior's support, up to m, [<= m, D]. After: [m, D], with copies, which
    the classifier learns: `distinct` counts the others.
    """
    m = amounts.samples
    simulator, known = tasks.find(task), reference.samples[:m]
    log_joint = functools.partial(simulator.log_joint, reference.x)
    found = _weighted(run, log_joint, reference.x, amounts)
    in_prior = np.isfinite(simulator.log_prior(found.samples))
    # Fewer copies than of `resampled`, which has as many samples as were weighted.
    drawn = systematic(found.weights, m, np.random.default_rng(run.config.seed))
    before, after = found.samples[in_prior][:m], found.samples[drawn]
    return {
        "c2st": scores.c2st(known[: len(before)], before),
        "c2st_reweighted": scores.c2st(known, after),
        "effective_share": found.effective_sample_size / len(found.samples),
        "share_in_prior": float(in_prior.mean()),
        "log_evidence": found.log_evidence,
        "weighted": len(found.samples),
        "distinct": len(np.unique(after, axis=0)),
    }, (before, after)


def _weighted(run: Run, log_joint: Callable, x, amounts: Amounts) -> Reweighted:
    """Weighted samples whose effective number is amounts.samples.

    It is less where amounts.weighted samples, or twice amounts.samples, are too few for it.
    """
    def draw(n: int) -> Reweighted:
        return reweight(run, log_joint, condition=x, n=n)

    n = PROPOSALS * amounts.samples
    found = draw(n)
    # Few samples show a larger effective share than many, so that a first guess may fall short.
    while found.effective_sample_size < amounts.samples and n < amounts.weighted:
        wanted = MARGIN * n * amounts.samples / found.effective_sample_size
        n = min(math.ceil(wanted), amounts.weighted)
        found = draw(n)
    return found


def posterior_draws(run: Run, task: str, amounts: Amounts):
    """Fresh parameters [n, D], and draws [n, L, D] of the run's posteriors of their simulations."""
    theta, x = source.simulate(task, amounts.simulations, source.FRESH)
    at_once = max(1, BATCH // amounts.draws)
    batches, parts = sharding.equal_batches(len(x), at_once), []
    for index in track(batches, "calibration", "batches"):
        given = run.condition.validate(
            at_once * amounts.draws, np.repeat(x[index], amounts.draws, 0))
        number = np.arange(len(index) * amounts.draws) + index[0] * amounts.draws
        drawn = np.asarray(generate.sample_at(run, number, given))
        parts.append(drawn.reshape(len(index), amounts.draws, -1))
    return theta, np.concatenate(parts)[: len(x)]


def _calibration(ranks, shares, draws: int) -> dict:
    """How far ranks [n, D] and shares [n] are from those of exact posteriors."""
    counts = np.rint(draws * shares).astype(int)
    return {"simulations": len(ranks), "draws": draws,
            "ranks": [scores.uniformity(column, draws) for column in ranks.T],
            "coverage": scores.uniformity(counts, draws)}


def write_benchmark(result: dict, drawn: plots.Drawn, out, step: int | None = None) -> None:
    """Writes sbi.json and its pictures in the folder `out`, and prints the means.

    step: is added to the names of the files.
    """
    folder, end = epath.Path(out), "" if step is None else f"-{step}"
    folder.mkdir(parents=True, exist_ok=True)  # new for a run on the Hub
    files.write_json(folder / f"sbi{end}.json", result)
    plots.posteriors(result, drawn, folder / f"posteriors{end}.png")
    plots.calibration(result, drawn, folder / f"calibration{end}.png")
    for name in FIGURES:
        each = " ".join(f"{row[name]:.3f}" for row in result["observations"])
        print(f"{name:<16} {result[name]['mean']:.3f} ± {result[name]['stderr']:.3f}: {each}")
    checks = result["calibration"]
    p_values = [check["p_value"] for check in checks["ranks"]]
    print(f"{checks['simulations']} fresh simulations, p-values: {min(p_values):.3g}, the smallest "
          f"of the ranks of {len(p_values)} parameters (wrong below 0.01 / {len(p_values)}); "
          f"{checks['coverage']['p_value']:.3g} of the coverage (wrong below 0.01)")
