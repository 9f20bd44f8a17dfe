"""The counts of a compiled program's text: loops, products, collectives, memory traffic."""

import pytest

from ntm_jax.tools.pods import hlo
from ntm_jax.tools.pods.hlo import text as hlo_text
from ntm_jax.tools.pods.hlo.arrays import largest, short


@pytest.mark.parametrize(("bound", "step", "trips"), [(8, 2, 4), (9, 2, 5), (8, 1, 8)])
def test_the_trips_of_a_loop_that_the_compiler_unrolled_are_read(bound, step, trips):
    text = f"""HloModule m

%body (p: (f32[8,8], u32[])) -> (f32[8,8], u32[]) {{
  %p = (f32[8,8], u32[]) parameter(0)
  %x = f32[8,8] get-tuple-element(%p), index=0
  %i = u32[] get-tuple-element(%p), index=1
  %two = u32[] constant({step})
  %next = u32[] add(%i, %two)
  %y = f32[8,8] dot(%x, %x), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  ROOT %t = (f32[8,8], u32[]) tuple(%y, %next)
}}

%condition (q: (f32[8,8], u32[])) -> pred[] {{
  %q = (f32[8,8], u32[]) parameter(0)
  %j = u32[] get-tuple-element(%q), index=1
  %end = u32[] constant({bound})
  ROOT %less = pred[] compare(%j, %end), direction=LT
}}

ENTRY %main (a: (f32[8,8], u32[])) -> (f32[8,8], u32[]) {{
  %a = (f32[8,8], u32[]) parameter(0)
  ROOT %w = (f32[8,8], u32[]) while(%a), condition=%condition, body=%body
}}
"""
    work = hlo.count(text, 1)
    assert (work.flops, work.unknown) == (trips * 2 * 8**3, [])
    copied = text.replace("%next = u32[] add", "%sum = u32[] add").replace(
        "  %y =", "  %next = u32[] copy(%sum)\n  %y =")
    assert hlo.count(copied, 1).flops == work.flops
    unknown = text.replace("add(%i, %two)", "multiply(%i, %two)")
    assert hlo.count(unknown, 1).unknown == ["w"]
    named = unknown.replace("body=%body", 'body=%body, metadata={op_name="jit(f)/while"}')
    assert hlo.count(named, 1).unknown == ["jit(f)/while"]


def library_call(target: str, operands: str, result: str, backend_config: str) -> str:
    return f"""
ENTRY %main (q: bf16[2,256,4,64], k: bf16[2,128,2,64]) -> bf16[2,4,256,64] {{
  %q = bf16[2,256,4,64]{{3,2,1,0}} parameter(0)
  %k = bf16[2,128,2,64]{{3,2,1,0}} parameter(1)
  %m = f32[32,48]{{1,0}} parameter(2)
  %n = f32[48,64]{{1,0}} parameter(3)
  ROOT %c = ({result}, s8[64]{{0}}) custom-call({operands}), custom_call_target="{target}", backend_config={{{backend_config}}}
}}
"""  # noqa: E501


@pytest.mark.parametrize(("target", "products"), [
    ("__cudnn$fmhaSoftmax", 2), ("__cudnn$fmhaScaleBiasSoftmaxBackward", 5)])
def test_attention_of_cudnn_counts(target, products):
    shape = '"intermediate_tensor_shape":{"dimensions":["2","4","256","128"],"tuple_shapes":[]}'
    text = library_call(target, "%q, %k, %k", "bf16[2,4,256,64]{3,1,2,0}", shape)
    assert hlo.count(text, 1).flops == products * 2 * 2 * 4 * 256 * 128 * 64


def test_products_of_cublas_count():
    config = '"gemm_backend_config": {"dot_dimension_numbers": {"lhs_contracting_dimensions": ["1"]'
    text = library_call("__cublas$lt$matmul", "%m, %n", "f32[32,64]{1,0}", config + "}}")
    assert hlo.count(text, 1).flops == 2 * 32 * 48 * 64


