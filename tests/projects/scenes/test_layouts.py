"""The folders that GenEval's and DPG-Bench's programs read, as launch.sample writes them."""

import json

import numpy as np
import pytest

from ntm_jax.errors import UserError
from ntm_jax.sampling import prompts
from ntm_jax.sampling.prompts import Prompt
from ntm_jax.sampling.write import SampleRequest, write_samples
from tests.common import assert_shows, pixels, text_run

run = pytest.fixture(text_run, scope="module")


def test_genevals_folders(run, tmp_path):
    """The folders that evaluation/evaluate_images.py reads.

    They are named by numbers, and hold metadata.jsonl with one JSON value, and samples/NUMBER.png.
    """
    circle = {"class": "circle", "count": 1, "color": "red"}
    metadata = [{"tag": "colors", "include": [circle], "prompt": "a red circle"},
                {"tag": "single_object", "include": [{"class": "square", "count": 1}],
                 "prompt": "a square"}]
    lines = "".join(json.dumps(line) + "\n" for line in metadata)
    (tmp_path / "metadata.jsonl").write_text(lines)
    given, out = prompts.parse([str(tmp_path / "metadata.jsonl")]), tmp_path / "out"
    write_samples(run, str(out), SampleRequest(6, 4, prompts=given, layout="geneval"))
    folders = sorted(path for path in out.iterdir() if path.is_dir())
    assert [path.name for path in folders] == ["00000", "00001"]
    expected = run.sample(6, prompts=["a red circle"] * 3 + ["a square"] * 3)
    for number, folder in enumerate(folders):
        assert json.loads((folder / "metadata.jsonl").read_text()) == metadata[number]
        names = sorted(path.name for path in (folder / "samples").iterdir())
        assert names == ["0000.png", "0001.png", "0002.png"]
        for i, name in enumerate(names):
            assert_shows(pixels(folder / "samples" / name), expected[3 * number + i])
        assert pixels(folder / "grid.png").shape == (12, 32, 3)
    with pytest.raises(UserError, match="copies the metadata of every prompt, and 1 of 1 prompts "
                                        "have none, such as 'a': give GenEval's own"):
        write_samples(run, str(tmp_path / "new"),
                      SampleRequest(4, 4, prompts=[Prompt("a")], layout="geneval"))


def test_dpg_benchs_folder(run, tmp_path):
    """The folder that dpg_bench/compute_dpg_bench.py reads.

    It holds nothing but pictures, which are cut into four at multiples of the resolution.
    """
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "partiprompts7.txt").write_text("a red circle")
    (tmp_path / "prompts" / "19.txt").write_text("a blue square")
    given, out = prompts.parse([str(tmp_path / "prompts")]), tmp_path / "out"
    # Batches of 6 and 2: the images of a prompt need not lie in one batch.
    write_samples(run, str(out), SampleRequest(8, 6, prompts=given, layout="dpg"))
    names = ["19.png", "partiprompts7.png"]
    assert sorted(path.name for path in (out / "dpg").iterdir()) == names
    for number, name in enumerate(names):
        picture = pixels(out / "dpg" / name)
        assert picture.shape == (16, 16, 3)
        for i, (left, top) in enumerate(((0, 0), (8, 0), (0, 8), (8, 8))):
            np.testing.assert_array_equal(picture[top : top + 8, left : left + 8],
                                          pixels(out / f"{4 * number + i}.png"))
    with pytest.raises(UserError, match="names a picture after the file of its prompt: give DPG-"):
        write_samples(run, str(tmp_path / "new"),
                      SampleRequest(4, 4, prompts=[Prompt("a")], layout="dpg"))
