"""The model card: what it says of the model, and the figures of a matching evaluation."""

import dataclasses
import json

import pytest

from ntm_jax.export import card
from ntm_jax.export.write import PLATFORMS
from tests.common import as_run, setup
from tests.export.common import TEXTS

FIGURE = {"mean": 2.0, "stderr": 0.5}
EVALUATION = {
    "step": 4, "split": "test", "count": 297, "trajectory_nll": FIGURE,
    "class_accuracy": {"mean": 0.9, "stderr": 0.01, "images": 20},
    "bits_per_dim": {"bound": FIGURE, "importance_weighted": FIGURE | {"trajectories": 32}},
    "nats_per_dim": {},
    "provenance": {"parameters": "ema", "config": {"sample": {"steps": 2}}}}


def test_the_card_of_a_model_of_pixels(run):
    text = card.markdown(run, 1234, PLATFORMS)
    assert "| data | digits, split train: 20 records of 8 x 8 x 1 pixels of 17 levels |" in text
    assert "| condition | one of 10 classes |" in text
    assert "| parameters | 1,234, their moving average (decay 0.999) |" in text
    assert "| sampling | 2 steps, guidance 0.5, decoder inverse |" in text
    assert "label = index % 10  # each of the 10 classes in turn\n" in text
    assert "index, label))  # [n, H, W, C], integers 0..16\n" in text
    assert "run on cpu, cuda, tpu, on one device" in text
    assert "log probability of the pixels in nats, of 3 trajectories, [n]" in text


def test_the_card_of_a_model_of_texts_and_latents(tmp_path):
    _, model, mesh = setup(TEXTS)
    run = dataclasses.replace(as_run(TEXTS, model, mesh), step=4, workdir=str(tmp_path))
    text = card.markdown(run, 1234, PLATFORMS)
    assert "| the states of a text encoder; `sample.py` draws without a caption |" in text
    assert "text = np.zeros((number, 3, 8), np.float16)" in text
    assert "index, text, text_mask))  # [n, H, W, C], latents" in text
    assert "log density of the latents noised to 0.03 in nats" in text


def test_likelihoods_of_normalised_data_are_of_the_samplers_numbers(run):
    """The card hands log_likelihood what the sampler gave, not the data in their own scale."""
    normalised = {"pixel_levels": 0, "mean": (0.5,), "std": (2.0,)}
    for changes, meaning, shape, data, decoded in (
            ({}, "[n, H, W, C], latents", "8 x 8 x 1 latents |", "latents, of mean", "float32"),
            ({"columns": 64}, "[n, D], standard", "64 columns |", "standardised columns noised",
             "float64")):
        spec = dataclasses.replace(run.spec, **normalised | changes)
        text = card.markdown(dataclasses.replace(run, spec=spec), 1234, PLATFORMS)
        assert f"index, label))  # {meaning}" in text
        assert f"records of {shape}" in text
        assert f"log density of the {data}" in text
        assert f"\ndecoded = images * np.{decoded}(spec[" in text
        assert "np.uint32(seed), index, images, label)" in text
        assert text.count("\nimages = ") == 1


def test_the_card_of_an_array_says_which_figure_is_in_which_units(run, tmp_path):
    values = EVALUATION | {"nats_per_dim": EVALUATION["bits_per_dim"]}
    clean = {"bound": FIGURE | {"mean": 3.0}, "importance_weighted": FIGURE | {"trajectories": 32}}
    values["clean_nats_per_dim"] = clean
    values.pop("bits_per_dim")
    (tmp_path / "evaluation.json").write_text(json.dumps(values))
    spec = dataclasses.replace(run.spec, pixel_levels=0, columns=2, mean=(0.5, 1), std=(2.0, 0.1))
    run = dataclasses.replace(run, spec=spec, workdir=str(tmp_path))
    text = card.markdown(run, 1234, PLATFORMS)
    assert "in own units is the standardised one less sum(log(std)) = -1.6094 nats |" in text
    assert "| bound, nats/dim, in own units | 3.0000" in text
    assert "| bound at t_0, nats/dim, in own units | 2.0000" in text
    for noised in ("", " at t_0"):
        name = f"importance-weighted bound{noised} (32 trajectories), nats/dim, in own units"
        assert f"| {name} | 2.0" in text
    assert "| trajectory NLL, nats/dim, standardised | 2.0000" in text
    assert '\nown_nats = nats - np.log(spec["std"]).sum()' in text


def test_the_card_has_the_figures_of_the_same_step_and_parameters(run, tmp_path):
    run = dataclasses.replace(run, workdir=str(tmp_path))
    assert "bits/dim" not in card.markdown(run, 1234, PLATFORMS)
    (tmp_path / "evaluation.json").write_text(json.dumps(EVALUATION))
    text = card.markdown(run, 1234, PLATFORMS)
    assert "| 297 records of split test, 2 steps | |" in text
    assert "| importance-weighted bound (32 trajectories), bits/dim | 2.0000 ± 0.5000 |" in text
    assert "| class accuracy of 20 samples, % | 90.0000 ± 1.0000 |" in text
    raw = dataclasses.replace(run, raw=True)
    for other in (dataclasses.replace(run, step=6), raw):
        assert "bits/dim" not in card.markdown(other, 1234, PLATFORMS)
    values = EVALUATION | {"provenance": EVALUATION["provenance"] | {"parameters": "raw"}}
    (tmp_path / "evaluation-raw.json").write_text(json.dumps(values))
    assert "297 records of split test" in card.markdown(raw, 1234, PLATFORMS)


DAMAGED = {
    "a list": b"[]", "null": b"null", "empty": b"", "not UTF-8": b"\xff",
    "too deep": b"[" * 100_000, "a long number": b'{"step": ' + b"9" * 5000 + b"}",
    "no figures": b'{"step": 4, "provenance": {"parameters": "ema"}}',
    "no section": b'{"step": 4, "provenance": 4}',
    "a word": b'{"step": 4, "provenance": {"parameters": "ema"}, "bits_per_dim": "x"}'}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_evaluation_is_left_out_of_the_card(run, tmp_path, kind):
    (tmp_path / "evaluation.json").write_bytes(DAMAGED[kind])
    message = (r"evaluation\.json is left out of the model card, since it cannot be used \(.*\): "
               "evaluate the run again")
    with pytest.warns(UserWarning, match=message):
        assert card.figures(dataclasses.replace(run, workdir=str(tmp_path))) == ""
