"""Every setting of every experiment is documented, typed and a flag."""

import importlib
import re
import sys

import pytest
from absl import flags

from launch import program
from ntm_jax import typed
from ntm_jax.data import choices
from ntm_jax.experiments import default
from ntm_jax.runtime import config, config_file
from tests.common import ROOT, experiment, python
from tests.data.sources.common import labels, save, values

pytestmark = pytest.mark.filterwarnings("ignore:.*load_module")  # ml_collections loads files by it
NAMES = sorted(path.stem for path in (ROOT / "experiments").glob("[!_]*.py"))
DEFAULTS = config.flatten(default.get_config().to_dict())


VARIANTS = {name: importlib.import_module(f"ntm_jax.experiments.{name}").get_config.variants
            for name in NAMES}
CASES = [(name, variant) for name, names in VARIANTS.items()
         for variant in (*names, "smoke", *(f"{other},smoke" for other in names[1:]))]


def parse(monkeypatch, *arguments: str):
    """Parses a command line as the programs do, with flags of its own: the experiment."""
    values, argv = flags.FlagValues(), ["program", *arguments]
    monkeypatch.setattr(sys, "argv", argv)
    program.define_config(flag_values=values)
    values(argv)
    return values.config


def test_every_setting_is_documented_and_listed_by_helpfull():
    meanings = {key: field.metadata["setting"].meaning
                for key, _, field in typed.settings(config.config_class())}
    assert [text for text in meanings.values() if not re.fullmatch(r"\S.+\.", text)] == []
    printed = python("-m", "launch.train", "--helpfull").stdout  # with status 0
    assert re.findall(r"^  --config\.([\w.]+): ", printed, re.M) == list(meanings)
    assert "--config.model.dtype: Type of activations in training. One of float32," in printed


@pytest.mark.parametrize("case", CASES, ids=":".join)
def test_every_variant_of_every_experiment_has_all_settings(case):
    values = experiment(*case).to_dict()
    assert values["train"]["steps"] == 4 or not case[1].endswith("smoke")
    flat = config.flatten(values)
    assert list(flat) == list(DEFAULTS)
    for key in choices.CHOICES:  # a setting that is left open has the type of its default
        section, name = key.split(".")
        values[section][name] = DEFAULTS[key] if flat[key] is None else flat[key]
    read = typed.parse_dataclass(config.config_class(), values, "config")
    if case[1] == "smoke":  # its data come with the package
        assert len(read.data.open(read.evaluate.split).records) == 16


def test_overrides_are_a_configuration(monkeypatch):
    flags = ["--noconfig.model.scan", "--config.trajectory.shift=1", "--config.trajectory.steps=2",
             "--config.sample.guidance=(1,0.5,0,0)"]
    read = config.read(parse(monkeypatch, f"--config={ROOT}/experiments/digits.py", *flags))
    assert (read.trajectory.shift, read.trajectory.steps) == (1.0, (2,))
    assert read.sample.guidance == (1.0, 0.5, 0.0, 0.0)
    flags = ["--config.data.image_size=8", "--config.model.width=48"]  # which it leaves open
    opened = parse(monkeypatch, "--config=folder", *flags)
    assert (opened.data.image_size, opened.model.width) == (8, 48)


def test_validation_trains_on_nine_tenths_and_evaluates_on_the_rest(tmp_path):
    for i in range(42):  # sorted by class
        name = "test/ant" if i > 39 else f"train/{'bee' if i > 19 else 'ant'}"
        save(tmp_path / name / f"{i:02}.png", i, mode="L")
    c = experiment("folder", "validation")
    c.data.source = f"folder:{tmp_path}"
    settings = config_file.complete(c)
    train, held_out = (settings.data.open(split) for split in
                       (settings.data.split, settings.evaluate.split))
    assert (len(train.records), settings.evaluate.batch_size) == (36, 4)
    assert sorted(values(train) + values(held_out)) == list(range(40))
    assert set(labels(held_out)) == {0, 1}
    for name, most in (("digits", "90%"), ("mnist", "90%"), ("shapes", "-800")):
        c = experiment(name, "gaussian,validation")
        assert c.model.transporter_blocks == 0
        assert (c.data.split, c.evaluate.split) == (
            "train[shuffled][:90%]", f"train[shuffled][{most}:]")


def test_variants_of_an_earlier_version_are_those_of_now():
    found = experiment("flux2_klein", "runlocal-reward")
    assert found.to_dict() == experiment("flux2_klein", "reward,smoke").to_dict()


def test_an_experiment_is_found_by_its_name_or_its_file(monkeypatch, tmp_path):
    (tmp_path / "own.py").write_text(
        "from ntm_jax.experiments import digits\n"
        "def get_config(variant):\n"
        "    c = digits.get_config()\n"
        "    c.data.source = variant\n"
        "    return c\n")
    monkeypatch.chdir(tmp_path)
    assert parse(monkeypatch, "--config=own.py:shapes").data.source == "shapes"
    shipped = parse(monkeypatch, "--config=digits:gaussian").to_dict()
    assert shipped == experiment("digits", "gaussian").to_dict()


def refusal(*arguments: str, cwd=ROOT, program="train") -> str:
    done = python("-m", f"ntm_jax.launch.{program}", "--workdir=x", *arguments, cwd=cwd,
                  check=False)
    assert (done.returncode, done.stderr.count("\n"), done.stdout) == (2, 1, ""), done.stderr
    return done.stderr


def test_an_unknown_name_lists_the_experiments_and_a_missing_file_is_named():
    message = refusal("--config=digis")
    assert message.startswith(
        "error: --config=digis: expected one of arrays, captions, default, digits, ")
    assert all(f" {name}," in message for name in NAMES)
    assert refusal("--config=experiments/digis.py").startswith(
        "error: --config=experiments/digis.py cannot be read: expected an experiment file, such as")


def test_an_experiment_that_sets_an_unknown_key_is_refused(tmp_path):
    (tmp_path / "own.py").write_text(
        "from ntm_jax.experiments import default\n"
        "def get_config():\n"
        "    c = default.get_config()\n"
        "    c.model.update(widht=3)\n")
    message = refusal("--config=own.py", cwd=tmp_path)
    assert "own.py sets widht, which is not a setting. Did you mean \"width\"" in message


@pytest.mark.parametrize(("program", "arguments", "message"), [
    ("train", ["--config=digits", "--noconfig.reward.ahead", "--config.reward.anchor=-1"],
     "config.reward.data_loss_weight is"),
    ("sample", ["--enough=much"], "--stop_nats=much"),
])
def test_flags_of_an_earlier_version_are_those_of_now(program, arguments, message):
    assert message in refusal(*arguments, program=program)


def test_a_module_that_cannot_be_imported_is_one_line(tmp_path):
    found = refusal("--config=digits", "--import=module_of_a_test", cwd=tmp_path)
    assert found == (
        "error: --import=module_of_a_test cannot be imported (No module named 'module_of_a_test'): "
        f"expected a module in {tmp_path} or of an installed package\n")