GROUPS = {
    "replica_groups={{0,1},{2,3}}, to": [[0, 1], [2, 3]],
    "replica_groups=[2,2]<=[4], to": [[0, 1], [2, 3]],
    "replica_groups=[2,2]<=[2,2]T(1,0), to": [[0, 2], [1, 3]],
    "replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_0'}, to": [[0, 2], [1, 3]],
    "replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}, to": [[0, 2], [1, 3]],
    "replica_groups={}, to": [[0, 1, 2, 3]],
    "replica_groups=mesh['a'=4] {'a':(1)2}, to": [[0, 2], [1, 3]],
    "replica_groups=mesh['a'=1,'b'=4] {'a','b':(2)2}, to": [[0, 1], [2, 3]],
}


@pytest.mark.parametrize("text", GROUPS)
def test_groups_are_read(text):
    assert hlo_text.replica_groups(text, 4).tolist() == GROUPS[text]


ALL_REDUCE_SCATTER = """
%scatter (input: f32[16,8]) -> f32[4,8] {
  %input = f32[16,8]{1,0} parameter(0)
  %all-reduce.1 = f32[16,8]{1,0} all-reduce(%input), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
  %partition-id = u32[] partition-id()
  %zero = u32[] constant(0)
  ROOT %part = f32[4,8]{1,0} dynamic-slice(%all-reduce.1, %partition-id, %zero), dynamic_slice_sizes={4,8}
}

ENTRY %main (x: f32[16,8]) -> f32[4,8] {
  %x = f32[16,8]{1,0} parameter(0)
  ROOT %fusion = f32[4,8]{1,0} fusion(%x), kind=kCustom, calls=%scatter
}
"""  # noqa: E501


def test_a_tpus_reduce_scatter_is_known():
    sent = hlo.count(ALL_REDUCE_SCATTER, 4).sent
    assert sent == {("reduce-scatter", "ici"): 16 * 8 * 4 * 3 / 4}
    sent = hlo.count(ALL_REDUCE_SCATTER, 4, slices=2).sent
    # halved within a slice, then between the two
    assert sent == {("reduce-scatter", "ici"): 16 * 8 * 4 / 2,
                    ("reduce-scatter", "dcn"): 16 * 8 * 4 / 2 / 2}


def test_a_collective_in_three_parts_counts_once():
    part = """
%NAME (p: f32[4,8]) -> f32[16,8] {
  %p = f32[4,8]{1,0} parameter(0)
  ROOT %all-gather = f32[16,8]{1,0} all-gather(%p), channel_id=3, replica_groups=[1,4]<=[4], dimensions={0}
}
"""  # noqa: E501
    text = "".join(part.replace("NAME", name) for name in ("start", "middle", "end")) + """
ENTRY %main (x: f32[4,8]) -> f32[16,8] {
  %x = f32[4,8]{1,0} parameter(0)
  %a = f32[16,8]{1,0} fusion(%x), kind=kCustom, calls=%start
  %b = f32[16,8]{1,0} fusion(%x), kind=kLoop, calls=%middle
  ROOT %c = f32[16,8]{1,0} fusion(%x), kind=kCustom, calls=%end
}
"""
    work = hlo.count(text, 4)
    assert work.sent == {("all-gather", "ici"): 16 * 8 * 4 * 3 / 4}
    assert work.overlapped == {"ici": 16 * 8 * 4 * 3 / 4}


ON_SPARSE_CORES = """
%called (p: f32[4,8]) -> f32[16,8] {
  %p = f32[4,8]{1,0} parameter(0)
  ROOT %all-gather = f32[16,8]{1,0} all-gather(%p), channel_id=3, replica_groups=[1,4]<=[4], dimensions={0}
}, execution_thread="sparsecore"

ENTRY %main (x: f32[4,8]) -> f32[16,8] {
  %x = f32[4,8]{1,0} parameter(0)
  %gather.call-start = ((f32[4,8]{1,0}), f32[16,8]{1,0}, u32[]{:S(8)}) call-start(%x), async_execution_thread="sparsecore", to_apply=%called
  ROOT %gather.call-done = f32[16,8]{1,0} call-done(%gather.call-start)
}
"""  # noqa: E501


