"""Prompts: read from flags and files, encoded by the run's encoder, and the folders that are written of them."""

import dataclasses
import json
import re

import numpy as np
import pytest
from PIL import Image

from ntm_jax.api import Run
from ntm_jax.core.layers import Text
from ntm_jax.data import pipeline, text
from ntm_jax.data.records import pad_text
from ntm_jax.errors import UserError
from ntm_jax.runtime import plots
from ntm_jax.sampling import prompts
from ntm_jax.sampling.prompts import Prompt
from ntm_jax.sampling.write import SampleRequest, write_samples
from ntm_jax.training import state
from tests.common import as_run, python, randomised, rehearsal, setup, tiny_config, write_run

pytestmark = pytest.mark.usefixtures("quick_compilation")
WORDS = "words:4:a red blue circle square"  # states of width 14
SETTINGS = tiny_config(**{
    "data.source": "mock:8x8x3,levels=17,text=4x14", "data.patch_size": 4, "model.condition": "text", "sample.decoder": "inverse"})


@pytest.fixture(scope="module")
def run():
    """A Run told texts, that no folder holds."""
    source, model, mesh = setup(SETTINGS)
    params = randomised(state.initialize(as_run(SETTINGS, model, mesh)).params)
    return Run(SETTINGS, dataclasses.replace(pipeline.spec(source, 4), text=WORDS), model, params, 4, mesh, "runs/tiny")


def close(one, other):
    """Equal but for pixels that rounding puts one level away, fewer than one in 50."""
    difference = np.abs(np.asarray(one).astype(int) - other)
    return difference.max() <= 1 and (difference > 0).mean() < 0.02


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def test_states_and_samples_are_the_same_in_any_padding(run):
    """Padded to its longest, to M and to M + 7, with whatever behind the mask."""
    own, _ = text.open_encoder(WORDS).encode(["a red circle", "", "blue", "a red circle"])

    def images(tokens, behind=0.0):
        states, mask = (np.stack(part) for part in zip(*(pad_text(one, tokens).values() for one in own), strict=True))
        return run.sample(4, Text(np.where(mask[..., None], states, np.float16(behind)), mask), guidance=0.5)

    found = images(4)
    assert close(images(11), found)
    assert close(images(3), found)
    assert close(images(11, behind=9.0), found)
    assert np.abs(images(4)[2].astype(int) - run.sample(4, prompts=["a"], guidance=0.5)[2]).mean() > 0.5  # texts do matter


def test_a_run_samples_prompts(run):
    images = run.sample(4, prompts=["a red circle", "blue square"])
    y = prompts.states(text.open_encoder(WORDS), ["a red circle", "blue square"] * 2)
    assert (y.states.shape, y.mask.sum(1).tolist()) == ((4, 4, 14), [3, 2, 3, 2])
    assert close(run.sample(4, y), images)
    assert not close(run.sample(4, prompts=["blue square", "a red circle"]), images)
    with pytest.warns(UserWarning, match=r"1 of 2 captions are cut to the 4 tokens of words:4:.*, such as 'a red circle a blue square'"):
        run.sample(3, prompts=["a red circle a blue square", "blue"])


def test_prompts_of_flags_and_files(tmp_path):
    (tmp_path / "lines.txt").write_text("a red circle\n\n  blue square \n")
    (tmp_path / "lines.jsonl").write_text('{"prompt": "a", "tag": "x"}\n{"prompt": "b"}\n')
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "7.txt").write_text("seven\n")
    (tmp_path / "folder" / "10.txt").write_text("ten")
    (tmp_path / "folder" / "notes.md").write_text("none")
    asked = prompts.parse(["a fox, at night.", str(tmp_path / "lines.txt"), str(tmp_path / "lines.jsonl"), str(tmp_path / "folder"), ""])
    assert [prompt.text for prompt in asked] == ["a fox, at night.", "a red circle", "blue square", "a", "b", "ten", "seven", ""]
    assert [prompt.line for prompt in asked[3:5]] == ['{"prompt": "a", "tag": "x"}', '{"prompt": "b"}']
    assert [prompt.name for prompt in asked] == [""] * 5 + ["10", "7", ""]
    assert prompts.parse(["owl " * 2000])[0].text == "owl " * 2000
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "wrong.jsonl").write_text('{"prompt": "a"}\n{"caption": "b"}\n')
    for wrong, line in (("nothing.txt", "nothing.txt is not there"), ("empty.txt", "empty.txt holds no prompts"),
                        ("wrong.jsonl", r"""wrong.jsonl has the line '{"caption": "b"}': expected JSON with a "prompt" """.strip())):
        with pytest.raises(UserError, match=re.escape(line)):
            prompts.parse([str(tmp_path / wrong)])


