"""Tests of runtime/profile.py: shares of a real run's trace, and the rules by which time and operations are assigned."""

import json

import jax
import pytest

from ntm_jax.analysis import profile
from ntm_jax.training import loop
from tests.common import rehearsal, tiny_config


@rehearsal
def test_a_runs_trace_names_where_its_time_goes(tmp_path, capsys, quick_compilation):
    loop.train(tiny_config(), tmp_path, until=4, profile=(1, 4))
    found = json.loads((tmp_path / "profile" / "summary.json").read_text())
    assert sum(found["by_kind"].values()) + found["idle"] == pytest.approx(1, abs=1e-9)
    by_module = {name: sum(kinds.values()) for name, kinds in found["by_module"].items()}
    assert sum(by_module.values()) == pytest.approx(1 - found["idle"], abs=1e-9)
    assert found["by_kind"]["products"] > 0
    for name in ("transporter forward", "transporter backward", "predictor forward", "predictor backward"):
        assert found["by_module"][name]["products"] > 0
    assert by_module["optimizer"] > 0
    # Unnamed operations of this step are the noise, the loss and casts; were names not found, all would be there.
    assert by_module["rest forward"] + by_module.get("rest backward", 0) < 0.5 * sum(by_module.values())
    printed = capsys.readouterr().out
    assert "steps 1:4, traced in" in printed
    assert "predictor backward" in printed


def test_a_task_is_the_time_of_the_operation_that_gave_it():
    one, two = ("jit_step", 1, "dot.1"), ("jit_step", 1, "add.2")
    giver = [(0, 10, one), (1, 1, ("start", 7)), (12, 13, None), (12, 12, ("start", 9))]
    helper = [(2, 9, 7), (3, 3, ("start", 8)), (5, 6, two), (20, 30, 9)]  # task 9 was the executor's, 8 a task's own task
    third = [(4, 8, 8)]
    assert profile._own_times([giver, helper, third]) == {one: 10 + (7 - 1) + 4, two: 1}


TEXT = """HloModule jit_step, is_scheduled=true

%fused (a: f32[2,2]) -> f32[2,2] {
  %a = f32[2,2]{1,0} parameter(0)
  %t = f32[2,2]{1,0} transpose(%a), dimensions={1,0}
  ROOT %d = f32[2,2]{1,0} dot(%t, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%moved (b: f32[2,2]) -> f32[2,2] {
  %b = f32[2,2]{1,0} parameter(0)
  ROOT %u = f32[2,2]{1,0} transpose(%b), dimensions={1,0}, metadata={op_name="jit(step)/optimizer/transpose"}
}

ENTRY %main (p: f32[2,2]) -> f32[2,2] {
  %p = f32[2,2]{1,0} parameter(0)
  %f.1 = f32[2,2]{1,0} fusion(%p), kind=kOutput, calls=%fused, metadata={op_name="jit(step)/jvp(NTM.trajectory)/NTM.predict/predictor/dot"}
  %m.2 = f32[2,2]{1,0} fusion(%f.1), kind=kLoop, calls=%moved
  %e.3 = f32[2,2]{1,0} exponential(%m.2), metadata={op_name="jit(step)/transpose(jvp(NTM.pair))/transporter/layers/attention/vmap()/exp"}
  %q.4 = f32[2,2]{1,0} multiply(%e.3, %e.3), metadata={op_name="jit(step)/jvp(Predictor)/layers/attention/query_norm/mul"}
  ROOT %r.5 = f32[2,2]{1,0} all-reduce(%q.4), replica_groups={{0}}, to_apply=%sum, metadata={op_name="jit(step)/jvp()/add"}
}
"""


def test_operations_are_sorted_by_kind_and_module():
    found = profile.operations(TEXT)
    assert {name: found[name][:2] for name in ("f.1", "m.2", "e.3", "q.4", "r.5")} == {
        "f.1": ("predictor forward", "products"), "m.2": ("optimizer", "copies"), "e.3": ("transporter backward", "attention"),
        "q.4": ("predictor forward", "elementwise"), "r.5": ("rest forward", "collectives")}


def test_an_accelerators_operations_are_found_by_their_names():
    # As a TPU's plane is documented to be: no such trace was at hand.
    events = "".join(f"events {{ metadata_id: {i} offset_ps: {at}000 duration_ps: {lasts}000 }}"
                     for i, at, lasts in ((1, 0, 60), (2, 70, 30)))
    names = "".join(f'event_metadata {{ key: {i} value {{ id: {i} name: "{name}" }} }}' for i, name in (
        (1, "%f.1 = f32[2,2]{1,0} fusion(%p)"), (2, "%e.3 = f32[2,2]{1,0} exponential(%m.2)")))
    planes = f'planes {{ id: 1 name: "/device:TPU:0" lines {{ id: 1 name: "XLA Ops" {events} }} {names} }}'
    trace = jax.profiler.ProfileData.from_serialized_xspace(jax.profiler.ProfileData.text_proto_to_serialized_xspace(planes))
    found = profile.summarize(trace, [TEXT])
    assert found["by_module"] == {
        "transporter backward": {"attention": pytest.approx(0.3)}, "predictor forward": {"products": pytest.approx(0.6)}}
    assert (found["idle"], found["devices"], found["seconds"]) == (pytest.approx(0.1), 1, pytest.approx(100e-9))
