"""Held-out scores: the same in any batch size and twice over, bounds in order, standard errors, and what evaluation.json holds."""

import dataclasses
import math
import re

import jax
import numpy as np
import pyarrow.parquet
import pytest
from sklearn.svm import SVC

from ntm_jax import files
from ntm_jax.api import Run
from ntm_jax.core import denoising, likelihood, trajectory
from ntm_jax.core.layers import Text
from ntm_jax.data import pipeline, shapes, sources, text
from ntm_jax.data.records import Layout, pad_text, write_records
from ntm_jax.errors import UserError
from ntm_jax.evaluation import evaluate, image_scores, scoring, statistics
from ntm_jax.evaluation.evaluate import EvaluationOptions
from ntm_jax.evaluation.features import make_extractor, pixels
from ntm_jax.evaluation.report import DENOISED, PARTS, check_unit, summarize, table, write_report
from ntm_jax.runtime import build, sharding
from ntm_jax.runtime import config as configuration
from ntm_jax.training import state
from tests.common import as_run, batch_of, experiment, randomised, setup, tiny_config

pytestmark = pytest.mark.usefixtures("quick_compilation")
SETTINGS = tiny_config()


@pytest.fixture(scope="module")
def trained():
    """(source, model, mesh, parameters): not trained, but with no term trivial."""
    source, model, mesh = setup(SETTINGS)
    return source, model, mesh, randomised(state.initialize(as_run(SETTINGS, model, mesh)).params)


@pytest.fixture(scope="module")
def tables(trained):
    """The scores of 20 records, by batch size: the last batch padded, one record over, and all in one."""
    source, model, mesh, params = trained
    sizes = {size: dataclasses.replace(SETTINGS, evaluate=dataclasses.replace(SETTINGS.evaluate, batch_size=size)) for size in (7, 19, 512)}
    return {size: scoring.score_records(as_run(settings, model, mesh, params), source, 3) for size, settings in sizes.items()}


def test_every_record_counts_once_in_any_batch_size(tables):
    for table in tables.values():
        np.testing.assert_array_equal(table["index"], np.arange(20))
        assert "mask" not in table
        for name, values in table.items():
            np.testing.assert_allclose(values, tables[512][name], rtol=1e-5, atol=1e-3, err_msg=name)  # of sums of hundreds of nats


def test_all_297_digits_count_in_any_batch_size(trained):
    _, model, mesh, params = trained
    source, found = sources.open_source("digits", "test"), {}
    for size in (7, 64, 512):
        settings = dataclasses.replace(SETTINGS, evaluate=dataclasses.replace(SETTINGS.evaluate, batch_size=size))
        table = scoring.score_records(as_run(settings, model, mesh, params), source, 1)
        found[size] = summarize(table, model, 1, 17)
        np.testing.assert_array_equal(table["index"], np.arange(297))
    for result in found.values():
        assert result["count"] == 297
        assert result["bits_per_dim"]["bound"]["mean"] == pytest.approx(found[512]["bits_per_dim"]["bound"]["mean"], rel=1e-5)
        assert result["trajectory_nll"]["by_level"] == pytest.approx(found[512]["trajectory_nll"]["by_level"], rel=1e-5)


def test_the_same_parameters_give_the_same_figures_twice(trained, tables):
    source, model, mesh, params = trained
    settings = dataclasses.replace(SETTINGS, evaluate=dataclasses.replace(SETTINGS.evaluate, batch_size=512))
    again = scoring.score_records(as_run(settings, model, mesh, params), source, 3)
    for name, values in again.items():
        np.testing.assert_array_equal(values, tables[512][name])
    other = scoring.score_records(as_run(dataclasses.replace(settings, seed=1), model, mesh, params), source, 3)
    assert np.abs(other["bound"] - again["bound"]).min() > 0


def test_the_weighted_bound_is_the_tighter_one_record_by_record(tables):
    table = tables[512]
    assert (table["importance_weighted"] > table["bound"]).all()
    assert (table["importance_weighted"] - table["bound"] < 1000).all()
    assert ((table["effective_sample_size"] >= 1 - 1e-5) & (table["effective_sample_size"] <= 3)).all()
    parts = sum(table[name].reshape(20, -1).sum(1) for name in PARTS)
    np.testing.assert_allclose(parts, table["bound"], rtol=1e-5, atol=1e-2)
    np.testing.assert_array_equal(table["weighted"][:, -1], table["importance_weighted"])  # of the first 1 and of all 3
    assert table["weighted"].shape == (20, 2)


