"""Checkpoints on real files: bit-equal round trips, retention, damage, kills, other shardings."""

import gc
import json
import random
import shutil
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ntm_jax.errors import UserError
from ntm_jax.runtime.checkpoint import Checkpoints
from ntm_jax.runtime.checksums import array_checksums
from tests.common import bits, python, start


def make_state(width=32):
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "dense": {"kernel": jax.random.normal(keys[0], (8, width)), "bias": jnp.zeros(width)},
        "half": jax.random.normal(keys[1], (5, width), jnp.bfloat16),
        "mask": jax.random.bernoulli(keys[2], shape=(7,)),
    }
    return {"params": params, "opt_state": optax.adam(1e-3).init(params),
            "ema": jax.tree.map(jnp.copy, params)}


def abstract(tree, sharding=None):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding), tree)


def save(folder, state, *steps, **options):
    """Saves a state at these steps, with the data's state {"n": step}."""
    with Checkpoints(folder, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, state, {"n": step})


def refusal(folder, template, step=None, **options):
    """The line that refuses to restore a checkpoint."""
    with Checkpoints(folder, **options) as checkpoints, pytest.raises(UserError) as error:
        checkpoints.restore(template, step)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_round_trip_is_bit_equal_and_keeps_the_structure(tmp_path):
    state, data = make_state(), {"next": 17, "inner": {"7": [1, 2]}, "name": "digits"}
    with Checkpoints(tmp_path) as checkpoints:
        assert (checkpoints.latest(), checkpoints.steps()) == (None, [])
        checkpoints.save(3, state, data)
        expected = bits(state)
        jax.tree.map(lambda x: x.delete(), state)  # as donation does
        checkpoints.wait()
    with Checkpoints(tmp_path) as checkpoints:
        step, restored, restored_data = checkpoints.restore(abstract(make_state()))
        assert (step, restored_data) == (3, data)
        assert jax.tree.structure(restored) == jax.tree.structure(make_state())
        assert bits(restored) == expected
        _, subtree, _ = checkpoints.restore({"ema": abstract(restored["ema"])}, 3, partial=True)
        assert bits(subtree["ema"]) == bits(restored["ema"])


def test_reading_changes_nothing_on_disk(tmp_path):
    state = {"x": jnp.ones(3)}
    assert "there is no checkpoint in " in refusal(tmp_path / "none", abstract(state))
    assert list(tmp_path.iterdir()) == []
    save(tmp_path, state, 1)
    unfinished = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    unfinished.mkdir()  # as another process that is saving now has it
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(abstract(state))[0] == 1
        assert checkpoints.steps() == [1]
        assert unfinished.exists()
        # The run itself saves, which has resumed: the unfinished save was a killed run's.
        checkpoints.save(3, state, {})
        checkpoints.wait()
        assert not unfinished.exists()


def test_a_save_beside_a_checkpoint_of_another_run_is_refused(tmp_path):
    state = {"x": jnp.ones(3)}
    save(tmp_path, state, 1)
    with Checkpoints(tmp_path) as resumed, Checkpoints(tmp_path) as other:
        resumed.save(2, state, {})
        resumed.wait()
        with pytest.raises(UserError, match="of step 2, and this run's is of step 1: "):
            other.save(2, state, {})
        resumed.save(3, state, {})
        resumed.save(3, {"x": jnp.zeros(3)}, {})  # a saved step is left as it is
        np.testing.assert_array_equal(resumed.restore(abstract(state))[1]["x"], np.ones(3))


def test_retention_keeps_the_last_the_best_and_every_nth(tmp_path):
    bounds = {1: float("nan"), 2: 1.0, 3: float("-inf"), 4: 3.0, 5: None, 6: 2.0, 7: None, 8: 4.0}
    with Checkpoints(tmp_path, keep_every=4) as checkpoints:
        for step, bound in bounds.items():
            checkpoints.save(step, {"x": jnp.ones(3)}, {}, bound)
        checkpoints.save(9, {"x": jnp.ones(3)}, {})
        checkpoints.save(10, {"x": jnp.ones(3)}, {})
        checkpoints.save(11, {"x": jnp.ones(3)}, {})
        checkpoints.wait()
        assert checkpoints.steps() == [2, 4, 8, 9, 10, 11]
    with Checkpoints(tmp_path) as checkpoints:  # reads the bounds from the files
        assert checkpoints.latest() == 11
        for step, bound, kept in ((12, 1.5, [2, 10, 11, 12]), (13, 0.5, [11, 12, 13])):
            checkpoints.save(step, {"x": jnp.ones(3)}, {}, bound)
            checkpoints.wait()
            assert checkpoints.steps() == kept


