"""The counts of a compiled program's text: loops, products, collectives, memory traffic."""

import pytest

from ntm_jax.tools.pods import hlo
from ntm_jax.tools.pods.hlo import text as hlo_text
from ntm_jax.tools.pods.hlo.arrays import largest


def module(entry: str, **called: str) -> str:
    """A program's text: the instructions of its entry computation, and of those that it calls."""
    others = [f"%{name} () -> f32[] {{{body}\n}}" for name, body in called.items()]
    return "\n".join([*others, f"ENTRY %main () -> f32[] {{{entry}\n}}"])


@pytest.mark.parametrize(("bound", "step", "trips"), [(9, 2, 5), (8, 1, 8)])
def test_the_trips_of_a_loop_that_the_compiler_unrolled_are_read(bound, step, trips):
    text = module("""
  %a = (f32[8,8], u32[]) parameter(0)
  ROOT %w = (f32[8,8], u32[]) while(%a), condition=%condition, body=%body""", condition=f"""
  %q = (f32[8,8], u32[]) parameter(0)
  %j = u32[] get-tuple-element(%q), index=1
  %end = u32[] constant({bound})
  ROOT %less = pred[] compare(%j, %end), direction=LT""", body=f"""
  %p = (f32[8,8], u32[]) parameter(0)
  %x = f32[8,8] get-tuple-element(%p), index=0
  %i = u32[] get-tuple-element(%p), index=1
  %two = u32[] constant({step})
  %next = u32[] add(%i, %two)
  %y = f32[8,8] dot(%x, %x), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  ROOT %t = (f32[8,8], u32[]) tuple(%y, %next)""")
    work = hlo.count(text, 1)
    assert (work.flops, work.unknown) == (trips * 2 * 8**3, [])
    product = 3 * 8 * 8 * 4, ((("other", "f32"), 2 * 8**3),)
    assert work.kernels == {product: trips, (3 * 4, ()): trips}  # the other one is the addition
    unknown = text.replace("add(%i, %two)", "multiply(%i, %two)")
    assert hlo.count(unknown, 1).unknown == ["w"]


ATTENTION = ("bf16[2,4,256,64]{3,1,2,0}", "%q, %k, %k",
             '"intermediate_tensor_shape":{"dimensions":["2","4","256","128"],"tuple_shapes":[]}')
MATMUL = ("f32[32,64]{1,0}", "%m, %n",
          '"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}')


@pytest.mark.parametrize(("target", "result", "operands", "config", "flops"), [
    ("__cudnn$fmhaSoftmax", *ATTENTION, 2 * 2 * 2 * 4 * 256 * 128 * 64),
    ("__cudnn$fmhaScaleBiasSoftmaxBackward", *ATTENTION, 5 * 2 * 2 * 4 * 256 * 128 * 64),
    ("__cublas$lt$matmul", *MATMUL, 2 * 32 * 48 * 64)])
def test_products_of_libraries_count(target, result, operands, config, flops):
    call = f'custom_call_target="{target}", backend_config={{{config}}}'
    text = module(f"""
  %q = bf16[2,256,4,64]{{3,2,1,0}} parameter(0)
  %k = bf16[2,128,2,64]{{3,2,1,0}} parameter(1)
  %m = f32[32,48]{{1,0}} parameter(2)
  %n = f32[48,64]{{1,0}} parameter(3)
  ROOT %c = ({result}, s8[64]{{0}}) custom-call({operands}), {call}""")
    assert hlo.count(text, 1).flops == flops


GROUPS = {
    "replica_groups={{0,1},{2,3}}, to": [[0, 1], [2, 3]],
    "replica_groups=[2,2]<=[4], to": [[0, 1], [2, 3]],
    "replica_groups=[2,2]<=[2,2]T(1,0), to": [[0, 2], [1, 3]],
    "replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}, to": [[0, 2], [1, 3]],
    "replica_groups={}, to": [[0, 1, 2, 3]],
    "replica_groups=mesh['a'=1,'b'=4] {'a','b':(2)2}, to": [[0, 1], [2, 3]],
}


@pytest.mark.parametrize("text", GROUPS)
def test_groups_are_read(text):
    assert hlo_text.replica_groups(text, 4).tolist() == GROUPS[text]


GATHERED = "channel_id=3, replica_groups=[1,4]<=[4], dimensions={0}"
ALL_GATHER = f"""
  %p = f32[4,8]{{1,0}} parameter(0)
  ROOT %all-gather = f32[16,8]{{1,0}} all-gather(%p), {GATHERED}"""
BETWEEN = "%other = f32[4,8]{1,0} add(%x, %x)"


