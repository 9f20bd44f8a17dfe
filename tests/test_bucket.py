"""The programs on object storage that fails now and then, for a while, or is slow."""

import time

import numpy as np
import pytest
from PIL import Image

from tests.bucket import Bucket
from tests.common import TINY, events, figures, logged, pixels, start, write_photos

pytestmark = pytest.mark.slow

SETTINGS = TINY | {
    "data.split": "train", "evaluate.split": "test", "model.condition": "none",
    "data.batch_size": 4, "train.condition_dropout": 0, "sample.guidance": 0, "train.steps": 6,
    "train.save_every": 2}
RECORDS = "gs://bkt/records"
QUIET = "google_auth_provider.cc"  # tensorstore logs once that it found no credentials


@pytest.fixture(scope="module")
def bucket():
    """A bucket on which every tenth call fails."""
    with Bucket() as bucket:
        bucket.every = 10
        yield bucket


def begin(bucket, program, flags):
    """Starts a program on the bucket."""
    flags = [f"--{name}={value}" for name, value in flags.items()]
    return start(["-m", f"launch.{program}", "--import=tests.bucket_client", *flags],
                 env=bucket.environment())


def end(process) -> tuple[int, str, list[str]]:
    """The status of a program, its output, and the lines of its standard error."""
    output, errors = process.communicate(timeout=240)
    return process.returncode, output, [line for line in errors.splitlines()
                                        if line and QUIET not in line]


def run(bucket, program, **flags) -> str:
    """The output of a program, which has no other line on standard error."""
    status, output, errors = end(begin(bucket, program, flags))
    assert (status, errors) == (0, []), output
    return output


def fails(bucket, program, flags, text, status=403, methods=("POST", "PUT")) -> tuple[int, str]:
    """The status and the one line of a program while calls that have `text` are refused."""
    bucket.refused, bucket.status, bucket.methods = text, status, methods
    ended, output, errors = end(begin(bucket, program, flags))
    bucket.refused = ""
    assert len(errors) == 1, (output, errors)
    return ended, errors[0]


def training(workdir, records=RECORDS) -> dict:
    """The flags of a training run."""
    settings = SETTINGS | {"data.source": f"records:{records}"}
    return {"config": "experiments/digits.py", "workdir": workdir} | {
        f"config.{name}": value for name, value in settings.items()}


@pytest.fixture(scope="module")
def records(bucket, tmp_path_factory):
    """A local copy of the records that are prepared on the bucket from a folder there."""
    folder = tmp_path_factory.mktemp("bucket")
    write_photos(folder / "photos", 40, 24)
    for file in (folder / "photos").iterdir():
        bucket.write(f"photos/{file.name}", file.read_bytes())
    flags = dict(input="folder:gs://bkt/photos", out=RECORDS, image_size=8, test=8, shard_size=16)
    status, line = fails(bucket, "prepare", flags, "photos/7.jpg", 507, ("GET",))
    assert status == 75
    assert line.startswith("error: gs://bkt/photos/7.jpg: the bucket answers 507"), line
    output = run(bucket, "prepare", **flags)
    assert "bad images left out: 0 of 40" in output  # nor is that one
    return bucket.copy("records", folder / "records")


@pytest.fixture(scope="module")
def trained(bucket, records):
    """A local copy of a finished run on the bucket, which a failed save and a kill interrupted."""
    flags = training("gs://bkt/run")
    status, line = fails(bucket, "train", flags, "run/checkpoints/4/data/data.json", 507)
    assert status == 75
    assert line.startswith("error: a checkpoint in gs://bkt/run/checkpoints could not be written "
                           "(HttpError: the bucket answers 507"), line
    process = begin(bucket, "train", flags)
    while not any(name.startswith("6/") for name in bucket.names("run/checkpoints")):
        assert process.returncode is None
        time.sleep(0.02)
    process.kill()
    status, output, _ = end(process)
    assert status == -9
    assert "resuming gs://bkt/run at step 2" in output
    bucket.slow = "/4/data/data.json?alt=media"
    output = run(bucket, "train", **flags)
    assert "resuming gs://bkt/run at step 4" in output
    assert bucket.slowed > 0
    bucket.slow = ""
    return bucket.copy("run", records.parent / "trained")


def test_a_run_goes_on_after_failures_as_one_on_a_disk(bucket, records, trained):
    """Its metrics, events and figures, after a save that failed and a kill in a save."""
    local = records.parent / "run"
    flags = training(local, records)
    status, _, _ = end(start(["-m", "launch.train", *(
        f"--{name}={value}" for name, value in flags.items())]))
    assert status == 0
    assert logged(trained) == logged(local)
    assert {step for step, _ in events(trained)["loss"]} == {*range(1, 7)}
    assert "samples" in events(trained)
    one, other = (figures(folder / "evaluation.json") for folder in (trained, local))
    assert one["provenance"].pop("version") == other["provenance"].pop("version")
    del one["provenance"], other["provenance"]  # these name the folders
    assert one == other
    assert bucket.failed > 100


