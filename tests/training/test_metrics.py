"""The metrics writer: the file's lines, resuming, TensorBoard events read back, object storage."""

import io
import json

import numpy as np
from PIL import Image

from ntm_jax import files
from ntm_jax.training.metrics import MetricsReporter
from ntm_jax.training.writers import lines as lines_file
from tests.common import events


def lines(workdir):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (workdir / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def steps(workdir):
    return [line["step"] for line in lines(workdir)]


def test_resuming_drops_what_will_be_logged_again(tmp_path):
    with MetricsReporter(tmp_path, 10, quiet=True) as writer:
        for step in (2, 4, 6, 8):
            writer.write(step, {"loss": float(step)})
    file = tmp_path / "metrics.jsonl"
    file.write_text(file.read_text() + '{"step": 4, "lo')  # as a kill leaves it
    with MetricsReporter(tmp_path, 10, start_step=4, quiet=True) as writer:
        assert steps(tmp_path) == [2, 4]
        writer.write(6, {"loss": 0.0})
    found = [(line["step"], line["loss"]) for line in lines(tmp_path)]
    assert found == [(2, 2.0), (4, 4.0), (6, 0.0)]
    assert not list(tmp_path.glob("*.new"))
    with MetricsReporter(tmp_path, 10, quiet=True):  # a run that starts over
        pass
    assert lines(tmp_path) == []


def test_the_file_gets_lines_of_valid_json_and_tensorboard_scalars_and_images(tmp_path):
    image = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    Image.fromarray(image).save(tmp_path / "samples.png")
    with MetricsReporter(tmp_path, 10, quiet=True) as writer:
        writer.write(3, {"loss": np.float32(0.25), "bad": float("nan"), "worse": float("-inf")})
        [line] = lines(tmp_path)  # flushed
        writer.picture(3, tmp_path / "samples.png")
    assert line.pop("wall_time") > 1e9
    assert line == {"step": 3, "loss": 0.25, "bad": None, "worse": None}
    found = events(tmp_path)
    assert [(step, value.simple_value) for step, value in found["loss"]] == [(3, 0.25)]
    [(step, value)] = found["samples"]
    assert step == 3
    encoded = io.BytesIO(value.image.encoded_image_string)
    np.testing.assert_array_equal(np.asarray(Image.open(encoded)), image)


def test_object_storage_is_written_at_times_and_at_the_end(tmp_path, monkeypatch):
    """The lines after so many, the events after a while or a picture; both when the run is saved.
    """
    monkeypatch.setattr(files, "is_remote", lambda path: True)
    monkeypatch.setattr(lines_file, "REMOTE_LINES", 3)
    Image.new("RGB", (2, 2)).save(tmp_path / "samples.png")

    def written():
        return steps(tmp_path), [step for step, _ in events(tmp_path)["loss"]]

    with MetricsReporter(tmp_path, 10) as writer:
        for step in (1, 2, 3, 4):
            writer.write(step, {"loss": 1.0})
        assert written() == ([1, 2, 3], [1])
        writer.flush()  # as when the run is saved
        assert written() == ([1, 2, 3, 4], [1, 2, 3, 4])
        writer.picture(4, tmp_path / "samples.png")
        writer.write(5, {"loss": 1.0})
        assert written() == ([1, 2, 3, 4], [1, 2, 3, 4, 5])
        writer.write(6, {"loss": 1.0})
        assert written() == ([1, 2, 3, 4], [1, 2, 3, 4, 5])
    assert written() == ([1, 2, 3, 4, 5, 6],) * 2
    assert len([*tmp_path.iterdir()]) == 3  # with the picture
