"""The commands of docs/howto/imagenet.md in order, on small archives of ImageNet's kind.

200 training images of 10 classes in a tar of tars, of odd sizes, one damaged and one in CMYK, and
16 validation images in a flat tar with the devkit. Training is a job of two processes with four
devices each.
"""

import json
import re
import tarfile

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from ntm_jax.data.records import read_manifest
from tests.common import ROOT, environment, start
from tests.data.common import write_autoencoder
from tests.evaluation.common import random_inception
from tests.runtime.jobs import free_port
from tests.test_docs_commands import BLOCK, program_calls, simple_commands
from tests.tools.prepare.common import add, devkit, encoded, picture, tar_of_tars

pytestmark = pytest.mark.slow

CLASSES = [f"n{number:08}" for number in range(10)]
SMALL = {
    "model.width": 32, "model.head_size": 16, "model.kv_heads": 2, "model.transporter_width": 32,
    "model.transporter_layers": 1, "model.predictor_layers": 1, "mesh.fsdp": 4,
    "data.batch_size": 16, "data.workers": 0, "train.steps": 20, "train.save_every": 10,
    "train.evaluate_every": 20, "train.score_every": 20, "train.log_every": 10,
    "optimizer.warmup_steps": 10, "evaluate.num_samples": 8, "evaluate.batch_size": 8,
    "evaluate.trajectories": 1, "sample.num": 20}
CHANGES = {  # flags that follow the page's own
    "prepare": ["--image_size=16", "--workers=0", "--shard_size=60"],
    "compile": ["--topology=cpu:8", "--config.data.mock=mock:8x8x3,classes=10"],
    "train": [],
    "evaluate": ["--images=8"],
}


def write_archives(data):
    """Writes the files that the page calls for to the folder `data`."""
    data.mkdir()
    rng, sizes = np.random.default_rng(0), (9, 40)
    folders = {name: {} for name in CLASSES}
    for i in range(200):
        image = Image.fromarray(picture(i, tuple(rng.integers(*sizes, 2))))
        content = encoded(image.convert("CMYK") if i == 7 else image, "jpeg")
        name = CLASSES[i % 10]
        folders[name][f"{name}_{i}.JPEG"] = content[:90] if i == 3 else content
    tar_of_tars(data / "ILSVRC2012_img_train.tar", folders)
    with tarfile.open(data / "ILSVRC2012_img_val.tar", "w") as tar:
        for i in range(16):
            content = encoded(picture(1000 + i, tuple(rng.integers(*sizes, 2))), "jpeg")
            add(tar, f"ILSVRC2012_val_{i:08}.JPEG", content)
    devkit(data / "ILSVRC2012_devkit_t12.tar.gz", CLASSES, [1 + i % 10 for i in range(16)])
    write_autoencoder(data / "e2e-vavae-hf")
    safetensors.numpy.save_file({name: array.numpy() for name, array in random_inception().items()},
                                data / "inception.safetensors")
    real = rng.integers(0, 256, (8, 16, 16, 3), np.uint8)
    np.savez(data / "VIRTUAL_imagenet256_labeled.npz", arr_0=real, mu=np.zeros(2048),
             sigma=np.eye(2048))


def run(folder, name, *flags):
    """What a program prints; training runs as two processes."""
    flags = [re.sub(r"(?<==|:)/data/", f"{folder}/data/", flag) for flag in flags]
    flags = [re.sub(r"(?<==)(runs|exports)/", rf"{folder}/\1/", flag) for flag in flags]
    if name in ("train", "compile"):
        flags += [f"--config.{key}={value}" for key, value in SMALL.items()]
    count, port = 2 if name == "train" else 1, free_port()
    processes = [
        start(["-m", f"launch.{name}", *flags, *CHANGES.get(name, []), *(
            [f"--coordinator_address=localhost:{port}", f"--num_processes={count}",
             f"--process_id={number}"] if count > 1 else [])],
            env=environment(devices=8 // count))
        for number in range(count)]
    texts = [process.communicate(timeout=600) for process in processes]
    assert [process.returncode for process in processes] == [0] * count, (name, texts)
    return texts[0][0]


def test_the_pages_commands(tmp_path):
    write_archives(tmp_path / "data")
    page = (ROOT / "docs/howto/imagenet.md").read_text()
    calls = [call for block in BLOCK.findall(page) for words in simple_commands(block)
             for call in program_calls(words)]
    printed = [(name, run(tmp_path, name, *flags)) for name, *flags in calls]
    assert [name for name, _ in printed] == [
        "prepare", "compile", "compile", "compile", "train", "evaluate", "sample", "export"]
    layout, splits, _ = read_manifest(str(tmp_path / "data/imagenet256-latents"))
    assert (layout.image_shape, layout.choices["classes"]) == ((8, 8, 3), CLASSES)
    assert {name: sum(split.counts) for name, split in splits.items()} == {"train": 398, "test": 16}
    workdir = tmp_path / "runs/imagenet"
    lines = list(map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines()))
    assert [line["step"] for line in lines if "score/frechet" in line] == [20]
    assert re.findall(r"^step (\d+): Fréchet distance .* of 8 samples$", dict(printed)["train"],
                      re.M) == ["20"]
    evaluation = json.loads((workdir / "evaluation.json").read_text())
    assert evaluation["features"]["images"] == 8
    assert {"frechet", "kid", "precision", "recall"} <= evaluation.keys()
    assert len(list((workdir / "500").rglob("*.png"))) >= 500
    assert np.load(workdir / "500/samples.npz")["arr_0"].shape == (500, 16, 16, 3)
    assert (tmp_path / "exports/imagenet/model.safetensors").exists()