def test_fewer_trajectories_are_the_first_of_many(trained, tables):
    source, model, mesh, params = trained
    one = scoring.score_records(as_run(SETTINGS, model, mesh, params), source, 1)
    np.testing.assert_allclose(one["importance_weighted"], tables[512]["weighted"][:, 0], rtol=1e-5)


def test_one_trajectory_makes_both_bounds_one(trained):
    source, model, mesh, params = trained
    table = scoring.score_records(as_run(SETTINGS, model, mesh, params), source, 1)
    np.testing.assert_allclose(table["bound"], table["importance_weighted"], rtol=1e-6)


def test_the_summary(trained, tables):
    table, dimensions = tables[512], 64
    result = summarize(table, trained[1], 3, 17)
    assert result["count"] == 20
    for name in ("bound", "importance_weighted"):
        values = -table[name].astype(np.float64) / dimensions
        bits, nats = result["bits_per_dim"][name], result["nats_per_dim"][name]
        assert nats["mean"] == pytest.approx(values.mean(), rel=1e-6)
        assert nats["stderr"] == pytest.approx(np.sqrt(((values - values.mean()) ** 2).sum() / 19 / 20), rel=1e-4)
        assert bits["mean"] == pytest.approx(nats["mean"] / math.log(2))
        assert bits["stderr"] == pytest.approx(nats["stderr"] / math.log(2))
        assert likelihood.bits_per_dim(-table[name].astype(np.float64), dimensions).mean() == pytest.approx(bits["mean"], rel=1e-6)
    assert result["bits_per_dim"]["importance_weighted"]["trajectories"] == 3
    levels = table["nll"].astype(np.float64) / dimensions
    assert result["trajectory_nll"]["by_level"] == pytest.approx(levels.mean(0), rel=1e-6)
    assert result["trajectory_nll"]["mean"] == pytest.approx(levels.mean(), rel=1e-6)
    assert result["trajectory_nll"]["stderr"] == pytest.approx(levels.mean(1).std(ddof=1) / np.sqrt(20), rel=1e-4)
    assert result["trajectory_nll"]["stderr_by_level"] == pytest.approx(levels.std(0, ddof=1) / np.sqrt(20), rel=1e-4)
    by_trajectories = result["bits_per_dim"]["importance_weighted"]["by_trajectories"]
    assert list(by_trajectories) == ["1", "3"]
    assert by_trajectories["3"]["mean"] == pytest.approx(result["bits_per_dim"]["importance_weighted"]["mean"], rel=1e-6)
    noise = result["bits_per_dim"]["bound"]["noise_stderr"] * dimensions * math.log(2)
    assert noise == pytest.approx(math.sqrt(table["bound_variance"].sum()) / 20, rel=1e-5)
    assert noise > 0
    terms = result["contributions"]
    paid = np.sum(result["rate_by_level"]) - terms["reconstruction"]
    assert paid == pytest.approx(result["nats_per_dim"]["bound"]["mean"], rel=1e-5)
    assert "bits_per_dim" not in summarize(table, trained[1], 3, 0)
    one = summarize({name: values[:1] for name, values in table.items()}, trained[1], 3, 17)
    assert one["nats_per_dim"]["bound"]["stderr"] == 0


def test_continuous_data_keep_their_x_0_over_trajectories(trained, monkeypatch):
    source, model, mesh, params = trained
    seen = []
    contributions = likelihood.contributions  # traced once a scan: what it is given is seen once a trajectory

    def spy(terms, xs, *rest):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), xs, ordered=True)
        return contributions(terms, xs, *rest)

    monkeypatch.setattr(likelihood, "contributions", spy)
    settings = dataclasses.replace(SETTINGS, seed=5)  # a configuration of its own: compiled with the spy
    for levels in (0, 17):
        batch = batch_of(source, settings, 4)
        result = scoring.score_batch(as_run(settings, model, mesh, params), batch, 3)
        jax.effects_barrier()
        assert ("reconstruction" in result) == (levels > 0)
        assert np.isfinite(result["bound"]).all()
    continuous, pixels = np.stack(seen[:3]), np.stack(seen[3:])
    np.testing.assert_array_equal(continuous[1:, :, 0], continuous[:-1, :, 0])
    assert (continuous[1:, :, 1:] != continuous[:-1, :, 1:]).all()
    assert (pixels[1:] != pixels[:-1]).all()
    noise = (continuous[0, :, 0] - 0.97 * batch_of(source, settings, 4)["x"]) / 0.03
    assert abs(noise.mean()) < 0.3  # of 256 draws
    assert abs(noise.std() - 1) < 0.2


