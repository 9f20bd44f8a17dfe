"""Preparations by several processes, interrupted ones, and damaged folders."""

import hashlib
import json
import re
import signal
import time

import jax
import numpy as np
import pytest

from ntm_jax.data.autoencoder import open_autoencoder
from ntm_jax.data.records import verify
from ntm_jax.errors import UserError
from ntm_jax.runtime import autoencode, sharding
from ntm_jax.runtime.config import Mesh
from ntm_jax.tools.prepare import captioned
from tests.common import python, start
from tests.data.common import write_autoencoder
from tests.tools.prepare.common import WORDS, choices, files, picture, pictures, records, run

# Several and killed processes


def test_any_number_of_processes_and_workers_make_the_same_records(tmp_path):
    folder = pictures(tmp_path / "in", 70)
    expected = files(run(tmp_path, folder, text=WORDS, test=0.2, shard_size=8))
    out = tmp_path / "several"
    for process in (2, 0, 1):
        assert not (out / "manifest.json").exists()
        run(tmp_path, folder, "several", text=WORDS, test=0.2, shard_size=8,
            num_processes=3, process_id=process, workers=process // 2, batch=5)
    assert files(out) == expected


def test_latents_are_encoded_by_one_program(tmp_path):
    """A batch that bad images or a shard's end leave short is padded."""
    write_autoencoder(tmp_path / "vae")
    folder, name = pictures(tmp_path / "in", 6), f"kl:{tmp_path}/vae"
    (folder / "002.png").write_bytes(b"<html>")
    out = run(tmp_path, folder, autoencoder=name, latent_scale="encoder", batch=4, max_bad=0.2)
    kl, found = open_autoencoder(name), records(out)
    assert jax.jit(kl.encode)._cache_size() == 1
    images = [captioned.images.resize(picture(i), 8) for i in (0, 1, 3, 4, 5)]
    expected = autoencode.encode(kl, np.stack(images), sharding.make_mesh(Mesh()), 4)
    assert expected.std() > 0.1
    for record, latent in zip(found, expected, strict=True):
        np.testing.assert_array_equal(record["image"], latent.astype(np.float16))
    assert choices(out)["autoencoder"] == name
    assert choices(out)["autoencoder_sha256"] == kl.digest
    with pytest.raises(UserError, match=r"images of 9x9 pixels cannot be encoded by kl:\S+: expec"):
        run(tmp_path, folder, "odd", autoencoder=name, image_size=9)


def test_complete_shards_are_kept_and_others_made_again(tmp_path, monkeypatch):
    folder = pictures(tmp_path / "in", 20)
    out = run(tmp_path, folder, shard_size=5)
    expected, opened = files(out), []
    load = captioned.load
    monkeypatch.setattr(captioned, "load", lambda read, size, item: opened.append(item.key)
                        or load(read, size, item))
    (out / "manifest.json").unlink()
    (out / "train-00001.json").unlink()  # killed before the tally was written
    (out / "train-00003.arrayrecord").write_bytes(b"cut")
    for name in ("plan.json", "train-00000.json"):  # as earlier versions wrote them
        content = json.loads((out / name).read_text())
        seal = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        (out / name).write_text(json.dumps(content | {"content_sha256": seal}))
    (out / ".part-train-00001.arrayrecord-0123456789ab").write_bytes(b"killed")
    (out / ".part-of-mine").write_bytes(b"another's")
    run(tmp_path, folder, shard_size=5)
    assert opened == [f"{i:03}.png" for i in (*range(5, 10), *range(15, 20))]
    found = files(out)
    del found[".part-of-mine"]
    assert found.keys() == expected.keys()
    assert {name for name in found if found[name] != expected[name]} == {
        "plan.json", "train-00000.json"}


def test_damaged_missing_and_exchanged_shards_are_named(tmp_path):
    out = run(tmp_path, pictures(tmp_path / "in", 12), shard_size=5)
    assert verify(str(out)) == 3
    first, second, third = (out / f"train-0000{i}.arrayrecord" for i in range(3))
    first.unlink()
    second.write_bytes(third.read_bytes())
    third.write_bytes(bytes(third.stat().st_size))
    with pytest.raises(UserError, match=r"^3 of 3 shards of .* are damaged, missing or another's "
                       r"\(train-00000\.arrayrecord, train-00001\..*: copy it there again, or rem"):
        verify(str(out))


@pytest.mark.slow
def test_killed_at_random_and_restarted_the_shards_are_bit_identical(tmp_path):
    folder = pictures(tmp_path / "in", 200)
    (folder / "017.png").write_bytes(b"<html>")
    call = ["-m", "launch.prepare", f"--input=folder:{folder}", "--image_size=96",
            "--shard_size=10", f"--text={WORDS}"]
    out, random = tmp_path / "killed", np.random.default_rng(0)
    done = python(*call, f"--out={tmp_path}/expected").stdout
    for _ in range(3):
        enough = len(list(out.glob("*.json"))) + 3
        process = start([*call, "--workers=1", f"--out={out}"])
        deadline = time.time() + 60
        while len(list(out.glob("*.json"))) < enough and time.time() < deadline:
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.03))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL  # else it finished before: use more images
    assert not (out / "manifest.json").exists()
    resumed = python(*call, f"--out={out}").stdout
    assert files(out) == files(tmp_path / "expected")
    assert "bad images left out: 1 of 200: 017.png (not an image)" in resumed
    assert resumed.splitlines()[-4:-1] == done.splitlines()[-4:-1]


# The program


def test_a_mistake_is_one_line_with_status_2(tmp_path):
    out = run(tmp_path, pictures(tmp_path / "in", 3), "damaged")
    (out / "train-00000.arrayrecord").write_bytes(b"")
    for arguments, message in (
        ([f"--verify={out}"], "are damaged, missing or another's (train-00000.arrayrecord)"),
        ([f"--out={tmp_path}/out"], "--input and --out are missing: give both, or --verify=FOLDER"),
    ):
        done = python("-m", "launch.prepare", *arguments, check=False)
        assert done.returncode == 2
        assert re.fullmatch(r"error: [^\n]+\n", done.stderr), done.stderr
        assert message in done.stderr
        assert not done.stdout