# Orbax leaves other reads of a failed load to the garbage collector, and closes their event loop.
abandoned_reads = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def settled():
    """Collects what a failed load left behind before the next test, whose warnings are errors."""
    gc.freeze()  # collecting all earlier objects takes seconds
    yield
    time.sleep(0.1)
    gc.collect()


@pytest.mark.slow
@abandoned_reads
@pytest.mark.usefixtures("settled")
def test_no_flipped_byte_is_ever_loaded_silently(tmp_path):
    state = {"noise": jax.random.normal(jax.random.key(0), (64, 64)),
             "half": jnp.ones((32, 33), jnp.bfloat16), "zeros": jnp.zeros(999)}
    template = abstract(state)
    save(tmp_path, state, 1, 2)
    files = sorted(f for f in (tmp_path / "checkpoints" / "2").rglob("*")
                   if f.is_file() and f.stat().st_size)
    draw, refusals = random.Random(0), []
    arrays = max(files, key=lambda file: file.stat().st_size)
    for file in [arrays] * 12 + draw.choices(files, k=6):  # manifests, metadata, JSON
        whole = file.read_bytes()
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        file.write_bytes(damaged)
        try:
            with Checkpoints(tmp_path) as checkpoints:
                _, loaded, data = checkpoints.restore(template)
            assert (bits(loaded), data) == (bits(state), {"n": 2}), f"{file} loaded wrong"
        except UserError as error:
            refusals.append(str(error))
        file.write_bytes(whole)
    assert len(refusals) > 9
    assert sum("has checksum" in refusal for refusal in refusals) > 5


@abandoned_reads
@pytest.mark.usefixtures("settled")
def test_a_damaged_checkpoint_is_refused_with_the_way_out(tmp_path):
    state = {"params": {"w": jax.random.normal(jax.random.key(0), (64, 64))}}
    save(tmp_path, state, 10, 20)
    folder = tmp_path / "checkpoints"
    sums = folder / "20" / "checksums" / "data.json"
    whole = sums.read_text()
    sums.write_text(json.dumps({**json.loads(whole), "params/w": "0" * 16}))
    text = refusal(tmp_path, abstract(state))
    assert text.startswith("checkpoint step 20 is damaged: params/w has checksum ")
    assert text.endswith(f"resume from step 10 by removing {folder}/20")
    sums.write_text(whole)
    (folder / "20" / "data" / "data.json").write_text('{"n": 3}')
    assert "<data> has checksum" in refusal(tmp_path, abstract(state))
    arrays = max((folder / "20" / "state").rglob("*"), key=lambda path: path.stat().st_size)
    arrays.write_bytes(arrays.read_bytes()[:-1000])
    assert "cannot be read" in refusal(tmp_path, abstract(state))
    shutil.rmtree(folder / "20")  # the way out that the message gives
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(abstract(state))[::2] == (10, {"n": 10})


def test_another_model_is_refused_by_its_first_differing_array(tmp_path):
    state = make_state()
    template = abstract(state)
    fewer = {name: leaf for name, leaf in template["ema"].items() if name != "half"}
    save(tmp_path, state, 5)
    assert (" is of another model: array ema/dense/bias is float32[32] in the checkpoint, "
            "float32[48] in this model; ") in refusal(tmp_path, abstract(make_state(width=48)))
    assert "no checkpoint of step 6 in " in refusal(tmp_path, template, 6)
    refused = pytest.raises(UserError, match="array ema/half is")
    with Checkpoints(tmp_path) as checkpoints, refused:
        checkpoints.restore({"ema": fewer}, 5, partial=True)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    state = {"x": jnp.ones(3)}
    save(tmp_path, state, 4, settings={"a": 1})
    text = refusal(tmp_path, abstract(state), settings={"a": 2})
    assert "was saved by a run with a = 1, and this one has 2: give that value" in text
    for mine in ({"a": 1, "newer": 3}, None):
        with Checkpoints(tmp_path, settings=mine) as checkpoints:
            assert checkpoints.restore(abstract(state))[0] == 4
    # Earlier versions saved no settings.
    folder = tmp_path / "checkpoints" / "4"
    shutil.rmtree(folder / "run")
    sums = json.loads((folder / "checksums" / "data.json").read_text())
    del sums["<run>"]
    (folder / "checksums" / "data.json").write_text(json.dumps(sums))
    with Checkpoints(tmp_path, settings={"a": 2}) as checkpoints:
        assert checkpoints.restore(abstract(state))[0] == 4