def run_of(settings, trained, **changes) -> Run:
    source, model, mesh, params = trained
    return Run(settings, pipeline.spec(source, settings.data.patch_size), model, params, 3, mesh, "runs/tiny", **changes)


def test_evaluation_json(trained, tmp_path, capsys):
    settings = tiny_config(**{"evaluate.images": 20, "evaluate.split": "test[:12]", "evaluate.features": "pixels"})
    run = run_of(settings, trained)
    result, scored = evaluate.evaluate(run)
    write_report(run, result, scored, tmp_path / "evaluation.json", per_example=True)
    assert files.read_json(tmp_path / "evaluation.json", "") == result
    assert {"step", "split", "count", "bits_per_dim", "nats_per_dim", "trajectory_nll", "class_accuracy", "effective_sample_size",
            "frechet", "precision", "recall", "features", "provenance"} <= set(result)
    assert (result["step"], result["split"], result["count"]) == (3, "test[:12]", 12)
    for unit in ("bits_per_dim", "nats_per_dim"):
        assert set(result[unit]) == {"bound", "importance_weighted"}
        assert {"mean", "stderr", "noise_stderr"} <= set(result[unit]["bound"])
        assert {"mean", "stderr", "noise_stderr", "trajectories", "by_trajectories"} <= set(result[unit]["importance_weighted"])
    assert {"mean", "stderr", "by_level"} <= set(result["trajectory_nll"])
    assert len(result["trajectory_nll"]["by_level"]) == 2
    assert (result["class_accuracy"]["images"], result["class_accuracy"]["decoder"]) == (20, "score")
    assert 0 <= result["class_accuracy"]["mean"] < 0.6  # an untrained model's
    assert result["frechet"] > 3 * result["frechet_held_out"] > 0
    assert (result["features"]["name"], result["features"]["proxy"], result["features"]["images"]) == ("pixels", True, 20)
    provenance = result["provenance"]
    assert (provenance["t_min"], provenance["parameters"], len(provenance["checksum"])) == (0.03, "ema", 16)
    assert provenance["levels"] == pytest.approx([0.03, 0.515, 1])
    assert provenance["config"] == settings.raw
    printed = capsys.readouterr().out
    assert "test[:12] split, 12 records, step 3" in printed
    assert f"{result['bits_per_dim']['bound']['mean']:.4f} ± {result['bits_per_dim']['bound']['stderr']:.4f}" in printed
    assert "a proxy" in printed
    assert "FID" not in printed.upper()
    assert (tmp_path / "evaluation.png").stat().st_size > 1000
    rows = pyarrow.parquet.read_table(tmp_path / "evaluation.parquet").to_pydict()
    assert rows["index"] == list(range(12))
    np.testing.assert_array_equal(np.float32(rows["bound"]), scored["bound"])
    np.testing.assert_array_equal(np.float32(rows["nll_1"]), scored["nll"][:, 1])
    one, _ = evaluate.evaluate(run_of(SETTINGS, trained), EvaluationOptions(split="train[:4]", trajectories=1))
    assert (one["split"], one["count"], one["nats_per_dim"]["importance_weighted"]["trajectories"]) == ("train[:4]", 4, 1)
    assert "class_accuracy" not in one


