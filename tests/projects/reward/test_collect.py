"""The folder of samples that a reward accepts: which are kept, copied, resumed, and read again."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from ntm_jax.data import sources
from ntm_jax.errors import UserError
from ntm_jax.projects.reward import collect as module
from ntm_jax.projects.reward import rewards
from ntm_jax.projects.reward.collect import CollectRequest, collect, copies_of_rare
from ntm_jax.projects.scenes import shapes
from ntm_jax.sampling import generate
from tests.common import new_run, random_run, tiny_config

NUM = 24


@pytest.fixture(scope="module")
def text_run():
    """A run of captioned shapes with random parameters."""
    settings = tiny_config(**{
        "data.source": "shapes", "data.patch_size": 6, "model.condition": "text",
        "data.text_encoder": f"words:7:{' '.join(shapes.VOCABULARY)}", "data.split": "train[:20]",
        "evaluate.split": "test[:4]"})
    return random_run(new_run(settings), step=4, workdir="runs/tiny")


@pytest.fixture(autouse=True)
def mean_pixel():
    """A reward, the mean pixel, with a trait that two samples of every batch show."""
    def score(images, captions):
        assert images.dtype == np.uint8
        seen.append(captions)
        traits = np.zeros((len(images), 2), bool)
        traits[1:3, 0] = traits[3:, 1] = True
        return rewards.Scores(images.mean((1, 2, 3)), traits=traits)

    seen = []
    rewards.register("mean_pixel", lambda argument, source: score)
    return seen


def request(**changes) -> CollectRequest:
    return dataclasses.replace(
        CollectRequest(NUM, 0.0, "mean_pixel", batch=8, guidance=0.0, seed=3), **changes)


def contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*") if path.is_file()}


def rows_of(folder) -> dict[str, dict]:
    rows = map(json.loads, (folder / "metadata.jsonl").read_text().splitlines())
    return {row["file_name"]: row for row in rows}


def test_samples_above_the_threshold_are_kept_with_their_captions(
        text_run, mean_pixel, tmp_path):
    options = dataclasses.replace(text_run.config.sample, guidance=0.0)

    def samples(index):
        y = text_run.default_condition(index, "train[:20]")
        return generate.sample_at(text_run, index, y, options, 3)

    # Batches of another size are rounded differently.
    images = np.concatenate([samples(index) for index in np.split(np.arange(NUM), NUM // 8)])
    means = images.mean((1, 2, 3)).astype(np.float32)
    threshold = float(np.sort(means)[NUM // 2])
    collect(text_run, str(tmp_path / "own"), request(min_reward=threshold))
    captions = list(text_run.config.data.open("train[:20]").captions) * 2  # in turn
    assert [caption for batch in mean_pixel for caption in batch] == [
        captions[i] for i in range(NUM)]
    rows = rows_of(tmp_path / "own")
    kept = {int(name.split("/")[1][:7]) for name in rows}
    assert kept == set(np.flatnonzero(means >= threshold))
    assert 0 < len(kept) < NUM
    for name, row in rows.items():
        number = int(name.split("/")[1][:7])
        assert name.startswith("test/" if number % 10 == 9 else "train/")
        with Image.open(tmp_path / "own" / name) as image:
            np.testing.assert_array_equal(np.asarray(image), images[number])
        assert row["caption"] == captions[number]
        assert row["reward"] == pytest.approx(means[number])
    for split in ("train", "test"):  # the folder is a source
        source = sources.open_source(f"folder:{tmp_path}/own", split)
        names = sorted(name for name in rows if name.startswith(split))
        numbers = [int(name.split("/")[1][:7]) for name in names]
        assert list(source.captions) == [rows[name]["caption"] for name in names]
        found = [record["image"] for record in source.records]
        np.testing.assert_array_equal(found, images[numbers])
    assert (tmp_path / "own/grid.png").exists()


def test_rare_traits_are_copied(text_run, tmp_path):
    assert copies_of_rare(np.array([[1, 0], [0, 1], [0, 1], [0, 1], [0, 0]], bool)).tolist() == [
        2, 1, 1, 1, 1]
    assert copies_of_rare(np.eye(2, dtype=bool)[[0] + 999 * [1]]).max() == module.MOST_COPIES
    assert copies_of_rare(np.zeros((3, 2), bool)).tolist() == [1, 1, 1]
    collect(text_run, str(tmp_path / "own"), request())
    names = [name.split("/")[1][:7] for name in rows_of(tmp_path / "own")]
    times = {number: names.count(f"{number:07d}") for number in range(NUM)}
    # in train/ 5 samples of the first trait and 14 of the second; sample 9 is in test/
    assert {number for number, count in times.items() if count > 1} == {1, 2, 10, 17, 18}
    assert times[2] == round(9.5 / 5)


def test_a_stopped_call_goes_on(text_run, tmp_path):
    def score(images, captions):
        calls.append(len(images))
        if len(calls) == failing:
            raise RuntimeError
        return images.mean((1, 2, 3))

    rewards.register("own", lambda argument, source: score)
    calls, failing = [], 0
    collect(text_run, str(tmp_path / "at_once"), request(reward="own"))
    calls, failing = [], 3
    with pytest.raises(RuntimeError):
        collect(text_run, str(tmp_path / "twice"), request(reward="own"))
    assert not (tmp_path / "twice/metadata.jsonl").exists()
    with pytest.raises(UserError, match=r"samples of --min_reward 0\.0, and this call has 1\.0"):
        collect(text_run, str(tmp_path / "twice"), request(reward="own", min_reward=1.0))
    for _ in range(2):  # the second finds all done
        collect(text_run, str(tmp_path / "twice"), request(reward="own"))
        assert len(calls) == 4
        assert contents(tmp_path / "twice") == contents(tmp_path / "at_once")


def test_what_cannot_be_collected(text_run, tmp_path):
    gray = dataclasses.replace(text_run, spec=dataclasses.replace(text_run.spec, pixel_levels=17))
    with pytest.raises(UserError, match="is not a model of captioned images of 256 pixel levels"):
        collect(gray, str(tmp_path / "own"), request())
