"""The shipped digits experiment, shrunk, for the tests of runtime/ and of the programs."""

import contextlib
import dataclasses
import importlib.util
import io
import json
import os
import pathlib
import resource
import struct
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from ntm_jax import files
from ntm_jax.api import Run
from ntm_jax.data import pipeline
from ntm_jax.runtime import arithmetic, build, config, config_file, plots, sharding
from ntm_jax.runtime.checkpoint import Checkpoints
from ntm_jax.training import loop, objectives, pictures, state
from ntm_jax.training.pixels import fit, save
from tests import forked

ROOT = pathlib.Path(__file__).parents[1]
TINY = {
    "model.pixel_likelihood": "binned",  # has no parameters
    "model.width": 16,
    "model.head_size": 8,
    "model.kv_heads": 2,
    "model.transporter_width": 16,
    "model.transporter_blocks": 1,
    "model.transporter_layers": 1,
    "model.predictor_layers": 1,
    "data.batch_size": 16,
    "trajectory.steps": (2,),
    "sample.steps": 2,
    "sample.decoder": "inverse",  # compiles in less time than score
    "trajectory.schedule": "linear",
    "trajectory.t_min": 0.03,
    "trajectory.t_min_range": (0.02, 0.04),
    "sample.num": 4,
    "train.steps": 6,
    "train.save_every": 2,
    "train.evaluate_every": 0,
    "train.log_every": 1,
    "optimizer.warmup_steps": 2,
    "evaluate.split": "test[:20]",
    "evaluate.num_samples": 0,
    "evaluate.trajectories": 2,
}


