"""What an export holds, that it runs without this package and gives the package's numbers, and that a new run starts from it."""

import dataclasses
import hashlib
import json
import re
import resource
import shutil
import struct
import subprocess
import sys

import jax
import jax.export
import numpy as np
import pytest
from safetensors.numpy import load_file

import ntm_jax
from ntm_jax import files
from ntm_jax.api import Run
from ntm_jax.core import denoising
from ntm_jax.core.layers import Text
from ntm_jax.data import pipeline, sources
from ntm_jax.errors import UserError
from ntm_jax.export import card
from ntm_jax.export import read as export_read
from ntm_jax.export import write as export_write
from ntm_jax.export.read import unflatten
from ntm_jax.export.write import PLATFORMS, _write, write_export
from ntm_jax.runtime import config, config_file
from ntm_jax.runtime.checkpoint import Checkpoints
from ntm_jax.runtime.run import with_denoiser as with_a_denoiser
from ntm_jax.training import loop, state
from tests.campaigns import damage, exports
from tests.common import ROOT, as_run, bits, environment, python, randomised, rehearsal, setup, tiny_config, write_run

pytestmark = [pytest.mark.usefixtures("quick_compilation"), rehearsal]
SETTINGS = tiny_config(**{"evaluate.trajectories": 3})
FILES = ["README.md", "config.json", "log_likelihood.bin", "model.safetensors", "sample.py", "sampler.bin"]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run's folder with two checkpoints."""
    return write_run(tmp_path_factory.mktemp("run"), SETTINGS)


@pytest.fixture(scope="module")
def run(workdir):
    """The run, sampled with guidance as its export is."""
    loaded = ntm_jax.load(str(workdir))
    return dataclasses.replace(loaded, config=dataclasses.replace(
        loaded.config, sample=dataclasses.replace(loaded.config.sample, guidance=0.5)))


@pytest.fixture(scope="module")
def exported(workdir, tmp_path_factory):
    """What the program wrote."""
    folder = tmp_path_factory.mktemp("exports") / "new" / "parents" / "tiny"
    done = python("-m", "launch.export", f"--workdir={workdir}", f"--out={folder}", "--guidance=0.5")
    assert done.stdout.startswith(f"6 files in {folder}, ")
    return folder


def program(folder, name):
    """(the program of an export, the parameters that it takes)."""
    return jax.export.deserialize(bytearray((folder / f"{name}.bin").read_bytes())), load_file(folder / "model.safetensors")


def assert_same_pixels(one, other):
    """Equal but for pixels that rounding puts one level away, fewer than one in 50."""
    difference = np.abs(one.astype(int) - other.astype(int))
    assert one.shape == other.shape
    assert difference.max() <= 1
    assert difference.mean() < 0.02


def test_the_folder(run, exported):
    assert sorted(path.name for path in exported.iterdir()) == FILES
    assert list(exported.parent.iterdir()) == [exported]  # nothing is left of what was written aside
    found = load_file(exported / "model.safetensors")
    assert bits(unflatten(found)) == bits(run.params)
    content = (exported / "model.safetensors").read_bytes()  # a header of JSON and the arrays' own bytes: nothing that could run
    size, = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    assert header.pop("__metadata__") == {"format": "ntm_jax"}
    assert len(content) - 8 - size == sum(a.nbytes for a in found.values()) == max(entry["data_offsets"][1] for entry in header.values())
    about = files.read_json(exported / "config.json", "")
    assert files.SEAL in (exported / "config.json").read_text()
    assert about["files"] == {
        name: hashlib.sha256((exported / name).read_bytes()).hexdigest() for name in FILES if name != "config.json"}
    assert (about["format"], about["step"], about["parameters"]) == (1, 4, "ema")
    assert config.read(about["config"]) == run.config
    assert about["spec"] == json.loads(json.dumps(dataclasses.asdict(run.spec)))
    assert about["programs"]["log_likelihood"] == {
        "seed": "uint32[]", "index": "int32[b]", "images": "uint8[b,8,8,1]", "label": "int32[b]"}


