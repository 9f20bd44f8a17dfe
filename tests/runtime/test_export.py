"""What an export holds, that it runs without this package and gives the package's numbers, and that a new run starts from it."""

import dataclasses
import json
import struct
import subprocess
import sys

import jax
import jax.export
import numpy as np
import pytest
from safetensors.numpy import load_file

import ntm_jax
from ntm_jax.core.layers import Text
from ntm_jax.data import pipeline, sources
from ntm_jax.errors import UserError
from ntm_jax.runtime import config, distill, export, state, train
from ntm_jax.runtime.checkpoint import Checkpoints
from ntm_jax.runtime.load import Run
from tests.common import ROOT, bits, environment, python, randomised, rehearsal, setup, tiny_config, write_run

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
    folder = tmp_path_factory.mktemp("exports") / "tiny"
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
    assert bits(export.unflatten(found)) == bits(run.params)
    content = (exported / "model.safetensors").read_bytes()  # a header of JSON and the arrays' own bytes: nothing that could run
    size, = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    assert header.pop("__metadata__") == {"format": "ntm_jax"}
    assert len(content) - 8 - size == sum(a.nbytes for a in found.values()) == max(entry["data_offsets"][1] for entry in header.values())
    about = json.loads((exported / "config.json").read_text())
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
    script = exported / "sample.py"
    assert len(script.read_text().splitlines()) <= 30
    assert script.read_text() in (exported / "README.md").read_text()
    done = subprocess.run([sys.executable, "-I", "-c", BLOCKED, str(script), "5", "3"], cwd=tmp_path, env=environment(),
                          capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout) == (0, "5 images uint8[8, 8, 1] in samples.npz\n"), done.stderr
    with np.load(tmp_path / "samples.npz") as archive:
        assert_same_pixels(archive["images"], run.sample_at(np.arange(5), seed=3))


def test_a_model_of_texts_and_latents(tmp_path):
    settings = tiny_config(**{"data.source": "mock:4x4x2,text=3x8", "model.condition": "text", "data.patch_size": 1,
                              "evaluate.split": "test", "sample.decoder": "inverse"})
    source, model, mesh = setup(settings)
    params = randomised(state.initialize(settings, model, mesh).params)
    run = Run(settings, pipeline.spec(source, 1), model, params, 4, mesh, str(tmp_path))
    export.write_export(run, str(tmp_path / "out"))
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
    script = (tmp_path / "out/sample.py").read_text()
    assert "text = np.zeros((number, 3, 8), np.float16)" in script
    assert "index, text, text_mask))  # [n, H, W, C], latents" in script


@pytest.fixture(scope="module")
def with_denoiser(tmp_path_factory):
    """(a run of latents with a learned denoiser, its export), guided at the first step alone."""
    settings = tiny_config(**{"data.source": "mock:4x4x2,classes=3", "data.patch_size": 1, "evaluate.split": "test",
                              "sample.guidance": (0.5, 0.0)})
    source, model, mesh = setup(settings)
    denoiser = distill.make_denoiser(model.clone(config=dataclasses.replace(model.config, width=32)))
    params, other = (randomised(state.initialize(settings, m, mesh).params, seed) for seed, m in enumerate((model, denoiser)))
    settings = dataclasses.replace(settings, sample=dataclasses.replace(settings.sample, decoder="denoiser"))
    spec = dataclasses.replace(pipeline.spec(source, 1), mean=(1.0, -2.0), std=(0.5, 4.0))
    run = Run(settings, spec, model, params, 6, mesh, "runs/none", denoiser=(denoiser, other), teacher_step=4)
    folder = tmp_path_factory.mktemp("exports") / "denoiser"
    export.write_export(run, str(folder))
    return run, folder


def test_a_learned_denoiser(with_denoiser, tmp_path):
    run, folder = with_denoiser
    sampler, parameters = program(folder, "sampler")
    assert bits(export.unflatten(parameters)) == bits(run.params | {"denoiser": run.denoiser[1]["params"]})
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
    size = sum(a.size for a in jax.tree.leaves(run.denoiser[1]))
    assert f"| training | 4 steps of 16 examples, end_to_end; then 6 steps of a denoiser, {size:,} of the parameters |" in card
    assert "guidance (0.5, 0.0), decoder denoiser" in card
    assert "density of the latents, of mean 0 and variance 1 by channel, noised to" in card


def test_a_new_run_starts_from_the_teacher_in_a_denoisers_export(with_denoiser, tmp_path, started):
    run, folder = with_denoiser
    settings = dataclasses.replace(run.config, sample=dataclasses.replace(run.config.sample, decoder="inverse"), init_from=str(folder))
    current, start = started(settings, tmp_path / "new")
    assert (start, bits(current.params)) == (0, bits(run.params))