def test_two_runs_are_compared_record_by_record(trained):
    source, model, mesh, params = trained
    other = run_of(SETTINGS, (source, model, mesh, jax.tree.map(lambda a: 1.01 * a, params)))
    run = run_of(SETTINGS, trained)
    result, mine = evaluate.evaluate(run, against=other)
    _, theirs = evaluate.evaluate(other)
    difference = (theirs["bound"].astype(np.float64) - mine["bound"]) / 64 / math.log(2)
    found = result["against"]["bits_per_dim"]["bound"]
    assert found["mean"] == pytest.approx(difference.mean(), rel=1e-6)
    assert found["stderr"] == pytest.approx(difference.std(ddof=1) / math.sqrt(20), rel=1e-6)
    unpaired = math.hypot(result["bits_per_dim"]["bound"]["stderr"], np.std(theirs["bound"], ddof=1) / 64 / math.log(2) / math.sqrt(20))
    assert found["stderr"] < unpaired
    assert "runs/tiny at step 3" in table(result, "bits_per_dim")
    same, _ = evaluate.evaluate(run, against=run)
    assert same["against"]["bits_per_dim"]["bound"] == {"mean": 0, "stderr": 0}
    elsewhere = dataclasses.replace(other, config=tiny_config(**{"data.source": "mnist_5k"}))
    with pytest.raises(UserError, match=r"has data\.source = mnist_5k, and this run has digits"):
        evaluate.evaluate(run, against=elsewhere)


def test_a_batch_beyond_the_memory_is_taken_in_parts(trained, tables, monkeypatch):
    source, model, mesh, params = trained
    score_batch, tried = scoring.score_batch, []

    def limited(config, model, params, batch, *rest):
        tried.append(len(batch["x"]))
        if tried[-1] > most:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.")
        return score_batch(config, model, params, batch, *rest)

    monkeypatch.setattr(scoring, "score_batch", limited)
    most = 5
    with pytest.warns(UserWarning, match="does not fit in memory: (10|5) at a time"):
        found = scoring.score_records(as_run(SETTINGS, model, mesh, params), source, 3)
    assert tried == [20, 10, 5, 5, 5, 5]
    for name, values in tables[512].items():
        np.testing.assert_allclose(found[name], values, rtol=1e-5, atol=1e-3, err_msg=name)
    most = 0
    with pytest.warns(UserWarning, match="does not fit"), pytest.raises(UserError, match="one record a device does not fit"):
        scoring.score_records(as_run(SETTINGS, model, mesh, params), source, 3)


def test_guidance_is_compared_on_the_same_noise(trained, tables, monkeypatch):
    settings = tiny_config(**{"evaluate.images": 30, "sample.decoder": "inverse"})
    run, made, generated = run_of(settings, trained), {}, image_scores.generated

    def kept(run, progress=False):
        assert run.config.sample.guidance not in made  # the configuration's own, 0, once
        made[run.config.sample.guidance] = generated(run, progress)
        return made[run.config.sample.guidance]

    monkeypatch.setattr(image_scores, "generated", kept)
    scales, train = (0.0, (3.0, 0.0)), sources.open_source("digits", "train")
    result = image_scores.image_scores(run, train, trained[0], pixels(17), scales)
    assert list(made) == list(scales)
    guided = dataclasses.replace(settings, sample=dataclasses.replace(settings.sample, guidance=scales[1]))
    np.testing.assert_array_equal(made[scales[1]], run_of(guided, trained).sample(30, np.arange(30) % 10))
    assert (made[scales[1]] != made[0.0]).any()
    real, labels = (np.stack([train.records[i][name] for i in range(1500)]) for name in ("image", "label"))
    machine = SVC().fit(real.reshape(1500, 64) / 16.0, labels)
    hits = np.stack([machine.predict(made[scale].reshape(30, 64) / 16.0) == np.arange(30) % 10 for scale in scales]).astype(int)
    for scale, found, right in zip(scales, result["guidance"], hits, strict=True):
        difference = right - hits[0]
        assert (found["guidance"], found["mean"]) == (scale, pytest.approx(right.mean()))
        assert found["difference"]["mean"] == pytest.approx(difference.mean())
        assert found["difference"]["stderr"] == pytest.approx(difference.std(ddof=1) / math.sqrt(30))
        assert found["frechet"] == pytest.approx(statistics.frechet(real.reshape(1500, 64) / 16, made[scale].reshape(30, 64) / 16))
    assert result["class_accuracy"]["mean"] == result["guidance"][0]["mean"]
    whole = {"split": "test", "step": 3} | summarize(tables[512], trained[1], 3, 17) | result
    whole["guidance"][1]["difference"] = {"mean": -0.125, "stderr": 0.0625}  # of an untrained model it may be 0
    said = table(whole, "bits_per_dim")
    assert said.count("less that of guidance") == 1  # the first has none
    assert f"{result['guidance'][1]['frechet']:.4f}" in re.search(r"frechet \(pixels features, a proxy\) of guidance \(3\.0.*", said)[0]
    assert re.search(r"of guidance \(3\.0, 0\.0\) less that of guidance 0\.0, % +-12\.5000 ± 6\.2500", said)
    monkeypatch.setattr(scoring, "score_records", None)  # refused before anything is scored
    with pytest.raises(UserError, match="guidance has 3 scales, and there are 2 steps"):
        evaluate.evaluate(run, EvaluationOptions(guidance=(0.0, (1.0, 1.0, 1.0))))
    with pytest.raises(UserError, match=r"--guidance compares class accuracies, .* with config\.evaluate\.images above 0"):
        evaluate.evaluate(run_of(SETTINGS, trained), EvaluationOptions(guidance=(1.0,)))


