"""Where time goes, by hand, for the text of a program as NVIDIA's compiler prints it."""

import pytest

from revnet_jax.planning import by_part
from revnet_jax.planning.by_part import by_part as table
from revnet_jax.planning.chips import CHIPS

H200 = CHIPS["h200"]
TEXT = """HloModule jit_step, is_scheduled=true

%added (p: bf16[4096,1024], q: bf16[4096,1024]) -> bf16[4096,1024] {
  %p = bf16[4096,1024]{1,0} parameter(0)
  %q = bf16[4096,1024]{1,0} parameter(1)
  ROOT %a = bf16[4096,1024]{1,0} add(%p, %q)
}

%triton (l: bf16[4096,1024], r: bf16[1024,1001]) -> f32[4096,1001] {
  %l = bf16[4096,1024]{1,0} parameter(0)
  %r = bf16[1024,1001]{1,0} parameter(1)
  ROOT %d = f32[4096,1001]{1,0} dot(%l, %r), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (arg: (s32[], bf16[4096,1024], bf16[1024,1024])) -> (s32[], bf16[4096,1024]) {
  %arg = (s32[], bf16[4096,1024]{1,0}, bf16[1024,1024]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %x = bf16[4096,1024]{1,0} get-tuple-element(%arg), index=1
  %w = bf16[1024,1024]{1,0} get-tuple-element(%arg), index=2
  %y = (bf16[4096,1024]{1,0}, s8[64]{0}) custom-call(%x, %w), \
custom_call_target="__cublas$lt$matmul", \
metadata={op_name="jit(step)/jvp()/while/body/forward/isolated/dot"}, \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
  %z = bf16[4096,1024]{1,0} get-tuple-element(%y), index=0
  %s = bf16[4096,1024]{1,0} fusion(%x, %z), kind=kLoop, calls=%added, \
metadata={op_name="jit(step)/jvp()/while/body/forward/add"}
  %moved = bf16[4096,1024]{0,1} copy(%s)
  ROOT %out = (s32[], bf16[4096,1024]{1,0}, bf16[1024,1024]{1,0}) tuple(%i, %moved, %w)
}

%condition (arg.1: (s32[], bf16[4096,1024])) -> pred[] {
  %arg.1 = (s32[], bf16[4096,1024]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%arg.1), index=0
  %n = s32[] constant(12)
  ROOT %lt = pred[] compare(%j, %n), direction=LT
}

ENTRY %main (x0: bf16[4096,1024]) -> f32[4096,1001] {
  %x0 = bf16[4096,1024]{1,0} parameter(0)
  %w0 = bf16[1024,1024]{1,0} parameter(1)
  %v0 = bf16[1024,1001]{1,0} parameter(2)
  %q0 = bf16[2,512,4,64]{3,2,1,0} parameter(3)
  %image = bf16[8,56,56,64]{3,2,1,0} parameter(4)
  %filter = bf16[32,3,3,64]{3,2,1,0} parameter(5)
  %t = (s32[], bf16[4096,1024]{1,0}, bf16[1024,1024]{1,0}) tuple(%zero, %x0, %w0)
  %loop = (s32[], bf16[4096,1024]{1,0}) while(%t), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"12"}}
  %last = bf16[4096,1024]{1,0} get-tuple-element(%loop), index=1
  %zero = s32[] constant(0)
  %seen = (bf16[2,4,512,64]{3,1,2,0}, u8[256]{0}) custom-call(%q0, %q0, %q0), \
custom_call_target="__cudnn$fmhaSoftmax", metadata={op_name="jit(step)/jvp(stem)/attention"}, \
backend_config={"mask_type":"CAUSAL"}
  %conv = (bf16[8,56,56,32]{3,2,1,0}, u8[0]{0}) custom-call(%image, %filter), \
window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, \
custom_call_target="__cudnn$convForward", metadata={op_name="jit(step)/jvp(stem)/conv"}
  ROOT %logits = f32[4096,1001]{1,0} fusion(%last, %v0), kind=kCustom, calls=%triton, \
metadata={op_name="jit(step)/jvp(head)/dot_general"}
}
"""
TEXT = TEXT.replace("\\\n", "")
STREAM = 2 * 4096 * 1024
PRODUCT = 2 * 4096 * 1024 * 1024
ATTENTION = 2 * 2 * (2 * 4 * 512 * 512 * 64) // 2
CONVOLUTION = 2 * (8 * 56 * 56 * 32) * (3 * 3 * 64)


