"""The comparison with other flows, on stand-ins for them."""

import jax
import numpy as np
import pytest

from ntm_jax.core import transformer
from ntm_jax.core.transformer import PLAIN
from ntm_jax.runtime import flops
from tests import peers
from tests.common import python
from tests.peers import compare
from tests.peers.work import Peer, Sizes

STAND_IN = """
import pathlib, time
from tests.peers.work import Work
log = pathlib.Path(__file__).parents[1] / "log"

def note(word):
    with log.open("a") as file:
        file.write(f"{{word}} ")

def train_step(sizes):
    return Work(lambda: time.sleep({seconds}), {flops})

def inverse(sizes, how):
    return Work(lambda: None, 7, lambda: 0.5, "quick") if how == "parallel" else None

def products():
    return lambda: note("{name}") or 4e3
"""
SIZES = Sizes(images=1, tokens=1, width=1, head=1, blocks=1, layers=1)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of two stand-ins, beside one for ours; the slower has half the FLOPs."""
    made = []
    for name, seconds, count in (("ours", 0.02, 20), ("slow", 0.06, 10)):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}_flow.py").write_text(
            STAND_IN.format(name=name, seconds=seconds, flops=count))
        made.append(Peer(name, f"{name}_flow", "https://example.com/flow"))
    monkeypatch.setattr(compare, "OURS", made[0])
    monkeypatch.setattr(compare, "PEERS", (*made[1:], Peer("absent", "absent_flow", "https://x/y")))
    monkeypatch.setattr(compare, "SECONDS", 0.001)
    return tmp_path


def test_peers_are_timed_in_turn(folder):
    rows = compare.compare(str(folder), 3)
    assert [(row["name"], row["peer"]) for row in rows] == [
        ("train step", "ours"), ("train step", "slow"),
        ("inverse, parallel", "ours"), ("inverse, parallel", "slow")]
    # A run measures the products before and after; each is prepared with one run.
    assert (folder / "log").read_text() == 8 * "ours ours slow slow "
    ours, slow = rows[:2]
    assert ours["times_ours"] == 1
    assert slow["times_ours"] == pytest.approx(6, rel=0.5)  # 3 times as long for half the FLOPs
    assert slow["seconds"] == np.median(slow["runs"])
    assert slow["flops_per_second"] == 10 / slow["seconds"]
    assert slow["share_of_limit"] == slow["flops_per_second"] / 4e3
    assert (rows[3]["error"], rows[3]["note"]) == (0.5, "quick")


def test_the_program_needs_a_peer(tmp_path):
    refused = python("-m", "launch.benchmark", f"--peers={tmp_path}", check=False)
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"error: --peers={tmp_path} has no flow to compare with: ml-")
    for peer in peers.PEERS:
        assert f"git clone {peer.url} {tmp_path / peer.name}" in refused.stderr
    installed = Peer("slow", "slow_flow", packages=("no_such_package", "numpy"))
    assert installed.missing("") == "slow is missing: pip install no_such_package"


def test_flops_of_a_layer():
    sizes = Sizes(images=3, tokens=16, width=32, head=8, blocks=1, layers=1)
    stack = transformer.Stack(transformer.LayerConfig(
        depth=1, head_size=8, kv_heads=4, mlp_ratio=4, causal=True, dtype=np.float32,
        arithmetic=PLAIN), remat="none", scan=False)
    x, modulation = np.zeros((3, 16, 32), np.float32), np.zeros((3, 6, 32), np.float32)
    counted = flops.count(
        lambda: stack.init_with_output(jax.random.key(0), x, modulation)[0])
    assert sizes.forward_flops(ends=0) == counted