def test_denoising_by_level(trained):
    source, model, _, params = trained
    run = run_of(dataclasses.replace(SETTINGS, evaluate=dataclasses.replace(SETTINGS.evaluate, batch_size=7)), trained)
    found = evaluate.denoising_errors(run, source)  # the last batch of seven holds one record over, and padding
    batch = batch_of(source, SETTINGS, 20)
    t = np.tile(as_run(SETTINGS, model, None).sampled_levels(), (20, 1))
    keys = trajectory.example_keys(jax.random.key(SETTINGS.seed), "evaluate", batch["index"])
    xs = trajectory.simulate(batch["x"], t, trajectory.example_noise(keys, (3, *batch["x"].shape[1:])))
    clean = jax.jit(lambda xs: denoising.denoise_levels(model, params, xs, t, batch["label"]))(xs)
    assert list(found) == list(clean) == list(DENOISED)
    for name, values in clean.items():
        errors = np.square(np.asarray(values) - batch["x"][:, None]).mean((2, 3))
        np.testing.assert_allclose(found[name]["mean"], errors.mean(0), rtol=1e-4)
        np.testing.assert_allclose(found[name]["stderr"], errors.std(0, ddof=1) / np.sqrt(20), rtol=1e-3)
    noise = (t[0, :2] / (1 - t[0, :2])) ** 2
    np.testing.assert_allclose(found["as_it_is"]["mean"], noise, rtol=0.15)  # of 1,280 draws
    result, _ = evaluate.evaluate(run)
    assert result["denoising"] == found
    assert f"{found['own_score']['mean'][1]:.5f} ± {found['own_score']['stderr'][1]:.5f}" in table(result, "nats_per_dim")


def test_bits_of_latents_are_refused(trained):
    run = run_of(SETTINGS, trained)
    assert check_unit("bits_per_dim", run) is None
    latents = dataclasses.replace(run, spec=dataclasses.replace(run.spec, levels=0))
    assert check_unit("nats_per_dim", latents) is None
    with pytest.raises(UserError, match=r"take nats/dim, a bound on the density of the data noised to t_0 = 0\.03"):
        check_unit("bits_per_dim", latents)
    with pytest.raises(UserError, match="take nats/dim"):
        latents.bits_per_dim(np.zeros((1, 8, 8, 1)), 0)


def test_a_split_of_other_images_is_refused(trained):
    with pytest.raises(UserError, match=r"has images of shape \(4, 4, 1\), not the training split's shape"):
        evaluate.evaluate(run_of(tiny_config(**{"data.image_size": 4}), trained))