def asynchronous(between: str) -> str:
    """A gather in two instructions, and what is between them."""
    return module(f"""
  %x = f32[4,8]{{1,0}} parameter(0)
  %begin = (f32[4,8]{{1,0}}, f32[16,8]{{1,0}}) all-gather-start(%x), {GATHERED}
  {between}
  ROOT %end = f32[16,8]{{1,0}} all-gather-done(%begin)""")


def on_sparse_cores(between: str) -> str:
    """A gather by a TPU's sparse cores, and what is done meanwhile."""
    return module(f"""
  %x = f32[4,8]{{1,0}} parameter(0)
  %s = ((f32[4,8]{{1,0}}), f32[16,8]{{1,0}}, u32[]{{:S(8)}}) call-start(%x), to_apply=%called
  {between}
  ROOT %d = f32[16,8]{{1,0}} call-done(%s)""", called=ALL_GATHER)


REDUCE_SCATTER = module("""
  %x = f32[16,8]{1,0} parameter(0)
  ROOT %fusion = f32[4,8]{1,0} fusion(%x), kind=kCustom, calls=%scatter""", scatter="""
  %input = f32[16,8]{1,0} parameter(0)
  %r = f32[16,8]{1,0} all-reduce(%input), replica_groups={{0,1,2,3}}, to_apply=%add
  %partition-id = u32[] partition-id()
  %zero = u32[] constant(0)
  ROOT %part = f32[4,8]{1,0} dynamic-slice(%r, %partition-id, %zero), dynamic_slice_sizes={4,8}""")
IN_THREE_PARTS = module("""
  %x = f32[4,8]{1,0} parameter(0)
  %a = f32[16,8]{1,0} fusion(%x), kind=kCustom, calls=%start
  %b = f32[16,8]{1,0} fusion(%x), kind=kLoop, calls=%middle
  ROOT %c = f32[16,8]{1,0} fusion(%x), kind=kCustom, calls=%end
""", start=ALL_GATHER, middle=ALL_GATHER, end=ALL_GATHER)
BYTES = 16 * 8 * 4  # of the array that is gathered or reduced


@pytest.mark.parametrize(("text", "kind", "overlapped"), [
    (asynchronous(BETWEEN), "all-gather", 1),
    (asynchronous("%same = f32[4,8]{1,0} bitcast(%x)"), "all-gather", 0),
    (on_sparse_cores(BETWEEN), "all-gather", 1),
    (IN_THREE_PARTS, "all-gather", 1),
    (REDUCE_SCATTER, "reduce-scatter", 0)])
def test_a_collective_counts_once_and_what_overlaps_with_other_work_is_apart(
        text, kind, overlapped):
    work = hlo.count(text, 4)
    assert work.sent == {(kind, "ici"): BYTES * 3 / 4}
    assert sum(work.overlapped.values()) == overlapped * BYTES * 3 / 4


def test_a_reduce_scatter_halves_within_a_slice_and_then_between_two():
    sent = hlo.count(REDUCE_SCATTER, 4, slices=2).sent
    assert sent == {("reduce-scatter", "ici"): BYTES / 2, ("reduce-scatter", "dcn"): BYTES / 4}


@pytest.mark.parametrize(("attributes", "near", "far"), [
    ("collective-permute(%x), source_target_pairs={{0,1},{1,0},{2,3},{3,2}}", 1, 0),
    ("collective-permute(%x), source_target_pairs={{0,1},{1,2},{2,3},{3,0}}", 1 / 2, 1 / 2),
    ("all-to-all(%x), replica_groups={{0,1,2,3}}, dimensions={0}", 1 / 4, 1 / 2),
    ("all-to-all(%x), replica_groups={{0,1},{2,3}}, dimensions={0}", 1 / 2, 0)])
def test_what_crosses_between_domains_is_apart(attributes, near, far):
    kind, text = attributes.split("(")[0], module(f"""
  %x = f32[4,8]{{1,0}} parameter(0)
  ROOT %moved = f32[4,8]{{1,0}} {attributes}""")
    sent = hlo.count(text, 4, 2).sent
    assert sent[kind, "ici"] == near * 4 * 8 * 4
    assert sent.get((kind, "dcn"), 0) == far * 4 * 8 * 4


def sends(number: int, kind: str) -> str:
    return (f"  %send.{number} = (f32[8,64]{{1,0:T(8,128)}}, u32[], token[]) send(%p, %token), "
            f"channel_id={number}, is_host_transfer=true, "
            f'frontend_attributes={{_xla_megascale_transfer_type="{kind}"}}')


def test_what_slices_send_each_other_is_counted():
    sent = hlo.count(module(f"""
  ROOT %p = f32[8,64]{{1,0:T(8,128)}} parameter(0)
  %token = token[] after-all()
{sends(1, "ALL_GATHER")}
{sends(2, "ALL_REDUCE")}"""), 8, 4).sent
    assert sent == {("all-gather", "dcn"): 3 * 8 * 64 * 4,
                    ("all-reduce", "dcn"): 2 * 3 / 4 * 8 * 64 * 4}


