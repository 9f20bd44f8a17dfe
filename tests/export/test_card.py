"""The model card: what it says of the model, its example, and the figures of an evaluation."""

import dataclasses
import json
import re

import numpy as np

from ntm_jax.export import card
from ntm_jax.export.write import PLATFORMS

FIGURE = {"mean": 2.0, "stderr": 0.5}
EVALUATION = {
    "step": 4, "split": "test", "count": 297, "trajectory_nll": FIGURE,
    "bits_per_dim": {"bound": FIGURE, "importance_weighted": FIGURE | {"trajectories": 32}},
    "nats_per_dim": {},
    "provenance": {"parameters": "ema", "config": {"sample": {"steps": 2}}}}


def test_the_example_of_the_card_gives_the_likelihood(run, exported, monkeypatch):
    example, = re.findall(r"```python\n(.*?)```", (exported / "README.md").read_text(), re.S)
    monkeypatch.chdir(exported)
    index = np.arange(5, dtype=np.int32)
    names = {"index": index, "label": index, "images": run.sample(5, index)}
    exec(example, names)
    np.testing.assert_allclose(
        names["nats"], run.log_prob(names["images"], index, trajectories=3), rtol=1e-6)


def test_the_card_of_an_array_says_which_figure_is_in_which_units(run, tmp_path):
    values = EVALUATION | {"nats_per_dim": EVALUATION["bits_per_dim"]}
    clean = {"bound": FIGURE | {"mean": 3.0}, "importance_weighted": FIGURE | {"trajectories": 32}}
    values["clean_nats_per_dim"] = clean
    values.pop("bits_per_dim")
    (tmp_path / "evaluation.json").write_text(json.dumps(values))
    spec = dataclasses.replace(run.spec, pixel_levels=0, columns=2, mean=(0.5, 1), std=(2.0, 0.1))
    run = dataclasses.replace(run, spec=spec, workdir=str(tmp_path))
    text = card.markdown(run, 1234, PLATFORMS)
    for said in ("records of 2 columns |", "log density of the standardised columns noised",
                 "in own units is the standardised one less sum(log(std)) = -1.6094 nats |",
                 "| bound, nats/dim, in own units | 3.0000",
                 "| bound at t_0, nats/dim, in own units | 2.0000",
                 "| trajectory NLL, nats/dim, standardised | 2.0000",
                 "\nown_nats = nats - -1.6094"):
        assert said in text


def test_the_card_has_the_figures_of_the_same_step_and_parameters(run, tmp_path):
    run = dataclasses.replace(run, workdir=str(tmp_path))
    assert "bits/dim" not in card.markdown(run, 1234, PLATFORMS)
    (tmp_path / "evaluation.json").write_text(json.dumps(EVALUATION))
    text = card.markdown(run, 1234, PLATFORMS)
    assert "| 297 records of split test, 2 steps | |" in text
    assert "| importance-weighted bound (32 trajectories), bits/dim | 2.0000 ± 0.5000 |" in text
    raw = dataclasses.replace(run, raw=True)
    for other in (dataclasses.replace(run, step=6), raw):
        assert "bits/dim" not in card.markdown(other, 1234, PLATFORMS)