def test_parts_have_the_work_of_all_rounds_of_their_loops():
    rows = {row["part"]: row for row in table(TEXT, H200)}
    assert rows.keys() == {"forward", "head", "stem", "all"}
    forward, head, stem = (rows[part] for part in ("forward", "head", "stem"))
    assert forward["kernels"] == 3 * 12  # with the copy, which says nothing of where it is from
    assert forward["flops"] == 12 * PRODUCT
    assert forward["hbm_bytes"] == 12 * (2 * STREAM + 2 * 1024 * 1024 + 3 * STREAM + 2 * STREAM)
    assert head["flops"] == 2 * 4096 * 1024 * 1001
    assert stem["flops"] == ATTENTION + CONVOLUTION
    narrow = TEXT.replace('"CAUSAL"', '"CAUSAL","sliding_window_length": 64')
    (stem,) = (row for row in table(narrow, H200) if row["part"] == "stem")
    assert stem["flops"] == ATTENTION * (64 * 512 - 64**2 // 2) // (512**2 // 2) + CONVOLUTION
    for key in ("ms", "flops", "hbm_bytes", "kernels"):
        assert rows["all"][key] == pytest.approx(sum(rows[p][key] for p in rows if p != "all"))


def test_what_is_sent_is_no_kernel():
    text = TEXT.replace("HloModule jit_step,", "HloModule jit_step, num_partitions=4,")
    copy = "  %moved = bf16[4096,1024]{0,1} copy(%s)"
    assert copy in text
    sent = "  %sum = bf16[4096,1024]{1,0} all-reduce(%s), replica_groups={{0,1,2,3}}, to_apply=%add"
    assert table(text.replace(copy, f"{sent}\n{copy}"), H200) == table(TEXT, H200)


def test_a_kernel_takes_as_long_as_its_arithmetic_or_its_memory():
    found = {kernel.name: kernel for kernel in by_part.kernels(TEXT, H200)}
    products, memory = by_part.PRODUCTS["bf16"] * H200.peak_flops, by_part.MEMORY * 4.8e12
    assert found["y"].seconds == pytest.approx(PRODUCT / products)
    assert found["s"].seconds == pytest.approx(3 * STREAM / memory)
    assert found["seen"].seconds == by_part.LAUNCH  # it is as small as that
    misaligned = 2 * 4096 * 1024 * 1001 / (by_part.MISALIGNED * products)
    assert found["logits"].seconds == pytest.approx(misaligned)


def test_of_a_gradient_of_a_convolution_the_arithmetic_is_that_of_the_convolution():
    flops = lambda text: next(k.flops for k in by_part.kernels(text, H200) if k.name == "conv")
    whole = "(bf16[8,56,56,32]{3,2,1,0}, u8[0]{0}) custom-call(%image, %filter)"
    of_filter = "(bf16[32,3,3,64]{3,2,1,0}, u8[0]{0}) custom-call(%image, %dy)"
    of_input = "(bf16[8,56,56,64]{3,2,1,0}, u8[0]{0}) custom-call(%dy, %filter)"
    dy = "  %dy = bf16[8,56,56,32]{3,2,1,0} parameter(6)\n  %conv ="
    text = TEXT.replace("  %conv =", dy)
    backward = lambda new, name: text.replace(whole, new).replace("convForward", name)
    assert flops(text) == CONVOLUTION
    assert flops(backward(of_filter, "convBackwardFilter")) == CONVOLUTION
    assert flops(backward(of_input, "convBackwardInput")) == CONVOLUTION