def test_captioned_pictures_are_retrieved(tmp_path, monkeypatch):
    """From the image of a held-out caption its own picture, among those of both splits; chance where the images are noise."""
    words, random = "a red blue circle square", np.random.default_rng(0)
    captions = [" ".join(random.choice(words.split(), 3)) for _ in range(60)]
    pictures = random.integers(0, 16, (60, 8, 8, 1), dtype=np.uint8)
    examples = [{"image": picture, "caption": caption} for picture, caption in zip(pictures, captions, strict=True)]
    write_records(str(tmp_path), {"train": examples[:40], "test": examples[40:]}, Layout((8, 8, 1), 16, captions=True))
    settings = tiny_config(**{
        "data.source": f"records:{tmp_path}", "model.condition": "text", "evaluate.images": 30, "sample.decoder": "inverse"})
    values = settings.raw
    values["data"]["text"] = f"words:3:{words}"
    settings = configuration.read(values)
    source, train = (settings.data.open(split) for split in ("test", "train"))
    model, mesh = build.make_model(settings, pipeline.spec(source, 2)), setup(SETTINGS)[2]
    params = randomised(state.initialize(as_run(settings, model, mesh)).params)
    run = Run(settings, pipeline.spec(source, 2), model, params, 3, mesh, "runs/tiny")
    extractor = make_extractor("pixels", train)
    made = []
    generated = image_scores.generated
    monkeypatch.setattr(image_scores, "generated", lambda *rest: made.append(generated(*rest)) or made[-1])
    found = image_scores.image_scores(run, train, source, extractor)["retrieval"]
    ranks = statistics.retrieved(pictures, made[0][:20], np.arange(40, 60), 16)
    assert found["rank_5"]["mean"] == pytest.approx((ranks <= 5).mean())
    assert found["rank_5"]["stderr"] == pytest.approx((ranks <= 5).std(ddof=1) / np.sqrt(20))
    assert (found["candidates"], found["captions"], found["proxy"]) == (60, 20, True)
    assert found["chance"] == {"rank_1": 1 / 60, "rank_5": 5 / 60}
    assert found["rank_1"]["mean"] < 0.3
    monkeypatch.setattr(image_scores, "generated", lambda *_: np.resize(pictures[40:], (30, 8, 8, 1)))  # the captions' own, in turn
    found = image_scores.image_scores(run, train, source, extractor)
    assert found["retrieval"]["rank_1"] == {"mean": 1.0, "stderr": 0.0}
    whole = {"split": "test", "step": 3} | summarize(
        scoring.score_records(as_run(settings, model, mesh, params), source, 1), model, 1, 16) | found
    assert re.search(r"own picture among the 5 nearest of 60 \(a proxy; chance 8\.3\), % +100\.0000 ± 0\.0000",
                     table(whole, "bits_per_dim"))
    assert "retrieval" not in image_scores.image_scores(run, train, source, None)
    monkeypatch.setattr(image_scores, "MAX_CANDIDATES", 59)
    assert "retrieval" not in image_scores.image_scores(run, train, source, extractor)


@pytest.fixture(scope="module")
def told():
    """A run of experiments/shapes.py, never trained: 16 samples of two steps."""
    values = experiment("shapes", "runlocal")
    values.update_from_flattened_dict({"model.width": 16, "model.head_size": 8, "model.transporter_width": 16, "trajectory.steps": (2,),
                                       "sample.steps": 2, "sample.guidance": 1.0, "evaluate.trajectories": 1, "sample.decoder": "inverse"})
    settings = configuration.read(values)
    source = settings.data.open(settings.evaluate.split)
    spec = pipeline.spec(source, settings.data.patch_size)
    model, mesh = build.make_model(settings, spec), sharding.make_mesh(settings.mesh)
    params = randomised(state.initialize(as_run(settings, model, mesh)).params)
    return Run(settings, spec, model, params, 3, mesh, "runs/told")


def test_samples_are_asked_for_the_captions_that_they_are_checked_by(told):
    heldout = told.config.data.open("heldout[3:11]")
    asked = []

    def tasks(images, captions):
        asked.extend(captions)
        return {"images": images}

    images = image_scores._prompted(told, dataclasses.replace(heldout, tasks=tasks), 0.0, False)["images"]
    assert asked == [heldout.captions[i % 8] for i in range(16)]
    states, _ = text.open_encoder(told.config.data.text).encode(asked)
    padded = [pad_text(own, 7) for own in states]
    y = Text(*(np.stack([p[name] for p in padded]) for name in ("text", "text_mask")))
    np.testing.assert_array_equal(images, told.sample(16, y, guidance=0.0))
    assert (images != told.sample(16, guidance=0.0)).any()  # those of the configuration's split