def test_a_model_is_told_what_it_was_trained_on(run, tmp_path):
    asked, out = [Prompt("a red circle")], str(tmp_path / "out")
    with pytest.raises(UserError, match="--labels are given, and the model of runs/tiny is told texts: give --prompts"):
        write_samples(run, out, SampleRequest(1, 1, ["3"]))
    unknown = dataclasses.replace(run, spec=dataclasses.replace(run.spec, text=""))
    with pytest.raises(UserError, match=r"the records that runs/tiny was trained on do not tell what encoder .* name it with --encoder"):
        write_samples(unknown, out, SampleRequest(1, 1, prompts=asked))
    with pytest.raises(UserError, match=rf"'words:1:a' makes states of width 3, and .* was trained on {WORDS} of width 14"):
        write_samples(run, out, SampleRequest(1, 1, prompts=asked, encoder="words:1:a"))
    with pytest.raises(UserError, match="has the word 'fox', which the model does not know"):
        run.sample(1, prompts=["a fox"])
    for told, classes in (("one of 10 classes", 10), ("nothing", 0)):
        model = run.model.clone(config=dataclasses.replace(run.model.config, text_width=0, num_classes=classes))
        with pytest.raises(UserError, match=f"prompts are given, and the model of runs/tiny is told {told}: leave them out"):
            write_samples(dataclasses.replace(run, model=model), out, SampleRequest(1, 1, prompts=asked))
    with pytest.raises(UserError, match="--layout=dpg is a folder of a benchmark's prompts: give them as --prompts"):
        write_samples(run, out, SampleRequest(1, 1, layout="dpg"))
    assert not (tmp_path / "out").exists()
    write_samples(unknown, out, SampleRequest(1, 1, prompts=asked, encoder=WORDS))
    assert json.loads((tmp_path / "out" / "samples.json").read_text())["--encoder"] == WORDS


def test_written_prompts(run, tmp_path):
    """Images of a prompt lie side by side and are those of Run.sample_at; a stopped call goes on with the same prompts alone."""
    asked = prompts.parse(["a red circle", "", "blue square"])
    write_samples(run, str(tmp_path / "out"), SampleRequest(6, 4, prompts=asked))
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        *(f"{i}.png" for i in range(6)), "contact_sheet.png", "grid.png", "prompts.jsonl", "samples.json", "samples.npz"]
    repeated = ["a red circle", "a red circle", "", "", "blue square", "blue square"]
    expected = plots.displayable(run.sample(6, prompts=repeated), 17)
    with np.load(out / "samples.npz") as archive:
        assert np.abs(archive["arr_0"].astype(int) - expected).max() <= 16
        assert archive["arr_1"].tolist() == [0, 0, 1, 1, 2, 2]
        for i, line in enumerate((out / "prompts.jsonl").read_text().splitlines()):
            assert json.loads(line) == {"file_name": f"{i}.png", "prompt": repeated[i]}
            np.testing.assert_array_equal(pixels(out / f"{i}.png"), archive["arr_0"][i])
    assert np.asarray(pixels(out / "contact_sheet.png")).shape[1] > 600
    with pytest.raises(UserError, match=r"holds samples of --prompts '3 of digest \w+', and this call has '2 of digest"):
        write_samples(run, str(out), SampleRequest(6, 4, prompts=asked[:2]))