def test_the_card_has_the_figures_of_the_same_step_and_parameters(run, tmp_path):
    figure = {"mean": 2.0, "stderr": 0.5}
    result = {"step": 4, "split": "test", "count": 297, "trajectory_nll": figure,
              "class_accuracy": {"mean": 0.9, "stderr": 0.01, "images": 20},
              "bits_per_dim": {"bound": figure, "importance_weighted": figure | {"trajectories": 32}}, "nats_per_dim": {},
              "provenance": {"parameters": "ema", "config": {"sample": {"steps": 2}}}}
    run = dataclasses.replace(run, workdir=str(tmp_path))
    card = export._card(run, 1234, "")
    assert "| parameters | 1,234, their moving average (decay 0.999) |" in card
    assert "bits/dim" not in card
    (tmp_path / "evaluation.json").write_text(json.dumps(result))
    card = export._card(run, 1234, "")
    assert "| 297 records of split test, 2 steps | |" in card
    assert "| importance-weighted bound (32 trajectories), bits/dim | 2.0000 ± 0.5000 |" in card
    assert "| class accuracy of 20 samples, % | 90.0000 ± 1.0000 |" in card
    for other in (dataclasses.replace(run, step=6), dataclasses.replace(run, raw=True)):
        assert "bits/dim" not in export._card(other, 1234, "")


def test_what_cannot_be_written_is_refused(run, exported, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in exported.iterdir()}
    with pytest.raises(UserError, match=r"tiny is there: give a new folder as --out, nothing was overwritten"):
        export.write_export(run, str(exported))
    assert {path: path.stat().st_mtime_ns for path in exported.iterdir()} == before
    with pytest.raises(UserError, match="decoder=denoiser needs a denoiser, and this run has none"):
        export.write_export(run, str(tmp_path / "out"), decoder="denoiser")
    with pytest.raises(UserError, match="guidance has 3 scales, and there are 2 steps"):
        export.write_export(run, str(tmp_path / "out"), guidance=(1.0, 0.0, 0.0))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/out cannot be written \(.*\): give another --out"):
        export._write(export.epath.Path(tmp_path / "file/out"), {"a": b""})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.fixture
def started(monkeypatch):
    """A function (settings, workdir) -> the state that training begins with, and its step."""
    seen = []

    def loop(config, model, mesh, current, start, *rest):
        seen.append((current, start))
        return current, False

    def start(settings, workdir):
        assert train.train(settings, str(workdir), progress=False) is None
        return seen.pop()

    monkeypatch.setattr(train, "_loop", loop)
    return start


@pytest.mark.parametrize("kind", ["export", "workdir", "checkpoint"])
def test_a_new_run_starts_from_an_export_or_a_run(workdir, exported, tmp_path, started, kind):
    source = {"export": exported, "workdir": workdir, "checkpoint": workdir / "checkpoints/2"}[kind]
    _, model, mesh = setup(SETTINGS)
    new = state.initialize(SETTINGS, model, mesh)
    current, start = started(dataclasses.replace(SETTINGS, init_from=str(source)), tmp_path / "new")
    expected = bits(randomised(new.params, 2 if kind == "checkpoint" else 4))
    assert (start, bits(current.params), bits(current.ema)) == (0, expected, expected)
    assert bits((current.step, current.opt_state)) == bits((new.step, new.opt_state))
    pointers = [{a.unsafe_buffer_pointer() for a in jax.tree.leaves(tree)} for tree in (current.params, current.ema)]
    assert not pointers[0] & pointers[1]  # a step donates both
    assert config.load(str(tmp_path / "new"))[0].init_from == str(source)


def test_a_resumed_run_goes_on_from_its_own_checkpoint(tmp_path, started):
    settings = dataclasses.replace(SETTINGS, init_from="exports/gone")
    _, model, mesh = setup(SETTINGS)
    source = sources.open_source("digits", "train")
    config.write(str(tmp_path), settings, pipeline.spec(source, 2))
    own = state.initialize(SETTINGS, model, mesh)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, own, pipeline.train_iterator(source, 2, 16, 0, 0).get_state())
    current, start = started(settings, tmp_path)
    assert (start, bits(current.params)) == (2, bits(own.params))
    with pytest.raises(UserError, match=r"holds a run with init_from = 'exports/gone', and this one has ''"):
        train.train(SETTINGS, str(tmp_path), progress=False)


def test_a_run_from_before_init_from_resumes(tmp_path):
    source, _, _ = setup(SETTINGS)
    config.write(str(tmp_path), SETTINGS, pipeline.spec(source, 2))
    values = json.loads((tmp_path / "config.json").read_text())
    del values["init_from"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert config.load(str(tmp_path))[0] == SETTINGS
    assert config.claim(str(tmp_path), SETTINGS, pipeline.spec(source, 2)) == []


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


def test_a_damaged_export_is_refused(exported, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in ("config.json", "model.safetensors"):
        (copy / file).write_bytes((exported / file).read_bytes())
    content = (copy / "model.safetensors").read_bytes()
    flipped = content[:-6] + bytes([content[-6] ^ 4]) + content[-5:]
    for damage, message in ((content[:-8], "the export is damaged (SafetensorError"), (flipped, "the export is damaged: params/")):
        (copy / "model.safetensors").write_bytes(damage)
        told(SETTINGS, copy, tmp_path, message)
    (copy / "config.json").write_text(json.dumps(json.loads((copy / "config.json").read_text()) | {"format": 2}))
    told(SETTINGS, copy, tmp_path, "of format 2, and this version of ntm_jax reads 1")


def told(settings, source, tmp_path, message):
    """Asserts that a run that starts from `source` is refused in one line with `message`, nothing written."""
    with pytest.raises(UserError) as error:
        train.train(dataclasses.replace(settings, init_from=str(source)), str(tmp_path / "new"), progress=False)
    assert str(error.value).startswith(f"config.init_from is {source}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()