def experiment(name: str = "digits", *variant: str):
    """The ConfigDict of an experiment file."""
    spec = importlib.util.spec_from_file_location(
        f"experiment_{name}", ROOT / "experiments" / f"{name}.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*variant)


def tiny_config(**overrides) -> config.Config:
    """experiments/digits.py shrunk by TINY, then with `overrides`: {"train.steps": 4}."""
    return configured("digits", TINY | overrides)


def configured(name: str, changes: dict) -> config.Config:
    """The configuration of an experiment file, with changes: {"train.steps": 4}."""
    values = experiment(name)
    values.update_from_flattened_dict(changes)
    settings = config.read(values)
    objectives.checked(settings)
    return settings


def setup(settings: config.Config):
    """(the evaluation split, the model, a mesh of the devices there are) of a configuration."""
    source = settings.data.open(settings.evaluate.split)
    spec, mesh = pipeline.spec(source, settings.data.patch_size), sharding.make_mesh(settings.mesh)
    return source, build.make_model(settings, spec, arithmetic.choose(mesh, spec.tokens)), mesh


def as_run(settings: config.Config, model, mesh, params=None) -> Run:
    """A run of a configuration with this model, mesh and parameters."""
    source = settings.data.open(settings.evaluate.split)
    return Run(settings, pipeline.spec(source, settings.data.patch_size), model, params, 0, mesh)


def randomised(params, seed: int = 0):
    """Parameters plus random numbers, NumPy arrays, so that zero-initialised layers act."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda a: np.asarray(a) + 0.1 * rng.normal(size=a.shape).astype(np.float32), params
    )


def new_run(settings: config.Config) -> Run:
    """A run before it has parameters."""
    _, model, mesh = setup(settings)
    return as_run(settings, model, mesh)


def random_run(run: Run, seed: int = 0, **changes) -> Run:
    """The run with random parameters, and other fields of it.

    Without an initialisation, which compiles for seconds. Last layers, which start at zero, have
    small parameters.
    """
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        module, name = (key.key for key in path[-2:])
        last = name != "kernel" or module in ("project", "modulation")
        size = 0.1 if last else leaf.shape[-2] ** -0.5
        return ((name == "scale") + size * rng.normal(size=leaf.shape)).astype(np.float32)

    params = jax.tree_util.tree_map_with_path(fill, state.abstract(run).params)
    return dataclasses.replace(run, params=params, **changes)


WORDS = "words:4:a red blue circle square"  # the encoder of text_run


def text_run() -> Run:
    """A run with random parameters, conditioned on texts of states of width 14, in no folder."""
    new = new_run(tiny_config(**{
        "data.source": "mock:8x8x3,levels=17,text=4x14", "data.patch_size": 4,
        "model.condition": "text", "sample.decoder": "inverse"}))
    spec = dataclasses.replace(new.spec, text=WORDS)
    return random_run(new, spec=spec, step=4, workdir="runs/tiny")


def pixels(path) -> np.ndarray:
    """The pixels of an image file."""
    with Image.open(path) as image:
        return np.asarray(image)


def assert_shows(found, expected, levels: int = 17):
    """Asserts that a written picture shows images of so many pixel levels that are alike."""
    assert np.abs(found.astype(int) - plots.displayable(expected, levels)).max() <= 16  # one level


def write_run(folder, settings: config.Config):
    """Makes `folder` an untrained run's, with checkpoints of steps 2 and 4 and random EMAs."""
    source, model, mesh = setup(settings)
    spec = pipeline.spec(source, settings.data.patch_size)
    config_file.write(str(folder), settings, spec)
    run = as_run(settings, model, mesh)
    current = state.initialize(run)
    save(fit(run), folder)
    with Checkpoints(folder, settings=config_file.fixed(settings, spec)) as checkpoints:
        for step in (2, 4):
            checkpoints.save(step, current.replace(ema=randomised(current.params, step)), {})
    return folder


def without_an_ending(monkeypatch) -> None:
    """Trainings in this process end without pictures and evaluation, as nothing reads them."""
    monkeypatch.setattr(pictures, "draw", lambda *_: [])
    monkeypatch.setattr(loop._Loop, "final_pictures", lambda self: [])
    monkeypatch.setattr(loop, "evaluate", lambda *_, **__: ({}, {}))
    monkeypatch.setattr(loop, "write_report", lambda *_, **__: None)


def objective_of(run) -> objectives.Objective:
    """The objective of a run or a configuration."""
    return objectives.find(getattr(run, "config", run).train.objective)


def batch_of(source, settings: config.Config, size: int) -> dict:
    """The first `size` records of a source, as a training batch."""
    batch = next(pipeline.evaluation_batches(source, settings.data.patch_size, size))
    return {name: batch[name] for name in ("x", "label", "index")}


def write_photos(folder, count: int, side: int) -> None:
    """A folder of captioned JPEGs, circles in red and blue, for launch/prepare.py."""
    rows, column = np.mgrid[:side, :side]
    folder.mkdir()
    lines = []
    for i in range(count):
        name, colour = (("red", (220, 30, 30)), ("blue", (30, 30, 220)))[i % 2]
        distance = np.hypot(rows - side * (0.3 + i % 5 / 10), column - side / 2)[..., None]
        image = np.where(distance < side / 4, colour, 200 + i % 50).astype(np.uint8)
        Image.fromarray(image).save(folder / f"{i}.jpg")
        lines.append(json.dumps({"file_name": f"{i}.jpg", "caption": f"a {name} circle"}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))


def environment(devices: int = 0, **variables) -> dict:
    """The environment of a subprocess, with few XLA optimisations, which compiles quickly.

    devices: simulated devices; 0 does not set their number.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if devices:
        flags = f"{flags} --xla_force_host_platform_device_count={devices}"
    return (
        os.environ
        | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONPATH": str(ROOT)}
        | {"XLA_FLAGS": flags}
        | variables
    )


@contextlib.contextmanager
def file_size_limit(size: int):
    """Within it this process writes no file beyond `size` bytes, as on a full disk."""
    limits, bytecode = resource.getrlimit(resource.RLIMIT_FSIZE), sys.dont_write_bytecode
    sys.dont_write_bytecode = True  # Python would leave truncated files of imported modules
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        sys.dont_write_bytecode = bytecode


def needs_compiler(package: str) -> None:
    """Skips a test where a compiler is not installed. In the gate, which has both, it fails."""
    if "NTM_JAX_GATE" not in os.environ:
        pytest.importorskip(package)


def start(arguments, cwd=ROOT, env: dict | None = None) -> subprocess.Popen | forked.Program:
    """Starts `python ARGUMENTS`, of which stdout and stderr can be read."""
    arguments, env = list(map(str, arguments)), environment() if env is None else env
    if arguments[0].startswith(f"{ROOT}/tests/"):
        module = pathlib.Path(arguments[0]).relative_to(ROOT).with_suffix("")
        arguments[:1] = ["-m", ".".join(module.parts)]
    if forked.possible(arguments, env, environment()):
        return forked.Program(arguments, cwd, env)
    return subprocess.Popen([sys.executable, *arguments], cwd=cwd, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def python(
    *arguments: str, check: bool = True, cwd=ROOT, **variables
) -> subprocess.CompletedProcess:
    """Runs python in the checkout or another folder; `variables` join its environment."""
    process = start(arguments, cwd, environment(**variables))
    try:
        output, errors = process.communicate(timeout=600)
    finally:
        process.kill()
    assert not check or process.returncode == 0, (
        f"{arguments} exited with {process.returncode}\n{output}\n{errors}"
    )
    return subprocess.CompletedProcess(arguments, process.returncode, output, errors)


def logged(workdir) -> list[dict]:
    """The lines of a run's metrics.jsonl, without what a clock gives."""
    timed = "wall_time", "examples_per_second", "flops_per_second", "flop_share"
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [{key: line[key] for key in line if key not in timed} for line in lines]


def events(workdir) -> dict[str, list]:
    """All values in the TensorBoard files: {tag: [(step, value)]}.

    A record is a length, its checksum, the event and its checksum.
    """
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for file in sorted(workdir.glob("events*")):
        data = io.BytesIO(file.read_bytes())
        while header := data.read(12):
            event = Event.FromString(data.read(struct.unpack("<Q", header[:8])[0]))
            data.read(4)
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value))
    return found


def figures(path) -> dict:
    """The content of an evaluation's JSON file, without what tells when it was made."""
    content = files.read_json(path, "")
    del content["provenance"]["date"]
    return content


def alike(one, other) -> bool:
    """Whether images are equal but for pixels that rounding moves by a level, less than 1 in 50."""
    difference = np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int))
    return difference.max() <= 1 and (difference > 0).mean() < 0.02


def norm(tree) -> float:
    """The Euclidean norm of a tree of NumPy arrays, without a compiled program for each shape."""
    return float(np.sqrt(sum(np.sum(np.square(a)) for a in jax.tree.leaves(tree))))


def bits(tree) -> list:
    """Every leaf's dtype, shape and bytes."""
    return [(a.dtype, a.shape, np.asarray(a).tobytes()) for a in jax.tree.leaves(tree)]