def test_tasks_by_guidance_and_split(told, tmp_path, monkeypatch, capsys):
    """Of made-up samples: true scenes without guidance, and those of a guidance of 2 with every third one's left half black."""
    calls = []

    def generated(run, progress=False):
        scale, records = run.config.sample.guidance, run.config.data.open(run.config.evaluate.split).records
        calls.append((run.config.evaluate.split, scale))
        images = np.stack([records[i % len(records)]["image"] for i in range(run.config.evaluate.images)])
        images[:: {0.0: 100, 1.0: 1, 2.0: 3}[scale], :, :12] = 0
        return images

    monkeypatch.setattr(image_scores, "generated", generated)
    result, scored = evaluate.evaluate(told, EvaluationOptions(guidance=(2.0, 0.0)))
    assert sorted(calls) == [(split, scale) for split in ("heldout", "test[:16]") for scale in (0.0, 1.0, 2.0)]
    tasks, seen = result["tasks"], told.config.data.open("test[:16]")
    assert {name: tasks[name] for name in ("split", "guidance", "images", "steps", "decoder")} == {
        "split": "test[:16]", "guidance": 1.0, "images": 16, "steps": 2, "decoder": "inverse"}
    assert "class_accuracy" not in result
    captions = [seen.captions[i] for i in range(16)]
    task = np.array([shapes.task_of(caption) for caption in captions])

    def expected(values):
        means = {name: values[task == name].mean() for name in shapes.TASKS}
        return means | {"overall": np.mean(list(means.values()))}

    right = {scale: shapes.score(generated(dataclasses.replace(told, config=dataclasses.replace(
        told.config, sample=dataclasses.replace(told.config.sample, guidance=scale))), False), captions) for scale in (0.0, 1.0, 2.0)}
    for found, scale in ((tasks, 1.0), *zip(tasks["by_guidance"], (2.0, 0.0), strict=True)):
        assert found["guidance"] == scale
        assert {name: found[name]["mean"] for name in (*shapes.TASKS, "overall")} == pytest.approx(expected(right[scale]["right"]))
        assert {name: found["difference"][name]["mean"] for name in (*shapes.TASKS, "overall")} == pytest.approx(
            expected(right[scale]["right"].astype(float) - right[2.0]["right"]))
        assert {name: found[name]["count"] for name in shapes.TASKS} == {name: (task == name).sum() for name in shapes.TASKS}
        assert found["shares"]["empty"]["mean"] == right[scale]["empty"].mean()
        assert found["shares"]["colour"]["mean"] == pytest.approx(np.nanmean(right[scale]["colour"]))
    errors = [right[2.0]["right"][task == name].std(ddof=1) / math.sqrt((task == name).sum()) for name in shapes.TASKS]
    assert tasks["by_guidance"][0]["overall"]["stderr"] == pytest.approx(math.sqrt(np.square(errors).sum()) / 6)
    unseen = tasks["by_guidance"][1]["unseen"]
    assert unseen["split"] == "heldout"
    assert "single_object" not in unseen
    assert unseen["color_attr"] == {"mean": 1.0, "stderr": 0.0, "count": 4}
    assert 0 < tasks["by_guidance"][0]["overall"]["mean"] < 1

    write_report(told, result, scored, tmp_path / "evaluation.json")
    assert files.read_json(tmp_path / "evaluation.json", "") == result
    lines = capsys.readouterr().out.splitlines()
    table = [re.split(r" {2,}", line.strip()) for line in lines[next(i for i, line in enumerate(lines) if "asked, %" in line) :]]
    seen_table, unseen_table = table[:12], table[12:]
    assert seen_table[0] == ["samples of test[:16] that show what was asked, %", "guidance 2.0", "guidance 0.0"]
    assert [row[0] for row in seen_table[1:8]] == [*shapes.TASKS, "overall"]
    assert seen_table[8][0] == "overall less that of guidance 2.0"
    assert [row[0] for row in seen_table[9:]] == ["share: empty", "share: colour", "share: shape"]
    assert unseen_table[0][0] == "samples of heldout that show what was asked, %"
    assert [row[0] for row in unseen_table[1:7]] == [*shapes.TASKS[1:], "overall"]
    assert unseen_table[5][2] == "100.0 ± 0.0"
    calls.clear()
    alone, _ = evaluate.evaluate(told, EvaluationOptions(split="heldout[:8]"))
    assert calls == [("heldout[:8]", 1.0)]
    assert {"unseen", "by_guidance", "difference"} & set(alone["tasks"]) == set()