@pytest.mark.parametrize("name", ["sampler", "log_likelihood"])
def test_the_programs_are_for_every_platform_and_hold_no_parameters(exported, name):
    found, parameters = program(exported, name)
    assert found.platforms == ("cpu", "cuda", "tpu")
    content = (exported / f"{name}.bin").read_bytes()
    assert not [array for array in parameters.values() if array.tobytes() in content]
    assert b"export.py" in content  # where a line comes from, but not where that lay
    assert str(ROOT).encode() not in content
    assert b"site-packages" not in content


def test_the_sampler_gives_the_images_of_the_run(run, exported):
    sampler, parameters = program(exported, "sampler")
    index = np.array([7, 3, 0, 12, 4], np.int32)
    label = (index + 1) % 10
    expected = run.sample_at(index, label, seed=3)
    for rows in (slice(5), slice(2)):
        images = np.asarray(sampler.call(parameters, np.uint32(3), index[rows], label[rows]))
        assert images.dtype == np.uint8
        assert_same_pixels(images, expected[rows])
    assert (expected != run.sample_at(index, label, seed=4)).mean() > 0.1


def test_the_likelihood_is_that_of_the_run(run, exported):
    log_likelihood, parameters = program(exported, "log_likelihood")
    source, _, _ = setup(SETTINGS)
    images = np.stack([source.records[i]["image"] for i in range(5)])
    index = label = np.arange(5, dtype=np.int32)
    expected = run.log_prob(images, label, trajectories=3)
    for rows in (slice(5), slice(2)):
        found = log_likelihood.call(parameters, np.uint32(0), index[rows], images[rows], label[rows])
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected[rows], rtol=1e-6)  # a few float32 roundings of sums
    assert np.abs(expected - run.log_prob(images, label, trajectories=3, seed=1)).min() > 0.01