def test_a_run_is_evaluated_sampled_and_exported(bucket, trained, tmp_path):
    """From the bucket, to the bucket; an export there samples as the run does."""
    run(bucket, "evaluate", workdir="gs://bkt/run", per_example=True)
    run(bucket, "export", workdir="gs://bkt/run", out="gs://bkt/export")
    again = bucket.copy("run", tmp_path / "run")
    assert (again / "evaluation.parquet").exists()
    one, other = (figures(folder / "evaluation.json") for folder in (trained, again))
    assert one["nats_per_dim"] == other["nats_per_dim"]
    for name in ("run", "export"):
        run(bucket, "sample", workdir=f"gs://bkt/{name}", num=5, batch=3, out=f"gs://bkt/{name}-5")
        bucket.copy(f"{name}-5", tmp_path / f"{name}-5")
    for name in ("0.png", "4.png", "grid.png"):
        found = [pixels(tmp_path / folder / name) for folder in ("run-5", "export-5")]
        np.testing.assert_array_equal(*found)


def test_storage_that_fails_is_not_taken_for_damage(bucket, trained):
    """Nobody is told to remove a checkpoint or records that only cannot be read now."""
    flags = {"workdir": "gs://bkt/run"}
    status, line = fails(bucket, "evaluate", flags, "6/state/_METADATA", 507, ("GET",))
    assert status == 75
    assert line == (
        "error: checkpoint step 6 in gs://bkt/run/checkpoints cannot be read now (HttpError: the "
        "bucket answers 507, 507): the same command goes on once the storage answers")
    status, line = fails(bucket, "evaluate", flags, "records/test-00000.array", 403, ("GET",))
    assert status == 2
    assert line.startswith("error: record 0 of gs://bkt/records/test-00000.arrayrecord cannot be")
    assert line.endswith("): the same command goes on once that is mended")


OPEN = """
import tests.bucket_client
from ntm_jax.data.sources.folder import open_folder
source = open_folder("gs://bkt/classes", "all")
print(source.class_names, [record["label"] for record in source.records], source.notes)
"""


def test_a_folder_of_images_on_the_bucket(bucket, tmp_path):
    """Its sub-folders are classes, and an image that cannot be read now is not left out."""
    for number, name in enumerate(("a/0.png", "a/1.png", "b/0.png")):
        Image.new("L", (4, 4), number).save(tmp_path / "image.png")
        bucket.write(f"classes/{name}", (tmp_path / "image.png").read_bytes())
    bucket.refused, bucket.methods = "classes/a/1.png", ("GET",)
    errors = end(start(["-c", OPEN], env=bucket.environment()))[2]
    assert errors[-1].startswith("PermissionError: [Errno 13] Forbidden: "), errors[-1]
    assert errors[-1].endswith("'gs://bkt/classes/a/1.png'")
    bucket.refused = ""
    assert end(start(["-c", OPEN], env=bucket.environment()))[1] == "('a', 'b') [0, 0, 1] \n"


SAVE = """
import sys, time
import jax.numpy as jnp
from etils import epath
import tests.bucket_client
from ntm_jax.runtime.checkpoint import Checkpoints

def save(*steps):
    with Checkpoints("gs://bkt/two") as checkpoints:
        for step in steps:
            print("next", step, flush=True)
            while not epath.Path(f"gs://bkt/save/{step}").exists():
                time.sleep(0.1)
            checkpoints.save(step, {"a": jnp.arange(3.0)}, {})

if sys.argv[1] == "first":
    save(2)
    save(6)
else:
    save(4)
"""


def test_a_run_stops_where_another_has_saved_on_the_bucket(bucket, monkeypatch):
    """Though it has listed the checkpoints before, as a run does that resumes."""
    monkeypatch.setattr(bucket, "every", 0)

    def started(name):
        return start(["-c", SAVE, name], env=bucket.environment())

    first = started("first")
    bucket.write("save/2", b"now")
    assert [first.stdout.readline() for _ in range(2)] == ["next 2\n", "next 6\n"]
    bucket.write("save/4", b"now")
    assert end(started("other"))[0] == 0
    bucket.write("save/6", b"now")
    assert end(first)[2][-1].endswith(
        "UserError: the latest checkpoint in gs://bkt/two/checkpoints is of step 4, and this run's "
        "is of step 2: another run saves there, so this one stops")