def test_genevals_folders(run, tmp_path):
    """What evaluation/evaluate_images.py walks through: folders of digits, metadata.jsonl of one JSON value, samples/DIGITS.png."""
    metadata = [{"tag": "colors", "include": [{"class": "circle", "count": 1, "color": "red"}], "prompt": "a red circle"},
                {"tag": "single_object", "include": [{"class": "square", "count": 1}], "prompt": "a square"}]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metadata))
    asked, out = prompts.parse([str(tmp_path / "metadata.jsonl")]), tmp_path / "out"
    write_samples(run, str(out), SampleRequest(6, 4, prompts=asked, layout="geneval"))
    folders = sorted(path for path in out.iterdir() if path.is_dir())
    assert [path.name for path in folders] == ["00000", "00001"]
    expected = plots.displayable(run.sample(6, prompts=["a red circle"] * 3 + ["a square"] * 3), 17)
    for number, folder in enumerate(folders):
        with open(folder / "metadata.jsonl") as file:
            assert json.load(file) == metadata[number]
        names = sorted(path.name for path in (folder / "samples").iterdir())
        assert names == ["0000.png", "0001.png", "0002.png"]
        for i, name in enumerate(names):
            assert np.abs(pixels(folder / "samples" / name).astype(int) - expected[3 * number + i]).max() <= 16
        assert pixels(folder / "grid.png").shape == (12, 32, 3)
    with pytest.raises(UserError, match="copies a prompt's metadata, and 1 of 1 prompts have none, such as 'a': give GenEval's own"):
        write_samples(run, str(tmp_path / "new"), SampleRequest(4, 4, prompts=[Prompt("a")], layout="geneval"))


def test_dpg_benchs_folder(run, tmp_path):
    """What dpg_bench/compute_dpg_bench.py reads: no file but pictures, cut into four at multiples of the resolution."""
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "partiprompts7.txt").write_text("a red circle")
    (tmp_path / "prompts" / "19.txt").write_text("a blue square")
    out = tmp_path / "out"
    write_samples(run, str(out), SampleRequest(8, 5, prompts=prompts.parse([str(tmp_path / "prompts")]), layout="dpg"))
    assert sorted(path.name for path in (out / "dpg").iterdir()) == ["19.png", "partiprompts7.png"]
    for number, name in enumerate(("19", "partiprompts7")):
        picture, side = pixels(out / "dpg" / f"{name}.png"), 8
        assert picture.shape == (16, 16, 3)
        for i, (left, top) in enumerate(((0, 0), (side, 0), (0, side), (side, side))):
            np.testing.assert_array_equal(picture[top : top + side, left : left + side], pixels(out / f"{4 * number + i}.png"))
    with pytest.raises(UserError, match="--layout=dpg names a picture by its prompt's file: give DPG-Bench's folder"):
        write_samples(run, str(tmp_path / "new"), SampleRequest(4, 4, prompts=[Prompt("a")], layout="dpg"))
    with pytest.raises(UserError, match="lays four squares in a picture, and there are 5 images of 8 x 8"):
        write_samples(run, str(tmp_path / "new"), SampleRequest(5, 4, prompts=[Prompt("a", name="1")], layout="dpg"))


@rehearsal
def test_the_program(tmp_path):
    """launch/sample.py with prompts, from a run whose records do not name their encoder."""
    write_run(tmp_path / "run", SETTINGS)
    (tmp_path / "more.txt").write_text("a blue square\n")
    flags = ["-m", "launch.sample", f"--workdir={tmp_path}/run", "--prompts=a red circle", f"--prompts={tmp_path}/more.txt",
             "--per_prompt=2"]
    done = python(*flags, "--num=3", check=False)
    assert (done.returncode, done.stderr) == (
        2, "error: --num is 3, and 2 prompts make 4 images: leave it out, or change --per_prompt\n")
    printed = python(*flags, f"--encoder={WORDS}", f"--out={tmp_path}/out").stdout
    assert f"4 images in {tmp_path}/out" in printed
    lines = [json.loads(line)["prompt"] for line in (tmp_path / "out" / "prompts.jsonl").read_text().splitlines()]
    assert lines == ["a red circle"] * 2 + ["a blue square"] * 2
