"""Profiles: the shares of a run's trace, and the rules that assign times and operations."""

import json
import re

import jax
import pytest

from ntm_jax.analysis import profile
from ntm_jax.training import loop
from tests.common import ROOT, tiny_config


@pytest.mark.slow
def test_the_summary_of_a_trace_names_where_a_runs_time_goes(tmp_path, capsys):
    tracer = profile.Trace(tmp_path / "profile", (1, 4))
    loop.train(tiny_config(), tmp_path, until=4, tracer=tracer)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line)["flops_per_second"] > 0 for line in lines)
    page = (ROOT / "docs/reference/files.md").read_text()
    keys = {re.sub(r"\d+", "K", key) for line in lines for key in json.loads(line)}
    assert [key for key in keys if f"`{key}`" not in page] == []
    found = json.loads((tmp_path / "profile" / "summary.json").read_text())
    assert sum(found["by_kind"].values()) + found["idle"] == pytest.approx(1, abs=1e-9)
    by_module = {name: sum(kinds.values()) for name, kinds in found["by_module"].items()}
    assert sum(by_module.values()) == pytest.approx(1 - found["idle"], abs=1e-9)
    assert found["by_kind"]["products"] > 0
    for module in ("transporter", "predictor"):
        for direction in ("forward", "backward"):
            assert found["by_module"][f"{module} {direction}"]["products"] > 0
    assert by_module["optimizer"] > 0
    # Only the noise, the loss and casts have no name of a module; without names, all would be rest.
    rest = by_module["rest forward"] + by_module.get("rest backward", 0)
    assert rest < 0.5 * sum(by_module.values())
    printed = capsys.readouterr().out
    assert "steps 1:4, traced in" in printed
    assert "predictor backward" in printed


def test_a_tasks_time_is_of_the_operation_that_started_it():
    one, two = ("jit_step", 1, "dot.1"), ("jit_step", 1, "add.2")
    giver = [(0, 10, one), (1, 1, ("start", 7)), (12, 13, None), (12, 12, ("start", 9))]
    # Task 9 was started by the executor, task 8 by a task.
    helper = [(2, 9, 7), (3, 3, ("start", 8)), (5, 6, two), (20, 30, 9)]
    third = [(4, 8, 8)]
    assert profile._own_times([giver, helper, third]) == {one: 10 + (7 - 1) + 4, two: 1}


OP_NAMES = {  # as TEXT abbreviates them
    "FUSED": "jit(step)/jvp(NTM.trajectory)/NTM.predict/predictor/dot",
    "SOFTMAX": "jit(step)/transpose(jvp(NTM.pair))/transporter/layers/attention/vmap()/exp",
    "NORM": "jit(step)/jvp(Predictor)/layers/attention/query_norm/mul",
    "MOVED": "jit(step)/optimizer/transpose",
    "REST": "jit(step)/jvp()/add",
}
TEXT = """HloModule jit_step, is_scheduled=true

%fused (a: f32[2,2]) -> f32[2,2] {
  %a = f32[2,2]{1,0} parameter(0)
  %t = f32[2,2]{1,0} transpose(%a), dimensions={1,0}
  ROOT %d = f32[2,2]{1,0} dot(%t, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%moved (b: f32[2,2]) -> f32[2,2] {
  %b = f32[2,2]{1,0} parameter(0)
  ROOT %u = f32[2,2]{1,0} transpose(%b), dimensions={1,0}, metadata={op_name="MOVED"}
}

ENTRY %main (p: f32[2,2]) -> f32[2,2] {
  %p = f32[2,2]{1,0} parameter(0)
  %f.1 = f32[2,2]{1,0} fusion(%p), kind=kOutput, calls=%fused, metadata={op_name="FUSED"}
  %m.2 = f32[2,2]{1,0} fusion(%f.1), kind=kLoop, calls=%moved
  %e.3 = f32[2,2]{1,0} exponential(%m.2), metadata={op_name="SOFTMAX"}
  %q.4 = f32[2,2]{1,0} multiply(%e.3, %e.3), metadata={op_name="NORM"}
  ROOT %r.5 = f32[2,2] all-reduce(%q.4), replica_groups={{0}}, metadata={op_name="REST"}
}
"""
for _short, _name in OP_NAMES.items():
    TEXT = TEXT.replace(f'"{_short}"', f'"{_name}"')