SPECS = {"both": PartitionSpec("fsdp", "tensor"), "second": PartitionSpec(None, "fsdp"),
         "joint": PartitionSpec(("fsdp", "tensor")), "half": PartitionSpec("tensor"),
         "step": PartitionSpec()}


def arrays() -> dict:
    """An array for each of SPECS."""
    keys = iter(jax.random.split(jax.random.key(3), 4))
    state = {name: jax.random.normal(next(keys), (16, 8)) for name in ("both", "second", "joint")}
    return state | {"half": jax.random.normal(next(keys), (6, 5), jnp.bfloat16),
                    "step": jnp.int32(7)}


def eight(folder: str) -> None:
    """Restores arrays() onto a mesh of 8 devices, saves them as step 2; prints their checksums."""
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    with Checkpoints(folder) as checkpoints:
        _, state, data = checkpoints.restore({
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, SPECS[name]))
            for name, x in arrays().items()})
        assert all(state[name].sharding.spec == spec for name, spec in SPECS.items())
        checkpoints.save(2, state, data)
    print(json.dumps(array_checksums(state)))


def test_restores_onto_another_sharding_with_the_same_checksums(tmp_path):
    state = arrays()
    save(tmp_path, state, 1)
    output = python(__file__, "eight", str(tmp_path), devices=8).stdout
    assert json.loads(output.splitlines()[-1]) == array_checksums(state)
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    replicated = NamedSharding(mesh, PartitionSpec())
    with Checkpoints(tmp_path) as checkpoints:  # written from eight devices, read on one
        step, restored, data = checkpoints.restore(abstract(state, replicated))
    assert (step, data, bits(restored)) == (2, {"n": 1}, bits(state))


def at_step(step: int) -> dict:
    """The state of `killed` after a step."""
    return {str(i): jnp.arange(256.0 * 256).reshape(256, 256) + i + step for i in range(8)}


def killed(folder: str) -> None:
    """Saves in a loop until it is killed, from the latest checkpoint on; tells what it does."""
    step, checkpoints = 0, Checkpoints(folder)
    if checkpoints.latest() is not None:
        step = checkpoints.restore(abstract(at_step(0)))[0]
    print("restored", step, flush=True)
    while True:
        step += 1
        checkpoints.save(step, at_step(step), {"n": step})
        print("saving", step, flush=True)
        checkpoints.wait()
        print("committed", step, flush=True)


def test_kill_in_the_middle_of_a_save_loses_nothing_committed(tmp_path):
    draw, committed = random.Random(0), 0
    for kill in range(3):
        child = start([__file__, "killed", tmp_path])
        target = committed + 2 + kill
        for line in child.stdout:
            word, step = line.split()
            assert word != "restored" or int(step) >= committed
            committed = int(step) if word == "committed" else committed
            if word == "saving" and int(step) >= target:
                time.sleep(draw.uniform(0, 0.04))
                break
        child.send_signal(signal.SIGKILL)
        rest = child.communicate()[0].split()
        words = zip(rest[::2], rest[1::2], strict=False)
        committed = max([committed, *(int(step) for word, step in words if word == "committed")])
    with Checkpoints(tmp_path) as checkpoints:
        step, state, data = checkpoints.restore(abstract(at_step(0)))
        assert committed <= step <= committed + 1
        assert data == {"n": step}
        assert bits(state) == bits(at_step(step))
        checkpoints.save(step + 1, state, {"n": step + 1})
        checkpoints.wait()
        folders = sorted(f.name for f in (tmp_path / "checkpoints").iterdir())
        assert folders == sorted(map(str, checkpoints.steps()))


if __name__ == "__main__":
    {"killed": killed, "eight": eight}[sys.argv[1]](*sys.argv[2:])