IN_PLACE = module("""
  %x = f32[24,8,8]{2,1,0} parameter(0)
  %y = f32[1,8,8]{2,1,0} parameter(1)
  %n = s32[]{:S(2)} parameter(2)
  %start = ((f32[24,8,8]), f32[2,8,8]{2,1,0:S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:2]}
  %done = f32[2,8,8]{2,1,0:S(1)} slice-done(%start)
  ROOT %new = f32[24,8,8]{2,1,0} fusion(%x, %y, %n), kind=kLoop, calls=%update""", hand_on="""
  %a = f32[24,8,8]{2,1,0} parameter(0)
  ROOT %copy = f32[24,8,8]{2,1,0} copy(%a)""", update="""
  %b = f32[24,8,8]{2,1,0} parameter(0)
  %c = f32[1,8,8]{2,1,0} parameter(1)
  %i = s32[] parameter(2)
  %same = f32[24,8,8]{2,1,0} fusion(%b), kind=kLoop, calls=%hand_on
  ROOT %updated = f32[24,8,8]{2,1,0} dynamic-update-slice(%same, %c, %i, %i, %i)""")


@pytest.mark.parametrize(("text", "numbers"), [
    (IN_PLACE, (2 + 1 + 1) * 8 * 8),  # two slices read; one read, written
    (asynchronous(""), (4 + 16) * 8), (on_sparse_cores(""), (4 + 16) * 8)])
def test_memory_is_counted_by_what_is_read_and_written(text, numbers):
    assert hlo.count(text, 4).memory == numbers * 4


PRODUCT = "lhs_contracting_dims={1}, rhs_contracting_dims={0}"
EXACT = f"{PRODUCT}, operand_precision={{highest,highest}}"
PRODUCTS = module(f"""
  %x = f32[8,16]{{1,0}} parameter(0), metadata={{op_name="params"}}
  %y = f32[16,4]{{1,0}} parameter(1)
  %z = bf16[16,4]{{1,0}} parameter(2)
  %w = bf16[8,16]{{1,0}} convert(%x)
  %one = f32[8,4]{{1,0}} fusion(%x, %y), kind=kOutput, calls=%fused
  %two = f32[8,4]{{1,0}} dot(%x, %y), {PRODUCT}
  %three = f32[8,4]{{1,0}} dot(%w, %z), {EXACT}
  %four = (f32[8,4]{{1,0}}, s8[64]{{0}}) custom-call(%x, %y), custom_call_target="__cublas$gemm", backend_config={{"gemm_backend_config":{{"dot_dimension_numbers":{{"lhs_contracting_dimensions":["1"]}},"precision_config":{{"operand_precision":["HIGHEST","HIGHEST"],"algorithm":"ALG_UNSET"}}}}}}
  ROOT %sum = f32[8,4]{{1,0}} add(%one, %two)""", fused=f"""
  %a = f32[8,16]{{1,0}} parameter(0)
  %b = f32[16,4]{{1,0}} parameter(1)
  ROOT %d = f32[8,4]{{1,0}} dot(%a, %b), {EXACT}, metadata={{op_name="jit(f)/transporter/dot"}}
""")  # noqa: E501


def test_products_count_by_part_and_precision():
    one = 2 * 8 * 16 * 4
    work = hlo.count(PRODUCTS, 1)
    assert work.products == {("transporter", "highest"): one, ("other", "f32"): one,
                             ("other", "bf16"): one, ("other", "highest"): one}
    assert work.flops == 4 * one


def test_a_kernel_is_an_instruction_or_a_fusion_and_no_collective():
    x, y, out = 8 * 16 * 4, 16 * 4 * 4, 8 * 4 * 4  # bytes
    one = 2 * 8 * 16 * 4
    assert hlo.count(PRODUCTS, 1).kernels == {
        (x + x / 2, ()): 1, (3 * out, ()): 1,
        (x + y + out, ((("transporter", "highest"), one),)): 1,
        (x + y + out, ((("other", "f32"), one),)): 1,
        ((x + y) / 2 + out, ((("other", "bf16"), one),)): 1,
        (x + y + out + 64, ((("other", "highest"), one),)): 1}
    assert hlo.count(asynchronous(BETWEEN), 4).kernels == {(3 * 4 * 8 * 4, ()): 1}
    assert hlo.count(REDUCE_SCATTER, 4).kernels == {}


def test_the_largest_arrays_are_those_in_memory():
    found = largest(PRODUCTS, 2)
    assert [(a["bytes"], a["shape"], a["place"], a["argument"]) for a in found] == [
        (256, "bf16[8,16]", "w", False), (128, "f32[8,4]", "one", False),
        (512, "f32[8,16]", "params", True), (256, "f32[16,4]", "y", True)]