BLOCKED = """
import runpy, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ntm_jax", "flax", "optax", "orbax", "grain", "ml_collections", "absl"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Block())
try:
    import ntm_jax
except ImportError:
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_script_runs_without_the_package(run, exported, tmp_path):
    done = subprocess.run([sys.executable, "-I", "-c", BLOCKED, str(exported / "sample.py"), "5", "3"], cwd=tmp_path, env=environment(),
                          capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout) == (0, "5 images uint8[8, 8, 1] in samples.npz\n"), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["samples.npz"]
    with np.load(tmp_path / "samples.npz") as archive:
        assert_same_pixels(archive["images"], run.sample_at(np.arange(5), seed=3))


def test_the_example_of_the_card_makes_the_images_of_the_script(exported, monkeypatch):
    example, likelihood = re.findall(r"```python\n(.*?)```", (exported / "README.md").read_text(), re.S)
    monkeypatch.chdir(exported)
    found = {}
    assert "number, seed = 16, 0\n" in example
    exec(example.replace("number, seed = 16, 0\n", "number, seed = 2, 3\n") + likelihood, found)
    status, out, _, images = exports.run_script(exported, "2", "3")
    assert (status, out) == (0, "2 images uint8[8, 8, 1] in samples.npz\n")
    np.testing.assert_array_equal(images, found["images"])
    assert found["nats"].shape == (2,)


def test_the_script_makes_many_images_in_parts(run, exported):
    _, out, _, images = exports.run_script(exported, "205", "3")
    assert out == "205 images uint8[8, 8, 1] in samples.npz\n"
    assert_same_pixels(images[:5], run.sample_at(np.arange(5), seed=3))
    assert (images[100:200] != images[:100]).any()


ARGUMENTS = {
    "abc": "NUMBER is 'abc': expected a whole number from 1 to 1000000", "-1": "NUMBER is '-1'", "1.5": "NUMBER is '1.5'",
    "0": "NUMBER is '0'", "9" * 5000: f"NUMBER is '{'9' * 37}...'", "1000001": "NUMBER is '1000001'", "": "NUMBER is ''",
    "1\n": r"NUMBER is '1\n'", "1 -1": "SEED is '-1': expected a whole number from 0 to 4294967295",
    "1 4294967296": "SEED is '4294967296'", "1 2 3": "3 arguments are given: expected at most two, python sample.py [NUMBER [SEED]]"}


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=lambda text: repr(text[:12]))
def test_the_script_refuses_other_arguments(exported, arguments):
    refused_by_script(exported, ARGUMENTS[arguments], *arguments.split(" "))


def test_the_script_without_a_place_to_write(exported, monkeypatch):
    def fail(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    refused_by_script(exported, "samples.npz cannot be written here (No space left on device): run this in a folder that", "2", "3")


def refused_by_script(folder, message, *arguments):
    """Asserts that sample.py ends with status 2, one line with `message`, and no images."""
    status, out, err, images = exports.run_script(folder, *arguments)
    assert (status, out, images) == (2, "", None)
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


def test_a_model_of_texts_and_latents(tmp_path):
    settings = tiny_config(**{"data.source": "mock:4x4x2,text=3x8", "model.condition": "text", "data.patch_size": 1,
                              "evaluate.split": "test", "sample.decoder": "inverse"})
    source, model, mesh = setup(settings)
    params = randomised(state.initialize(as_run(settings, model, mesh)).params)
    run = Run(settings, pipeline.spec(source, 1), model, params, 4, mesh, str(tmp_path))
    write_export(run, str(tmp_path / "out"))
    records, index = [source.records[i] for i in range(4)], np.arange(4, dtype=np.int32)
    text, mask, latents = (np.stack([r[name] for r in records]) for name in ("text", "text_mask", "image"))
    sampler, parameters = program(tmp_path / "out", "sampler")
    found = np.asarray(sampler.call(parameters, np.uint32(0), index, text, mask))
    expected = run.sample_at(index, Text(text, mask))
    assert found.dtype == expected.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6 * np.abs(expected).max())  # roundings, which the inverse multiplies a little
    log_likelihood, _ = program(tmp_path / "out", "log_likelihood")
    np.testing.assert_allclose(log_likelihood.call(parameters, np.uint32(0), index, latents, text, mask),
                               run.log_prob(latents, Text(text, mask), trajectories=2), rtol=1e-6)
    readme = (tmp_path / "out/README.md").read_text()
    assert "text = np.zeros((number, 3, 8), np.float16)" in readme
    assert "index, text, text_mask))  # [n, H, W, C], latents" in readme
    _, _, _, images = exports.run_script(tmp_path / "out", "3")
    null = Text(np.zeros((3, 3, 8), np.float16), np.zeros((3, 3), bool))
    np.testing.assert_allclose(images, run.sample_at(index[:3], null), atol=1e-6 * np.abs(expected).max())


@pytest.fixture(scope="module")
def with_denoiser(tmp_path_factory):
    """(a run of latents with a learned denoiser, its export), guided at the first step alone."""
    settings = tiny_config(**{"data.source": "mock:4x4x2,classes=3", "data.patch_size": 1, "evaluate.split": "test",
                              "sample.guidance": (0.5, 0.0)})
    source, model, mesh = setup(settings)
    denoiser = denoising.make_denoiser(model.clone(config=dataclasses.replace(model.config, width=32)))
    params, other = (randomised(state.initialize(as_run(settings, m, mesh)).params, seed) for seed, m in enumerate((model, denoiser)))
    spec = dataclasses.replace(pipeline.spec(source, 1), mean=(1.0, -2.0), std=(0.5, 4.0))
    values = settings.raw
    own = config.read(values | {"teacher": "runs/teacher", "model": values["model"] | {"width": 32},
                                "train": values["train"] | {"objective": "denoiser", "condition_dropout": 0.0},
                                "sample": values["sample"] | {"decoder": "denoiser"}})
    run = with_a_denoiser(Run(settings, spec, model, params, 4, mesh, "runs/teacher"),
                          Run(own, spec, denoiser, other, 6, mesh, "runs/none"))
    folder = tmp_path_factory.mktemp("exports") / "denoiser"
    write_export(run, str(folder))
    return run, folder


def test_a_learned_denoiser(with_denoiser, tmp_path):
    run, folder = with_denoiser
    sampler, parameters = program(folder, "sampler")
    assert bits(unflatten(parameters)) == bits(run.params | {"denoiser": run.denoiser.params["params"]})
    index = np.arange(5, dtype=np.int32)
    expected = run.sample_at(index, index % 3, seed=3)
    images = sampler.call(parameters, np.uint32(3), index, index % 3)
    np.testing.assert_allclose(images, expected, atol=1e-6 * np.abs(expected).max())
    untold = {name: np.full_like(a, np.nan) if name.startswith("params/transporter/") else a for name, a in parameters.items()}
    np.testing.assert_array_equal(sampler.call(untold, np.uint32(3), index, index % 3), images)  # of predictor and denoiser alone
    assert np.abs(expected - run.sample_at(index, index % 3, seed=3, guidance=0.0)).max() > 1e-3
    log_likelihood, _ = program(folder, "log_likelihood")
    found = log_likelihood.call(parameters, np.uint32(0), index, expected, index % 3)
    np.testing.assert_allclose(found, run.log_prob(expected, index % 3, trajectories=2), rtol=1e-6)
    done = subprocess.run([sys.executable, "-I", "-c", BLOCKED, str(folder / "sample.py"), "5", "3"], cwd=tmp_path, env=environment(),
                          capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout) == (0, "5 images float32[4, 4, 2] in samples.npz\n"), done.stderr
    with np.load(tmp_path / "samples.npz") as archive:
        np.testing.assert_allclose(archive["images"], expected * (0.5, 4) + (1, -2), atol=4e-6 * np.abs(expected).max())
    about = json.loads((folder / "config.json").read_text())
    assert (about["step"], about["teacher_step"], about["config"]["sample"]["guidance"]) == (6, 4, [0.5, 0.0])
    card = (folder / "README.md").read_text()
    size = sum(a.size for a in jax.tree.leaves(run.denoiser.params))
    assert f"| training | 4 steps of 16 examples, end_to_end; then 6 steps of a denoiser, {size:,} of the parameters |" in card
    assert "guidance (0.5, 0.0), decoder denoiser" in card
    assert "density of the latents, of mean 0 and variance 1 by channel, noised to" in card


def test_a_new_run_starts_from_the_teacher_in_a_denoisers_export(with_denoiser, tmp_path, started):
    run, folder = with_denoiser
    settings = dataclasses.replace(run.config, sample=dataclasses.replace(run.config.sample, decoder="inverse"), init_from=str(folder))
    current, start = started(settings, tmp_path / "new")
    assert (start, bits(current.params)) == (0, bits(run.params))


def test_the_export_of_a_denoisers_run_is_that_run(with_denoiser, tmp_path):
    run, folder = with_denoiser
    found = ntm_jax.load(str(folder))
    assert (found.config, found.spec, found.step, found.teacher_step, found.denoiser_config) == (
        run.config, run.spec, 6, 4, run.denoiser_config)
    assert found.denoiser.module.config == run.denoiser.module.config
    assert bits((found.params, found.denoiser.params)) == bits((run.params, run.denoiser.params))
    index = np.arange(5)
    images = found.sample_at(index, index % 3)
    np.testing.assert_array_equal(images, run.sample_at(index, index % 3))
    np.testing.assert_array_equal(found.log_prob(images, index % 3, 2), run.log_prob(images, index % 3, 2))
    old = copy_of(folder, tmp_path, "files", "denoiser_config")
    with pytest.raises(UserError, match=r"config\.json cannot be used \(it lacks denoiser_config, .*\): .* export the run anew$"):
        ntm_jax.load(str(old))


def test_the_card_has_the_figures_of_the_same_step_and_parameters(run, tmp_path):
    figure = {"mean": 2.0, "stderr": 0.5}
    result = {"step": 4, "split": "test", "count": 297, "trajectory_nll": figure,
              "class_accuracy": {"mean": 0.9, "stderr": 0.01, "images": 20},
              "bits_per_dim": {"bound": figure, "importance_weighted": figure | {"trajectories": 32}}, "nats_per_dim": {},
              "provenance": {"parameters": "ema", "config": {"sample": {"steps": 2}}}}
    run = dataclasses.replace(run, workdir=str(tmp_path))
    text = card.markdown(run, 1234, PLATFORMS)
    assert "| parameters | 1,234, their moving average (decay 0.999) |" in text
    assert "bits/dim" not in text
    (tmp_path / "evaluation.json").write_text(json.dumps(result))
    text = card.markdown(run, 1234, PLATFORMS)
    assert "| 297 records of split test, 2 steps | |" in text
    assert "| importance-weighted bound (32 trajectories), bits/dim | 2.0000 ± 0.5000 |" in text
    assert "| class accuracy of 20 samples, % | 90.0000 ± 1.0000 |" in text
    for other in (dataclasses.replace(run, step=6), dataclasses.replace(run, raw=True)):
        assert "bits/dim" not in card.markdown(other, 1234, PLATFORMS)


EVALUATIONS = {
    "a list": b"[]", "null": b"null", "empty": b"", "not UTF-8": b"\xff", "too deep": b"[" * 100_000,
    "a long number": b'{"step": ' + b"9" * 5000 + b"}", "no figures": b'{"step": 4, "provenance": {"parameters": "ema"}}',
    "no section": b'{"step": 4, "provenance": 4}', "a word": b'{"step": 4, "provenance": {"parameters": "ema"}, "bits_per_dim": "x"}'}


@pytest.mark.parametrize("kind", EVALUATIONS)
def test_a_damaged_evaluation_is_left_out_of_the_card(run, tmp_path, kind):
    (tmp_path / "evaluation.json").write_bytes(EVALUATIONS[kind])
    with pytest.warns(UserWarning, match=r"evaluation\.json is left out of the model card, since it cannot be used \(.*\): evaluate"):
        assert card.figures(dataclasses.replace(run, workdir=str(tmp_path))) == ""


def test_what_cannot_be_written_is_refused(run, exported, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in exported.iterdir()}
    with pytest.raises(UserError, match=r"tiny is there: give a new folder as --out, nothing was overwritten"):
        write_export(run, str(exported))
    assert {path: path.stat().st_mtime_ns for path in exported.iterdir()} == before
    with pytest.raises(UserError, match="decoder=denoiser needs a denoiser, and this run has none"):
        write_export(run, str(tmp_path / "out"), decoder="denoiser")
    with pytest.raises(UserError, match="guidance has 3 scales, and there are 2 steps"):
        write_export(run, str(tmp_path / "out"), guidance=(1.0, 0.0, 0.0))
    (tmp_path / "file").write_text("")
    for out in ("file/out", "file/new/out"):
        unwritable(tmp_path / out)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_leaves_nothing_behind(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))  # a longer file cannot be written, as on a full disk
    try:
        unwritable(tmp_path / "new/folder/out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def unwritable(folder):
    with pytest.raises(UserError, match=rf"{folder.name} cannot be written \([A-Z][a-z ]*\): give a new folder as --out, where you may"):
        _write(export_write.epath.Path(folder), {"a": b"a", "b": bytes(2000)}, {})


def test_an_export_is_flushed_to_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    flushed, fsync = [], export_write.os.fsync

    def record(descriptor):
        fsync(descriptor)
        flushed.append((export_write.os.readlink(f"/proc/self/fd/{descriptor}"), (tmp_path / "out").exists()))

    monkeypatch.setattr("os.fsync", record)
    _write(export_write.epath.Path(tmp_path / "out"), {"a": b"a"}, {})
    assert [there for _, there in flushed] == [False, False, False, True]  # a, config.json, the new folder and the one that names it
    assert flushed[-1][0] == str(tmp_path)


@pytest.fixture
def started(monkeypatch):
    """A function (settings, workdir) -> the state that training begins with, and its step."""
    seen = []

    def loop(config, model, mesh, current, start, *rest):
        seen.append((current, start))
        return current, False

    def start(settings, workdir):
        assert loop.train(settings, str(workdir), progress=False) is None
        return seen.pop()

    monkeypatch.setattr(loop, "_loop", loop)
    return start


@pytest.mark.parametrize("kind", ["export", "workdir", "checkpoint"])
def test_a_new_run_starts_from_an_export_or_a_run(workdir, exported, tmp_path, started, kind):
    source = {"export": exported, "workdir": workdir, "checkpoint": workdir / "checkpoints/2"}[kind]
    _, model, mesh = setup(SETTINGS)
    new = state.initialize(as_run(SETTINGS, model, mesh))
    current, start = started(dataclasses.replace(SETTINGS, init_from=str(source)), tmp_path / "new")
    expected = bits(randomised(new.params, 2 if kind == "checkpoint" else 4))
    assert (start, bits(current.params), bits(current.ema)) == (0, expected, expected)
    assert bits((current.step, current.opt_state)) == bits((new.step, new.opt_state))
    pointers = [{a.unsafe_buffer_pointer() for a in jax.tree.leaves(tree)} for tree in (current.params, current.ema)]
    assert not pointers[0] & pointers[1]  # a step donates both
    assert config_file.load(str(tmp_path / "new"))[0].init_from == str(source)


def test_a_resumed_run_goes_on_from_its_own_checkpoint(tmp_path, started):
    settings = dataclasses.replace(SETTINGS, init_from="exports/gone")
    _, model, mesh = setup(SETTINGS)
    source = sources.open_source("digits", "train")
    config_file.write(str(tmp_path), settings, pipeline.spec(source, 2))
    own = state.initialize(as_run(SETTINGS, model, mesh))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, own, pipeline.train_iterator(source, 2, 16, 0, 0).get_state())
    current, start = started(settings, tmp_path)
    assert (start, bits(current.params)) == (2, bits(own.params))
    with pytest.raises(UserError, match=r"holds a run with init_from = 'exports/gone', and this one has ''"):
        loop.train(SETTINGS, str(tmp_path), progress=False)


def test_a_run_from_before_init_from_resumes(tmp_path):
    source, _, _ = setup(SETTINGS)
    config_file.write(str(tmp_path), SETTINGS, pipeline.spec(source, 2))
    values = json.loads((tmp_path / "config.json").read_text())
    del values["init_from"], values[files.SEAL]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert config_file.load(str(tmp_path))[0] == SETTINGS
    assert config_file.claim(str(tmp_path), SETTINGS, pipeline.spec(source, 2)) == []


REFUSED = {
    "another shape": ({"model.width": 32}, "array params/predictor/condition/class/embedding is float32[11,16] in the export"),
    "a part that is not there": ({"model.transporter_blocks": 2}, "array params/transporter/blocks_1/embed/bias is absent in the export"),
    "a part too many": ({"model.transporter_blocks": 0}, "blocks_0/embed/bias is float32[16] in the export, absent in this model"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_export_of_another_model_is_refused(exported, tmp_path, name):
    changes, message = REFUSED[name]
    told(tiny_config(**changes), exported, tmp_path, message)


@pytest.mark.parametrize(("name", "message"), [
    ("", "there is no such export or run"), ("checkpoints/3", "no checkpoint of step 3"),
    ("checkpoints/2", "is of another model: array ema/")])
def test_a_run_that_is_not_there_or_is_another_model_is_refused(workdir, tmp_path, name, message):
    told(tiny_config(**{"model.width": 32}), workdir / name if name else tmp_path, tmp_path, message)


def copy_of(exported, tmp_path, *lacks):
    """A copy of an export; if keys of config.json are named, without them and its checksum, as earlier versions wrote it."""
    copy = tmp_path / "copy"
    shutil.copytree(exported, copy, dirs_exist_ok=True)
    if lacks:
        about = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps({k: v for k, v in about.items() if k not in (files.SEAL, *lacks)}))
    return copy


def test_the_export_of_a_run_is_that_run(run, exported):
    found = ntm_jax.load(str(exported))
    assert (found.config, found.spec, found.step, found.raw, found.workdir) == (run.config, run.spec, 4, False, str(exported))
    assert bits(found.params) == bits(run.params)
    index = np.arange(5)
    images = found.sample_at(index)
    np.testing.assert_array_equal(images, run.sample_at(index))
    np.testing.assert_array_equal(found.log_prob(images, index, 3), run.log_prob(images, index, 3))
    assert ntm_jax.load(str(exported), step=4).step == 4
    with pytest.raises(UserError, match=r"tiny is an export of step 4, and step 2 is asked of it: leave --step out, or give the workdir"):
        ntm_jax.load(str(exported), step=2)
    with pytest.raises(UserError, match=r"tiny is an export of the moving average of the parameters, and the raw ones .*: leave --raw"):
        ntm_jax.load(str(exported), raw=True)


def test_an_export_without_digests_is_read(run, exported, tmp_path, started):
    old = copy_of(exported, tmp_path, "files")
    assert bits(ntm_jax.load(str(old)).params) == bits(run.params)
    current, _ = started(dataclasses.replace(SETTINGS, init_from=str(old)), tmp_path / "new")
    assert bits(current.params) == bits(run.params)
    shutil.rmtree(tmp_path / "new")
    content = (old / "model.safetensors").read_bytes()
    flipped = content[:-6] + bytes([content[-6] ^ 4]) + content[-5:]
    for changed, message in ((content[:-8], "model.safetensors is damaged (SafetensorError"), (flipped, "is damaged: params/"),
                             (b"", "model.safetensors is damaged (SafetensorError")):
        (old / "model.safetensors").write_bytes(changed)
        told(SETTINGS, old, tmp_path, message)
        refused_by_load(old, message)


def refused_by_load(folder, message=""):
    with pytest.raises(UserError) as error:
        ntm_jax.load(str(folder))
    assert str(error.value).startswith(str(folder))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


CONFIGS = {
    "a list": b"[]", "null": b"null", "empty": b"", "not UTF-8": b"\xff", "too deep": b"[" * 100_000,
    "a long number": b'{"format": ' + b"9" * 5000 + b"}", "an object": b"{}", "a true format": b'{"format": true}',
    "a word as format": b'{"format": "1"}', "another's": b'{"model_type": "llama"}', "a section too few": b'{"format": 1, "step": 4}'}


@pytest.mark.parametrize("kind", CONFIGS)
def test_another_config_is_refused(exported, tmp_path, kind):
    copy = copy_of(exported, tmp_path)
    (copy / "config.json").write_bytes(CONFIGS[kind])
    refused_by_load(copy, f"{copy}/config.json")
    refused_by_script(copy, "config.json was damaged or edited: its content does not match its checksum; copy the folder again")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "sampler.bin"])
def test_a_file_that_is_damaged_or_missing_is_refused(exported, tmp_path, name):
    copy = copy_of(exported, tmp_path)
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    damaged, missing = f"{copy}/{name} was damaged or edited: ", f"{copy}/{name} cannot be read (No such file or directory): "
    refused_by_script(copy, damaged)
    if name != "sampler.bin":
        refused_by_load(copy, damaged if name == "model.safetensors" else f"{copy}/{name} cannot be used (it ")
    (copy / name).unlink()
    refused_by_script(copy, missing)
    if name != "sampler.bin":  # which ntm_jax does not run
        refused_by_load(copy, missing)
        told(SETTINGS, copy, tmp_path, missing)


def test_an_edited_config_is_refused(exported, tmp_path):
    copy = copy_of(exported, tmp_path)
    text = (copy / "config.json").read_text()
    for edited, message in ((text.replace('"levels": 17', '"levels": 16'), "its content does not match its checksum"),
                            (text.replace(files.SEAL, "content_sha257"), "its checksum content_sha256 is missing"),
                            (text.replace('"files"', '"filet"'), "its content does not match its checksum")):
        assert edited != text
        (copy / "config.json").write_text(edited)
        refused_by_load(copy, message)
        refused_by_script(copy, "its content does not match its checksum")


def test_an_export_of_another_format_is_refused(exported, tmp_path):
    copy = copy_of(exported, tmp_path, "files")
    about = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(about | {"format": 2}))
    refused_by_load(copy, "of format 2, and this version of ntm_jax reads 1")
    told(SETTINGS, copy, tmp_path, "of format 2, and this version of ntm_jax reads 1")
    (copy / "config.json").write_text(json.dumps(about | {"from_a_later_version": 2}))
    assert ntm_jax.load(str(copy)).step == 4


WRONG = (None, [], {}, "x", -1, 0, 1.5, True, 10**12, float("nan"))
SHAPES = ([8, 8], [8, 8, 0], [7, 8, 1], [10**12] * 3, [2**30, 2**30, 1])


def test_a_value_of_another_type_is_refused_or_does_no_harm(run, exported, tmp_path, monkeypatch):
    """Of config.json as earlier versions wrote it, which has no checksum: each value is exchanged for others."""
    copy = copy_of(exported, tmp_path, "files")
    text = (copy / "config.json").read_text()
    monkeypatch.setattr(export_read, "read_parameters", lambda folder, about, abstract: run.params)  # what follows is of the arrays alone
    changes = []
    for number, path in enumerate(paths(json.loads(text))):
        values = WRONG if path in (("step",), ("spec",), ("format",)) else WRONG[number % len(WRONG) :: len(WRONG)]
        changes += [(path, value) for value in values]
    outcomes = {}
    for path, value in changes + [(("spec", "image_shape"), shape) for shape in SHAPES]:
        about = json.loads(text)
        *sections, last = path
        inner = about
        for key in sections:
            inner = inner[key]
        inner[last] = value
        (copy / "config.json").write_text(json.dumps(about))
        outcomes[path, str(value)] = damage.outcome(lambda: ntm_jax.load(str(copy)).step, lambda step: step == 4)
    assert not [found for found in outcomes.items() if found[1][0] == "traceback"]
    assert [key for key, (found, _) in outcomes.items() if found == "silent"] == [(("step",), str(step)) for step in (-1, 0, 10**12)]
    assert sum(found == "refused" for found, _ in outcomes.values()) > 80
    assert all(outcomes[("spec", "image_shape"), str(shape)][0] == "refused" for shape in SHAPES)


def paths(value, path=()):
    """The keys to every value of a JSON object, its sections among them."""
    found = [path] if path else []
    if isinstance(value, dict) and path[:1] != ("checksums",):
        for key, inner in value.items():
            found += paths(inner, (*path, key))
    return found


def test_damaged_exports_give_the_undamaged_result_or_one_line(exported, tmp_path):
    tally = exports.run(12, seed=0, exported=copy_of(exported, tmp_path))
    assert tally.wrong() == []
    assert all(tally.counts[name, "refused"] >= 2 for name in ("load", "init_from", "sample.py"))


def told(settings, source, tmp_path, message):
    """Asserts that a run that starts from `source` is refused in one line with `message`, nothing written."""
    with pytest.raises(UserError) as error:
        loop.train(dataclasses.replace(settings, init_from=str(source)), str(tmp_path / "new"), progress=False)
    assert str(error.value).startswith(f"config.init_from is {source}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()