def test_collectives_of_sparse_cores_count():
    work = hlo.count(ON_SPARSE_CORES, 4)
    assert work.sent == {("all-gather", "ici"): 16 * 8 * 4 * 3 / 4}
    assert work.memory == (4 + 16) * 8 * 4  # read and written once


@pytest.mark.parametrize(("attributes", "near", "far"), [
    ("collective-permute(%x), source_target_pairs={{0,1},{1,0},{2,3},{3,2}}", 1, 0),
    ("collective-permute(%x), source_target_pairs={{0,1},{1,2},{2,3},{3,0}}", 1 / 2, 1 / 2),
    ("all-to-all(%x), replica_groups={{0,1,2,3}}, dimensions={0}", 1 / 4, 1 / 2),
    ("all-to-all(%x), replica_groups={{0,1},{2,3}}, dimensions={0}", 1 / 2, 0)])
def test_what_crosses_between_domains_is_apart(attributes, near, far):
    kind, text = attributes.split("(")[0], f"""
ENTRY %main (x: f32[4,8]) -> f32[4,8] {{
  %x = f32[4,8]{{1,0}} parameter(0)
  ROOT %moved = f32[4,8]{{1,0}} {attributes}
}}
"""
    sent = hlo.count(text, 4, 2).sent
    assert sent[kind, "ici"] == near * 4 * 8 * 4
    assert sent.get((kind, "dcn"), 0) == far * 4 * 8 * 4


IN_PLACE = """
%hand_on (a: f32[24,8,8]) -> f32[24,8,8] {
  %a = f32[24,8,8]{2,1,0} parameter(0)
  ROOT %copy = f32[24,8,8]{2,1,0} copy(%a)
}

%update (b: f32[24,8,8], c: f32[1,8,8], i: s32[]) -> f32[24,8,8] {
  %b = f32[24,8,8]{2,1,0} parameter(0)
  %c = f32[1,8,8]{2,1,0} parameter(1)
  %i = s32[] parameter(2)
  %same = f32[24,8,8]{2,1,0} fusion(%b), kind=kLoop, calls=%hand_on
  ROOT %updated = f32[24,8,8]{2,1,0} dynamic-update-slice(%same, %c, %i, %i, %i)
}

ENTRY %main (x: f32[24,8,8], y: f32[1,8,8], n: s32[]) -> f32[24,8,8] {
  %x = f32[24,8,8]{2,1,0} parameter(0)
  %y = f32[1,8,8]{2,1,0} parameter(1)
  %n = s32[]{:S(2)} parameter(2)
  %slice-start = ((f32[24,8,8]{2,1,0}), f32[2,8,8]{2,1,0:S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:2], [0:8], [0:8]}
  %slice-done = f32[2,8,8]{2,1,0:S(1)} slice-done(%slice-start)
  ROOT %new = f32[24,8,8]{2,1,0} fusion(%x, %y, %n), kind=kLoop, calls=%update
}
"""  # noqa: E501


def test_what_is_sliced_or_updated_counts_by_the_slice():
    assert hlo.count(IN_PLACE, 1).memory == (2 + 1 + 1) * 8 * 8 * 4  # two read; one read, written


def sends(number: int, kind: str) -> str:
    return (f"  %send.{number} = (f32[8,64]{{1,0:T(8,128)}}, u32[], token[]) send(%p, %token), "
            f"channel_id={number}, is_host_transfer=true, "
            f'frontend_attributes={{_xla_megascale_transfer_type="{kind}"}}')


SENDS = f"""
ENTRY %main (p: f32[8,64]) -> f32[8,64] {{
  ROOT %p = f32[8,64]{{1,0:T(8,128)}} parameter(0)
  %token = token[] after-all()
{sends(1, "ALL_GATHER")}
{sends(2, "ALL_REDUCE")}
}}
"""


def test_what_slices_send_each_other_is_counted():
    sent = hlo.count(SENDS, 8, 4).sent
    assert sent == {("all-gather", "dcn"): 3 * 8 * 64 * 4,
                    ("all-reduce", "dcn"): 2 * 3 / 4 * 8 * 64 * 4}


