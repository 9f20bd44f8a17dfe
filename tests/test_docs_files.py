"""docs/reference/files.md describes every key that the programs write; the keys are the code's."""

import ast
import dataclasses
import inspect
import re
import textwrap

import pytest

from ntm_jax.analysis import benchmark, compile, profile
from ntm_jax.analysis import report as compiled
from ntm_jax.analysis.peers import compare
from ntm_jax.core import denoising
from ntm_jax.data import pipeline
from ntm_jax.data.prepare import plan, shards
from ntm_jax.data.prepare import run as preparation
from ntm_jax.data.records import layout
from ntm_jax.evaluation import (
    evaluate,
    image_scores,
    known_density,
    report,
    scoring,
    statistics,
    tasks,
)
from ntm_jax.evaluation.posteriors import benchmark as posteriors
from ntm_jax.evaluation.posteriors import scores
from ntm_jax.export import read, write
from ntm_jax.training import metrics, objectives
from ntm_jax.training.reward import held_out, policy_gradient, preference, rollouts
from tests.common import ROOT

PAGE = (ROOT / "docs/reference/files.md").read_text()
LEVEL = "K"  # on the page, where the code writes a level's number


def written(*parts) -> set[str]:
    """The keys that the source of modules and functions writes into dicts, {...} and d["key"] = .

    Formatted parts of a key become LEVEL. Flags, settings and numbered columns are left out.
    """
    found = set()
    for part in parts:
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(part)))):
            if isinstance(node, ast.Dict):
                found |= {_text(key) for key in node.keys}
            elif isinstance(node, ast.DictComp):
                found.add(_text(node.key))
            elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
                found.add(_text(node.slice))
    return {key for key in found if key and re.fullmatch(r"[a-z][a-z_]+(/\w+)*", key)}


def _text(node) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(LEVEL if isinstance(part, ast.FormattedValue) else part.value
                       for part in node.values if not isinstance(part, str))
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def fields(*classes) -> set[str]:
    return {field.name for cls in classes for field in dataclasses.fields(cls)}


def described(heading: str) -> set[str]:
    """The keys in the first column of the tables below a heading, to the next one of its depth."""
    depth, _ = heading.split(" ", 1)
    _, rest = PAGE.split(f"\n{heading}\n")
    section = re.split(rf"^#{{1,{len(depth)}}} ", rest, flags=re.M)[0]
    first = [line.split("|")[1] for line in section.splitlines() if line.startswith("|")]
    return {key for cell in first for key in re.findall(r"`([^`]+)`", cell)}


def file_keys(cls) -> set[str]:
    """A dataclass's fields as the files call them, which say levels for pixel_levels."""
    return {"levels" if name == "pixel_levels" else name for name in fields(cls)}


LOSSES = [policy_gradient.loss, preference.loss]
HELD = [objectives.held_out_bound, objectives.held_out_velocity, objectives.held_out_denoiser]
LOGGED = [metrics.MetricsReporter.write, metrics.logged_scalars, metrics.Rates.read]
KEYS = {
    "## evaluation.json": lambda: (
        written(evaluate, report, image_scores, statistics, tasks, denoising.denoiser_errors,
                known_density.compare_with_true_density, objectives.measure_velocity,
                held_out.scores)
        | {*report.LOWER, *report.HIGHER, *report.CONTRIBUTIONS, *report.DENOISED, *scoring.BOUNDS}
        | {*report.FEATURE_SCORES, *report.MEASURES, *report.units(256)}
        | {f"rank_{k}" for k in image_scores.RANKS}),
    "## metrics.jsonl": lambda: (
        written(*LOGGED, rollouts._scalars, *LOSSES, *HELD)
        - {f"evaluate/{LEVEL}", f"reward/{LEVEL}"}
        | {f"evaluate/{unit}" for unit in report.NAMES} | {"loss", "grad_norm", "reward/GROUP"}),
    "### config.json": lambda: file_keys(pipeline.DataSpec),
    "### manifest.json": lambda: (
        file_keys(layout.Layout) | fields(layout._Split, plan.Choices)
        | written(layout.write_manifest, plan.make_plan, preparation._finish)),
    "### A shard's JSON": lambda: fields(shards.Tally),
    "## Exports": lambda: (
        fields(read.ExportInfo) | written(write._about, write.write_export, write._write)),
    "## profile/summary.json": lambda: written(profile.summarize),
    "## launch.compile --json": lambda: (
        written(compile.compile_for, compile.vary, compile._report, compiled.figures)),
    "## launch.benchmark --json": lambda: written(benchmark.measure, benchmark.vary),
    "## launch.benchmark --peers --json": lambda: written(compare._rows),
    "## launch.sbi": lambda: (
        written(posteriors._observation, posteriors._calibration, posteriors.benchmark,
                scores.uniformity, statistics.mean_and_stderr) - {"noise_stderr"}),
    "## launch.truth": lambda: written(known_density.benchmark, known_density.signed_errors),
}


@pytest.mark.parametrize("heading", KEYS)
def test_every_key_is_described(heading):
    keys = KEYS[heading]()
    assert keys, "the code writes no key that this test finds"
    lacking = sorted(keys - described(heading))
    assert not lacking, f"docs/reference/files.md, {heading}: describe {lacking}"


def test_the_glossary_says_which_direction_is_better():
    """Every figure of the code's directions has the same direction on the page."""
    rows = [line.split("|")[1:3] for line in PAGE.splitlines() if line.startswith("|")]
    for word, names in (("lower", report.LOWER), ("higher", report.HIGHER)):
        for name in names:
            units = [unit for cell, unit in rows if f"`{name}`" in cell]
            assert any(word in unit for unit in units), f"{name} is not said to be better {word}"
