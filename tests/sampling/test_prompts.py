"""Prompts: read from flags and files, encoded by the run's encoder, and written as folders."""

import dataclasses
import json
import re

import numpy as np
import pytest

from ntm_jax.core.conditions import Text
from ntm_jax.data import text
from ntm_jax.data.text import pad_text
from ntm_jax.errors import UserError
from ntm_jax.sampling import prompts
from ntm_jax.sampling.prompts import Prompt
from ntm_jax.sampling.write import SampleRequest, write_samples
from tests.common import WORDS, alike, assert_shows, pixels, text_run


@pytest.fixture(scope="module")
def run():
    """It is guided, and sampled in fours: one program serves all tests."""
    found = text_run()
    return dataclasses.replace(found, config=found.config.with_sampling(guidance=0.5))


def test_samples_are_the_same_with_any_padding(run):
    """Texts are padded to M and to M + 7, with any values behind the mask."""
    own, _ = text.open_encoder(WORDS).encode(["a red circle", "", "blue", "a red circle"])

    def images(tokens, behind=0.0):
        padded = [pad_text(one, tokens) for one in own]
        states, mask = (np.stack([p[name] for p in padded]) for name in ("text", "text_mask"))
        states = np.where(mask[..., None], states, np.float16(behind))
        return run.sample(4, Text(states, mask))

    found = images(4)
    assert alike(images(11), found)
    assert alike(images(11, behind=9.0), found)
    other = run.sample(4, prompts=["a"])
    assert np.abs(found[2].astype(int) - other[2]).mean() > 0.2  # the text matters


def test_a_run_samples_prompts(run):
    images = run.sample(4, prompts=["a red circle", "blue square"])
    y = prompts.states(text.open_encoder(WORDS), ["a red circle", "blue square"] * 2)
    assert (y.states.shape, y.mask.sum(1).tolist()) == ((4, 4, 14), [3, 2, 3, 2])
    assert alike(run.sample(4, y), images)
    assert not alike(run.sample(4, prompts=["blue square", "a red circle"]), images)
    one = run.sample(4, prompts="a red circle")
    assert alike(one, run.sample(4, prompts=["a red circle"]))
    np.testing.assert_array_equal(run.text("blue square").mask, run.text(["blue square"]).mask)
    own = run.text("a red circle")
    assert alike(one, run.sample(4, own))  # of one caption for all images
    records = [run.config.data.open(run.config.evaluate.split).records[i] for i in range(4)]
    held_out = Text(*(np.stack([r[name] for r in records]) for name in ("text", "text_mask")))
    assert alike(run.sample(4), run.sample(4, held_out))  # the held-out texts in turn
    for wrong in (None, [1, 2, 3], Text(held_out.states[:2], held_out.mask)):
        with pytest.raises(UserError, match=r"conditioned on text: give label=run\.text\(capti"):
            run.log_prob(images, wrong)
    with pytest.warns(UserWarning, match=r"1 of 2 captions are cut to the 4 tokens of words:4:.*, "
                                         "such as 'a red circle a blue square'"):
        run.sample(4, prompts=["a red circle a blue square", "blue"])


def test_prompts_from_flags_and_files(tmp_path):
    (tmp_path / "lines.txt").write_text("a red circle\n\n  blue square \n")
    (tmp_path / "lines.jsonl").write_text('{"prompt": "a", "tag": "x"}\n{"prompt": "b"}\n')
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "7.txt").write_text("seven\n")
    (tmp_path / "folder" / "10.txt").write_text("ten")
    (tmp_path / "folder" / "notes.md").write_text("none")
    paths = [str(tmp_path / name) for name in ("lines.txt", "lines.jsonl", "folder")]
    found = prompts.parse(["a fox, at night.", *paths, ""])
    assert [prompt.text for prompt in found] == [
        "a fox, at night.", "a red circle", "blue square", "a", "b", "ten", "seven", ""]
    assert found[3].line == '{"prompt": "a", "tag": "x"}'
    assert [prompt.name for prompt in found] == [""] * 5 + ["10", "7", ""]
    (tmp_path / "wrong.jsonl").write_text('{"prompt": "a"}\n{"caption": "b"}\n')
    line = """the line '{"caption": "b"}': expected JSON with a "prompt\""""
    for name, message in (
            ("nothing.txt", "nothing.txt does not exist: expected a file of prompts"),
            ("wrong.jsonl", f"wrong.jsonl has {line}")):
        with pytest.raises(UserError, match=re.escape(message)):
            prompts.parse([str(tmp_path / name)])


def test_prompts_that_do_not_fit_the_model_are_refused(run, tmp_path):
    unnamed = dataclasses.replace(run, spec=dataclasses.replace(run.spec, text=""))
    for own, message, request in (
            (run, "is conditioned on .*: give --prompts", SampleRequest(1, 1, ["3"])),
            (unnamed, "do not name the encoder of their text states: name it with --encoder",
             SampleRequest(1, 1, prompts=[Prompt("a red circle")]))):
        with pytest.raises(UserError, match=message):
            write_samples(own, str(tmp_path / "out"), request)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="has the word 'fox', which the model does not know"):
        write_samples(run, str(tmp_path / "out"), SampleRequest(4, 4, prompts=[Prompt("a fox")]))
    # That call made nothing, so that the folder is free for another.
    write_samples(run, str(tmp_path / "out"), SampleRequest(4, 4, prompts=[Prompt("blue")]))


def test_written_prompts(run, tmp_path):
    """The images of a prompt lie side by side; a call that resumes must have the same prompts.

    The run does not name the encoder, which the call then names.
    """
    repeated = ["a red circle", "a red circle", "", "", "blue", "blue", "red", "red"]
    given, out = prompts.parse(repeated[::2]), tmp_path / "out"
    unnamed = dataclasses.replace(run, spec=dataclasses.replace(run.spec, text=""))
    request = SampleRequest(8, 4, prompts=given, encoder=WORDS)
    write_samples(unnamed, str(out), request)
    assert sorted(path.name for path in out.iterdir()) == [
        *(f"{i}.png" for i in range(8)), "contact_sheet.png", "grid.png", "prompts.jsonl",
        "samples.json", "samples.npz"]
    assert json.loads((out / "samples.json").read_text())["--encoder"] == WORDS
    with np.load(out / "samples.npz") as archive:
        images, numbers = archive["arr_0"], archive["arr_1"]
    expected = [run.sample_at(part, run.text([repeated[i] for i in part]))
                for part in np.arange(8).reshape(2, 4)]
    assert_shows(images, np.concatenate(expected))
    assert numbers.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert json.loads((out / "samples.json").read_text())["split"] is None
    write_samples(run, str(tmp_path / "split"), SampleRequest(4, 4))  # on the captions of the split
    assert json.loads((tmp_path / "split/samples.json").read_text())["split"] == "test[:20]"
    for i, line in enumerate((out / "prompts.jsonl").read_text().splitlines()):
        assert json.loads(line) == {"file_name": f"{i}.png", "prompt": repeated[i]}
        np.testing.assert_array_equal(pixels(out / f"{i}.png"), images[i])
    assert 4 * 64 <= len(pixels(out / "contact_sheet.png")) < 4 * 70  # a row a prompt
    with pytest.raises(UserError, match=r"holds samples of --prompts '4 of digest \w+', and this "
                                        "call has '2 of digest"):
        write_samples(unnamed, str(out), dataclasses.replace(request, prompts=given[:2]))
