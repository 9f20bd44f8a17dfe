"""A folder of one's own pictures, as a new user trains on it."""

import re
import shlex

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tests.common import ROOT, python

QUICK = [f"--config.{setting}" for setting in (
    "train.steps=20", "train.evaluate_every=20", "train.save_every=10", "model.width=32",
    "model.kv_heads=1", "model.transporter_width=32", "model.predictor_layers=1",
    "model.transporter_layers=1", "data.image_size=16", "evaluate.trajectories=1",
    "evaluate.num_samples=100", "sample.num=100", "sample.decoder=inverse", "sample.steps=2",
    "model.transporter_blocks=0", "trajectory.steps=(2,)")]
README = (ROOT / "README.md").read_text()
DRAWN = {"rings": "ellipse", "cards": "rectangle"}
COLOURS = ("red", "blue")


def draw(root, count: int) -> list[dict]:
    """Draws pictures of mixed sizes and modes, a folder a shape; returns lines of captions."""
    rng, lines = np.random.default_rng(0), []
    for i in range(count):
        kind, colour = list(DRAWN)[i % 2], COLOURS[i // 2 % 2]
        size = tuple(int(side) for side in rng.integers(24, 60, 2))
        image = Image.new("RGB", size, "white")
        getattr(ImageDraw.Draw(image), DRAWN[kind])((4, 4, size[0] - 5, size[1] - 5), colour)
        (root / kind).mkdir(parents=True, exist_ok=True)
        image.convert(("RGB", "RGBA", "P")[i % 3]).save(root / kind / f"{i:03}.png")
        lines.append({"file_name": f"{kind}/{i:03}.png", "caption": f"a {colour} {kind[:-1]}"})
    return lines


def readme_command(first: str, places: dict, *more: str) -> str:
    """Runs the README's command that starts with `first`, its folders replaced; what it prints."""
    block = re.search(r"```sh\n(python -m launch.train --config=folder .*?)```", README, re.S)[1]
    line = next(line for line in block.splitlines() if line.startswith(f"python {first}"))
    for folder, place in places.items():
        line = line.replace(folder, str(place))
    return python(*shlex.split(line)[1:], *more, cwd=places["cwd"]).stdout


@pytest.mark.slow
def test_own_images_are_one_command_and_the_readme_shows_what_follows(tmp_path):
    draw(tmp_path / "in", 120)
    (tmp_path / "in/rings/000.png").write_text("no image")
    places = {"runs/mine": tmp_path / "run", "exports/mine": tmp_path / "export",
              "folder:pictures": f"folder:{tmp_path}/in", "cwd": ROOT}
    printed = readme_command("-m launch.train", places, *QUICK)
    assert printed.startswith("chosen for the data: --config.data.patch_size=4 ")
    assert "1 of 120 images cannot be decoded and are left out: rings/000.png\n" in printed
    assert "samples recognised as their class, %, of 100 " in printed
    assert f"pictures: {tmp_path}/run/samples.png, " in printed
    readme_command("-m launch.sample", places)
    assert len(list((tmp_path / "run/samples").glob("[0-9]*.png"))) == 100
    assert "  class_accuracy.by_class.rings " in readme_command("-m launch.evaluate", places)
    readme_command("-m launch.export", places)
    assert "one of 2 classes: cards, rings" in (tmp_path / "export/README.md").read_text()
    readme_command("exports/mine/sample.py", places | {"cwd": tmp_path}, "0", "cards")
    assert len(list((tmp_path / "samples").iterdir())) == 16