def test_operations_are_sorted_by_kind_and_module():
    found = profile.operations(TEXT)
    assert {name: found[name][:2] for name in ("f.1", "m.2", "e.3", "q.4", "r.5")} == {
        "f.1": ("predictor forward", "products"), "m.2": ("optimizer", "copies"),
        "e.3": ("transporter backward", "attention"), "q.4": ("predictor forward", "elementwise"),
        "r.5": ("rest forward", "collectives")}


ACCELERATED = """HloModule jit_step

%mixed (a: f32[2,2]) -> f32[8,2] {
  %a = f32[2,2]{1,0} parameter(0)
  %d = f32[2,2]{1,0} dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %g = f32[8,2]{1,0} all-gather(%d), channel_id=3, replica_groups=[1,4]<=[4], dimensions={0}
}

%called (p: f32[2,2]) -> f32[8,2] {
  %p = f32[2,2]{1,0} parameter(0)
  ROOT %h = f32[8,2]{1,0} all-gather(%p), channel_id=4, replica_groups=[1,4]<=[4], dimensions={0}
}

ENTRY %main (x: f32[2,2]) -> f32[8,2] {
  %x = f32[2,2]{1,0} parameter(0)
  %mixed.1 = f32[8,2]{1,0} fusion(%x), kind=kOutput, calls=%mixed
  %start.2 = ((f32[2,2]{1,0}), f32[8,2]{1,0}) call-start(%x), to_apply=%called
  %cudnn.3 = f32[2,2]{1,0} custom-call(%x), custom_call_target="__cudnn$fmhaSoftmax", metadata={op_name="/attention/dot_product_attention_fwd_wrapper"}
  %splash.4 = f32[2,2]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", metadata={op_name="/attention/convert_element_type"}
  %cublas.5 = f32[2,2]{1,0} custom-call(%x, %x), custom_call_target="__cublas$gemm"
  ROOT %done.6 = f32[8,2]{1,0} call-done(%start.2)
}
"""  # noqa: E501


def test_an_accelerators_operations_are_sorted_by_kind():
    found = profile.operations(ACCELERATED)
    assert {name: kind for name, (_, kind, _) in found.items() if name[-1].isdigit()} == {
        "mixed.1": "products", "start.2": "collectives", "cudnn.3": "attention",
        "splash.4": "attention", "cublas.5": "products", "done.6": "collectives"}


def test_an_accelerators_operations_are_found_by_their_names():
    """The plane is as documented for TPUs; no trace of one was available."""
    events = "".join(f"events {{ metadata_id: {i} offset_ps: {at}000 duration_ps: {lasts}000 }}"
                     for i, at, lasts in ((1, 0, 60), (2, 70, 30)))
    names = "".join(
        f'event_metadata {{ key: {i} value {{ id: {i} name: "{name}" }} }}' for i, name in (
            (1, "%f.1 = f32[2,2]{1,0} fusion(%p)"), (2, "%e.3 = f32[2,2]{1,0} exponential(%m.2)")))
    lines = f'lines {{ id: 1 name: "XLA Ops" {events} }}'
    planes = f'planes {{ id: 1 name: "/device:TPU:0" {lines} {names} }}'
    data = jax.profiler.ProfileData
    trace = data.from_serialized_xspace(data.text_proto_to_serialized_xspace(planes))
    found = profile.summarize(trace, [TEXT])
    assert found["by_module"] == {
        "transporter backward": {"attention": pytest.approx(0.3)},
        "predictor forward": {"products": pytest.approx(0.6)}}
    assert found["idle"] == pytest.approx(0.1)
    assert found["devices"] == 1
    assert found["seconds"] == pytest.approx(100e-9)