PRODUCTS = """
%fused (a: f32[8,16], b: f32[16,4]) -> f32[8,4] {
  %a = f32[8,16]{1,0} parameter(0)
  %b = f32[16,4]{1,0} parameter(1)
  ROOT %d = f32[8,4]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}, operand_precision={highest,highest}, metadata={op_name="jit(f)/transporter/blocks_0/dot_general"}
}

ENTRY %main (x: f32[8,16], y: f32[16,4], z: bf16[16,4]) -> f32[8,4] {
  %x = f32[8,16]{1,0} parameter(0), metadata={op_name="params"}
  %y = f32[16,4]{1,0} parameter(1)
  %z = bf16[16,4]{1,0} parameter(2)
  %w = bf16[8,16]{1,0} convert(%x)
  %one = f32[8,4]{1,0} fusion(%x, %y), kind=kOutput, calls=%fused
  %two = f32[8,4]{1,0} dot(%x, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %three = f32[8,4]{1,0} dot(%w, %z), lhs_contracting_dims={1}, rhs_contracting_dims={0}, operand_precision={highest,highest}
  %four = (f32[8,4]{1,0}, s8[64]{0}) custom-call(%x, %y), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]},"precision_config":{"operand_precision":["HIGHEST","HIGHEST"],"algorithm":"ALG_UNSET"}}}
  ROOT %sum = f32[8,4]{1,0} add(%one, %two)
}
"""  # noqa: E501


def test_products_count_by_part_and_precision():
    one = 2 * 8 * 16 * 4
    work = hlo.count(PRODUCTS, 1)
    assert work.products == {("transporter", "highest"): one, ("other", "f32"): one,
                             ("other", "bf16"): one, ("other", "highest"): one}
    assert work.flops == 4 * one


def test_the_largest_arrays_are_those_in_memory():
    found = largest(PRODUCTS, 2)
    assert found[2] == {"bytes": 8 * 16 * 4, "shape": "f32[8,16]", "place": "params",
                        "argument": True}
    assert [(a["bytes"], a["shape"], a["place"], a["argument"]) for a in found] == [
        (256, "bf16[8,16]", "w", False), (128, "f32[8,4]", "one", False),
        (512, "f32[8,16]", "params", True), (256, "f32[16,4]", "y", True)]
    assert "d" not in {a["place"] for a in largest(PRODUCTS, 99)}  # inside a fusion
    assert short("jit(step)/while/body/closed_call/up/dot_general") == "up/dot_general"


BETWEEN = "  %other = f32[4,8]{1,0} add(%x, %x)"
GATHER = """
ENTRY %main (x: f32[4,8]) -> f32[16,8] {
  %x = f32[4,8]{1,0} parameter(0)
  %begin = (f32[4,8]{1,0}, f32[16,8]{1,0}) all-gather-start(%x), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}
BETWEEN
  ROOT %end = f32[16,8]{1,0} all-gather-done(%begin)
}
"""  # noqa: E501


@pytest.mark.parametrize(("text", "share"), [
    (GATHER.replace("BETWEEN", BETWEEN), 1),
    (GATHER.replace("BETWEEN", "  %same = f32[4,8]{1,0} bitcast(%x)"), 0),
    (ON_SPARSE_CORES, 0),
    (ON_SPARSE_CORES.replace("  ROOT %gather", BETWEEN + "\n  ROOT %gather"), 1),
    (ALL_REDUCE_SCATTER, 0)])
def test_what_overlaps_with_other_work_is_apart(text, share):
    work = hlo.count(text, 4)
    assert sum(work.overlapped.values()) == share * sum(work.sent.values())
    assert sum(work.sent.values()) == 16 * 8 * 4 * 3 / 4


def test_an_asynchronous_gather_reads_its_operand_and_writes_its_output():
    assert hlo.count(GATHER.replace("BETWEEN", ""), 4).memory == (4 + 16) * 8 * 4
