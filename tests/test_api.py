"""The Python interface: the README's lines, and what they refuse."""

import dataclasses
import inspect
import re
import tomllib

import jax
import numpy as np
import pytest

import ntm_jax
from ntm_jax import api
from ntm_jax.core.trajectory import example_keys, example_noise, simulate
from ntm_jax.sampling.generate import as_levels
from tests.common import ROOT, TINY, new_run, random_run, tiny_config

LINES = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)[0]
SHRUNK = TINY | {"train.steps": 2, "evaluate.split": "test", "model.transporter_blocks": 0}


def images_and_labels(n: int = 60):
    """Images of a square in one of ten places, [n, 8, 8, 1], and the place, [n]."""
    labels = np.arange(n) % 10
    images = np.zeros((n, 8, 8, 1), np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[label % 5 : label % 5 + 3, label // 5 * 3 : label // 5 * 3 + 3] = 200
    return images, labels


@pytest.mark.slow
def test_the_readmes_lines_train_on_arrays_and_give_samples_and_likelihoods(tmp_path, monkeypatch):
    shrink = api.experiment
    monkeypatch.setattr(api, "experiment", lambda name, **own: shrink(name, **own | SHRUNK))
    monkeypatch.chdir(tmp_path)
    images, labels = images_and_labels()
    names = {"images": images, "labels": labels}
    assert len([line for line in LINES.splitlines() if line.strip()]) == 5
    exec(LINES, names)
    assert names["samples"].shape == (16, 8, 8, 1)
    assert names["nats"].shape == (16,)
    assert np.isfinite(names["nats"]).all()

    run = names["run"]
    assert run.config.data.source.startswith("arrays:")
    again = ntm_jax.load("runs/notebook")
    np.testing.assert_array_equal(again.sample(16, label=7), names["samples"])
    bits = run.bits_per_dim(names["samples"], label=7)
    np.testing.assert_allclose(bits, -names["nats"] / np.log(2) / 64, rtol=1e-5)
    assert run.evaluate()["count"] == 6


def test_an_experiment_suits_arrays_in_memory():
    images, labels = images_and_labels()
    config = ntm_jax.experiment("folder", data=images, labels=labels, **{"train.steps": 3})
    assert (config.data.image_size, config.data.patch_size) == (8, 2)
    assert (config.model.condition, config.evaluate.num_samples) == ("class", 1000)
    source = config.data.open("all")
    np.testing.assert_array_equal(sorted(r["label"] for r in source.records), sorted(labels))
    given = api.with_arrays(config, images, labels).data  # what `data` of train does
    assert (given.source, given.image_size) == (config.data.source, 0)


def test_arrays_that_do_not_belong_together_or_to_the_model_are_refused():
    theta = np.random.default_rng(0).normal(size=(40, 2))
    for given, words in (
            ({"labels": [0, 1]}, "labels or condition are given without data: expected both"),
            ({"data": theta, "condition": theta},
             "condition is given, and config.model.condition is none: set it to vector, or leave")):
        with pytest.raises(ntm_jax.UserError, match=words):
            ntm_jax.experiment("arrays", "unconditional", **given)


def test_latents_are_those_of_the_images_trajectories_and_give_the_images_back():
    t_min = {"trajectory.t_min": 1e-3, "trajectory.t_min_range": (1e-3, 1e-3)}
    run = random_run(new_run(tiny_config(**t_min)))  # so little noise moves no pixel
    images = np.random.default_rng(0).integers(17, size=(5, 8, 8, 1))
    latents = run.encode(images, label=range(5), seed=3)
    assert latents.shape == (5, 3, 8, 8, 1)
    found, levels = run.decode(latents, label=range(5), with_levels=True)
    np.testing.assert_array_equal(found, images)
    keys = example_keys(jax.random.key(3), "encode", np.arange(5))
    t = np.repeat(run.evaluated_levels()[None], 5, 0)
    noise = example_noise(keys, (3, 16, 4))
    xs = jax.jit(simulate)(run.spec.to_tokens(images), t, noise)
    np.testing.assert_allclose(levels, as_levels(run.spec, xs), atol=1e-4)  # of up to 4
    moved = np.abs(levels - latents).max((0, 2, 3, 4))
    assert moved[0] == 0
    assert min(moved[1:]) > 0.5
    with pytest.raises(ntm_jax.UserError, match=r"latents have shape \(5, 8, 8, 1\): expected \[n"):
        run.decode(latents[:, 0], label=range(5))


@pytest.mark.parametrize(("kind", "changes", "words"), [
    ("histogram", {"data.source": "folder:/nowhere"}, "data.source folder:/nowhere is not there"),
    ("uniform", {}, "is uniform of digits: expected binned, bayes, histogram or network, of a"),
    ("binned", {"model.pixel_likelihood": "uniform", "trajectory.steps": (1,), "sample.steps": 1},
     "found uniform"),
    ("bayes", {}, "of a model of pixels")])  # on latents
def test_a_pixel_likelihood_that_cannot_be_had_is_refused(kind, changes, words):
    run = api._run(dataclasses.replace(new_run(tiny_config()), config=tiny_config(**changes)))
    if kind == "bayes":
        run = dataclasses.replace(run, spec=dataclasses.replace(run.spec, pixel_levels=0))
    with pytest.raises(ntm_jax.UserError, match=words):
        run.with_pixel_likelihood(kind)


def test_the_package_lists_its_names_and_its_version():
    assert {"experiment", "load", "train", "Run", "UserError"} <= set(dir(ntm_jax))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert ntm_jax.__version__ == project["version"]


def test_help_shows_every_option_and_what_is_returned():
    methods = [method for name, method in inspect.getmembers(ntm_jax.Run, inspect.isfunction)
               if name[0] != "_"]
    for function in (ntm_jax.experiment, ntm_jax.train, ntm_jax.load, ntm_jax.push, *methods):
        signature = inspect.signature(function)
        assert signature.return_annotation is not inspect.Signature.empty, function
        kinds = {parameter.kind for parameter in signature.parameters.values()}
        # the settings of an experiment, "section.key", are no names of Python
        assert inspect.Parameter.VAR_KEYWORD not in kinds or function is ntm_jax.experiment


def test_train_takes_the_name_of_an_experiment(monkeypatch):
    given = []
    monkeypatch.setattr(api.loop, "train", lambda config, *_, **__: given.append(config))
    images, labels = images_and_labels()
    assert ntm_jax.train("digits:gaussian", "runs/x") is None
    assert ntm_jax.train("folder", "runs/x", data=images, labels=labels) is None
    assert given == [ntm_jax.experiment("digits", "gaussian"),
                     ntm_jax.experiment("folder", data=images, labels=labels)]


def test_an_assignment_to_a_setting_says_how_to_change_it():
    config = ntm_jax.experiment("digits")
    with pytest.raises(dataclasses.FrozenInstanceError, match=re.escape(
            "config.train.steps cannot be assigned: give it as ntm_jax.experiment(..., "
            "**{'train.steps': 5}), or copy with dataclasses.replace")):
        config.train.steps = 5
    with pytest.raises(dataclasses.FrozenInstanceError, match=r"config\.seed cannot be assigned"):
        config.seed = 5


@pytest.mark.parametrize(("name", "variant", "overrides", "words"), [
    ("digit", "", {}, r"there is no experiment 'digit': expected one of .*digits"),
    ("digits", "huge", {}, "huge is not a variant: expected one of ntm, gaussian, tarflow, smoke"),
    ("digits", "", {"train.step": 3}, "train.step is not a setting, did you mean train.steps"),
])
def test_a_wrong_experiment_is_one_line(name, variant, overrides, words):
    with pytest.raises(ntm_jax.UserError, match=words) as error:
        ntm_jax.experiment(name, variant, **overrides)
    assert "\n" not in str(error.value)
