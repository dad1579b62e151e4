"""Bytes moved by compiled programs, worked out by hand: of a TPU's text, and of real ones here."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from revnet_jax.programs import hlo
from revnet_jax.programs.traffic import traffic

MIB = 2**20

# What libtpu prints, shortened: a scan over 16 weights; the carry stays on the chip, S(1).
SCAN = """HloModule jit_g, is_scheduled=true, num_partitions=4

%fused (p0: f32[16,1024,1024], p1: s32[]) -> f32[1,1024,1024] {
  %p0 = f32[16,1024,1024]{2,1,0:T(8,128)} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  ROOT %slice = f32[1,1024,1024]{2,1,0:T(8,128)} dynamic-slice(%p0, %p1), dynamic_slice_sizes={1}
}

%update (q0: f32[16,4096,1024], q1: f32[4096,1024], q2: s32[]) -> f32[16,4096,1024] {
  %q0 = f32[16,4096,1024]{2,1,0:T(8,128)} parameter(0)
  %q1 = f32[4096,1024]{1,0:T(8,128)} parameter(1)
  %q2 = s32[]{:T(128)} parameter(2)
  %cast = f32[1,4096,1024]{2,1,0:T(8,128)} bitcast(%q1)
  ROOT %put = f32[16,4096,1024]{2,1,0:T(8,128)} dynamic-update-slice(%q0, %cast, %q2)
}

%body (arg: (s32[], f32[4096,1024], f32[16,4096,1024], /*index=3*/f32[16,1024,1024])) -> (s32[]) {
  %arg = (s32[]{:T(128)}, f32[4096,1024]{1,0:T(8,128)S(1)}, /*index=2*/f32[16]{0}) parameter(0)
  %i = s32[]{:T(128)S(6)} get-tuple-element(%arg), index=0
  %x = f32[4096,1024]{1,0:T(8,128)S(1)} get-tuple-element(%arg), index=1
  %xs = f32[16,4096,1024]{2,1,0:T(8,128)} get-tuple-element(%arg), index=2
  %ws = f32[16,1024,1024]{2,1,0:T(8,128)} get-tuple-element(%arg), index=3
  %w = f32[1,1024,1024]{2,1,0:T(8,128)S(1)} fusion(%ws, %i), kind=kLoop, calls=%fused
  %y = f32[4096,1024]{1,0:T(8,128)S(1)} custom-call(%x, %w), custom_call_target="product"
  %ys = f32[16,4096,1024]{2,1,0:T(8,128)} fusion(%xs, %y, %i), kind=kLoop, calls=%update
  %sum = f32[1024]{0:T(1024)} all-reduce(%small), to_apply=%add
  %small = f32[1024]{0:T(1024)S(1)} copy(%i)
  ROOT %out = (s32[]{:T(128)}, f32[4096,1024]{1,0:T(8,128)S(1)}) tuple(%i, %y, %ys, %ws)
}

%condition (arg.1: (s32[], f32[4096,1024])) -> pred[] {
  %n = s32[]{:T(128)} constant(16)
  %arg.1 = (s32[]{:T(128)}, f32[4096,1024]{1,0:T(8,128)S(1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %n), direction=LT
}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %c = f32[]{:T(128)} add(%a, %b)
}

ENTRY %main (x.1: f32[4096,1024]) -> f32[] {
  %x.1 = f32[4096,1024]{1,0:T(8,128)} parameter(0)
  %start = (f32[4096,1024]{1,0:T(8,128)S(1)}, f32[4096,1024]{1,0}, u32[]{:S(2)}) copy-start(%x.1)
  %done = f32[4096,1024]{1,0:T(8,128)S(1)} copy-done(%start)
  %init = (f32[4096,1024]{1,0:T(8,128)S(1)}) tuple(%done)
  ROOT %loop = (s32[]{:T(128)}) while(%init), condition=%condition, body=%body
}
"""


def test_a_loop_reads_slices_and_what_is_on_the_chip_is_free():
    moved = traffic(SCAN)
    # x once; and sixteen times a weight, a row of what is kept, and a sum of 4 KiB.
    assert moved.hbm_bytes == 16 * MIB + 16 * (4 * MIB + 16 * MIB + 4096)
    assert moved.ici_bytes == {"all-reduce": 16 * 4096 * 2 * 3 // 4}
    assert moved.host_bytes == 0


# One of ten rows of the host's memory, S(5), is written and another one is read.
HOST = """ENTRY %main (i: s32[], xs: f32[10,256,1024], x: f32[1,256,1024]) -> f32[10,256,1024] {
  %i = s32[] parameter(0)
  %xs = f32[10,256,1024]{2,1,0:S(5)} parameter(1)
  %x = f32[1,256,1024]{2,1,0} parameter(2)
  %put = ((f32[10,256,1024]{2,1,0:S(5)}, f32[1,256,1024]{2,1,0}, s32[]), f32[10,256,1024]{2,1,0:S(5)}, u32[]{:S(2)}) dynamic-update-slice-start(%xs, %x, %i)
  %put.1 = f32[10,256,1024]{2,1,0:S(5)} dynamic-update-slice-done(%put)
  %get = ((f32[10,256,1024]{2,1,0:S(5)}, s32[]), f32[1,256,1024]{2,1,0}, u32[]{:S(2)}) dynamic-slice-start(%put.1, %i), dynamic_slice_sizes={1,256,1024}
  ROOT %get.1 = f32[1,256,1024]{2,1,0} dynamic-slice-done(%get)
}
"""  # noqa: E501


def test_rounds_that_were_made_one_count_once():
    """The counter goes up by 2: eight times then, not sixteen."""
    out = "%out = (s32[]{:T(128)}, f32[4096,1024]{1,0:T(8,128)S(1)}) tuple(%i,"
    by_two = """%two = s32[] constant(2)
  %i.2 = s32[]{:T(128)} add(%i, %two)
  ROOT """ + out.replace("(%i,", "(%i.2,")
    condition = "%i.1 = s32[]{:T(128)} get-tuple-element(%arg.1), index=0"
    assert out in SCAN
    assert condition in SCAN
    moved = traffic(SCAN.replace("ROOT " + out, by_two))
    assert moved.ici_bytes == {"all-reduce": 8 * 4096 * 2 * 3 // 4}


def test_transfers_from_and_to_the_host_are_counted_apart():
    assert traffic(HOST) == (2 * MIB, 2 * MIB, {}, {})


def array_bytes(text):
    module = hlo.parse(f"ENTRY %e (p: f32[]) -> f32[] {{\n  ROOT %p = {text} parameter(0)\n}}\n")
    (array,) = module.computations["e"].instructions["p"].result
    return array.num_bytes


# What NVIDIA's compiler prints, shortened: a table of 400 KiB whose rows are read, changed, copied
# to the host; a product with a workspace; a sum of which each device keeps a part.
NVIDIA = """HloModule jit_f, is_scheduled=true, num_partitions=2

%rows (p0: f32[100,1024], p1: s32[4]) -> f32[4,1024] {
  %p0 = f32[100,1024]{1,0} parameter(0)
  %p1 = s32[4]{0} parameter(1)
  ROOT %taken = f32[4,1024]{1,0} gather(%p0, %p1), offset_dims={1}
}

%put (q0: f32[100,1024], q1: s32[4], q2: f32[4,1024]) -> f32[100,1024] {
  %q0 = f32[100,1024]{1,0} parameter(0)
  %q1 = s32[4]{0} parameter(1)
  %q2 = f32[4,1024]{1,0} parameter(2)
  ROOT %changed = f32[100,1024]{1,0} scatter(%q0, %q1, %q2), to_apply=%add
}

%away (r0: f32[100,1024], r1: f32[1,1024], r2: s32[]) -> f32[100,1024] {
  %r0 = f32[100,1024]{1,0:S(5)} parameter(0)
  %r1 = f32[1,1024]{1,0} parameter(1)
  %row = f32[1,1024]{1,0} copy(%r1)
  %r2 = s32[] parameter(2)
  ROOT %updated = f32[100,1024]{1,0:S(5)} dynamic-update-slice(%r0, %row, %r2, %r2)
}

ENTRY %main (t: f32[100,1024], i: s32[4], host: f32[100,1024], x: bf16[1024,1024], r: f32[1,1024], k: s32[], g: f32[1024]) -> f32[4,1024] {
  %t = f32[100,1024]{1,0} parameter(0)
  %i = s32[4]{0} parameter(1)
  %host = f32[100,1024]{1,0:S(5)} parameter(2)
  %x = bf16[1024,1024]{1,0} parameter(3)
  %r = f32[1,1024]{1,0} parameter(4)
  %k = s32[] parameter(5)
  %g = f32[1024]{0} parameter(6)
  %read = f32[4,1024]{1,0} fusion(%t, %i), kind=kLoop, calls=%rows
  %written = f32[100,1024]{1,0} fusion(%t, %i, %read), kind=kInput, calls=%put
  %start = ((f32[100,1024]{1,0:S(5)}, f32[1,1024]{1,0}, s32[]), f32[100,1024]{1,0:S(5)}, u32[]) fusion-start(%host, %r, %k), kind=kCustom, calls=%away
  %done = f32[100,1024]{1,0:S(5)} fusion-done(%start)
  %product = (bf16[1024,1024]{1,0}, s8[33554432]{0}) custom-call(%x, %x), custom_call_target="__cublas$lt$matmul"
  %sum = ((f32[1024]{0}), f32[512]{0}) reduce-scatter-start(%g), replica_groups={{0,1}}, to_apply=%add
  ROOT %part = f32[512]{0} reduce-scatter-done(%sum)
}
"""  # noqa: E501


def test_a_program_for_gpus():
    moved = traffic(NVIDIA, [0, 1])
    row, indices, counter = 4096, 16, 4
    read = 2 * 4 * row + indices
    changed = 3 * 4 * row + indices
    product, summed = 3 * 2 * MIB, 4096 + 2048
    assert moved.hbm_bytes == read + changed + (row + counter) + product + summed
    assert moved.host_bytes == row
    assert (moved.ici_bytes, moved.dcn_bytes) == ({}, {"reduce-scatter": 2048})


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("f32[100,8,8,24]{3,2,1,0}", 100 * 8 * 8 * 24 * 4),
        ("f32[100,8,8,24]{0,3,2,1:T(8,128)}", 8 * 8 * 24 * 128 * 4),  # batches are innermost
        ("bf16[3,3,24,20]{3,2,1,0:T(8,128)(2,1)}", 9 * 24 * 128 * 2),
        ("f32[]{:T(128)}", 128 * 4),
        ("pred[10]{0}", 10),
        ("f8e4m3fn[10]{0}", 10),
        ("token[]", 0),
    ],
)
def test_arrays_count_as_laid_out(text, num_bytes):
    assert array_bytes(text) == num_bytes


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="expected the text of a compiled program"):
        hlo.parse("nothing")


def compiled_text(function, *args):
    return jax.jit(function).lower(*args).compile().as_text()


def test_a_fused_program_reads_and_writes_once():
    x = jax.ShapeDtypeStruct((256, 1024), jnp.float32)
    moved = traffic(compiled_text(lambda x: jnp.tanh(x) * 2 + 1, x))
    assert moved.hbm_bytes == 2 * MIB


def test_loops_are_counted_whatever_their_length():
    def run(x, n):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x * w), None), x, jnp.ones(n))[0]

    x = jax.ShapeDtypeStruct((256, 1024), jnp.float32)
    few, many = (traffic(compiled_text(lambda x, n=n: run(x, n), x)).hbm_bytes for n in (10, 30))
    assert many - few == pytest.approx(20 * 2 * MIB, rel=0.01)


def test_what_devices_exchange_is_counted():
    mesh = Mesh(jax.devices(), ("data",))
    x = jax.ShapeDtypeStruct(
        (8, 1024), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data"))
    )
    moved = traffic(compiled_text(lambda x: jnp.sum(x, axis=0), x))
    assert moved.ici_bytes == {"all-reduce": 4096}  # of two devices each sends half, twice


# A fusion that adds the first eight elements of each row of two arrays. One of them is selected.
SLICES = """%fused (a: bf16[16,1024], b: f32[16,1024], keep: pred[16,1024]) -> f32[16,8] {
  %a = bf16[16,1024]{1,0} parameter(0)
  %keep = pred[16,1024]{1,0} parameter(2)
  %chosen = bf16[16,1024]{1,0} select(%keep, %a, %a)
  %a.1 = bf16[16,8]{1,0} slice(%chosen), slice={[0:16], [0:8]}
  %a.2 = f32[16,8]{1,0} convert(%a.1)
  %b = f32[16,1024]{1,0} parameter(1)
  %minus = f32[16,1024]{1,0} negate(%b)
  %size = f32[16,1024]{1,0} abs(%minus)
  %b.1 = f32[16,8]{1,0} slice(%size), slice={[0:16], [0:8]}
  ROOT %sum = f32[16,8]{1,0} add(%a.2, %b.1)
}

ENTRY %main (a: bf16[16,1024], b: f32[16,1024], keep: pred[16,1024]) -> f32[16,8] {
  %a = bf16[16,1024]{1,0} parameter(0)
  %b = f32[16,1024]{1,0} parameter(1)
  %keep = pred[16,1024]{1,0} parameter(2)
  ROOT %few = f32[16,8]{1,0} fusion(%a, %b, %keep), kind=kLoop, calls=%fused
}
"""


def test_a_fusion_computes_only_what_it_slices():
    few = 16 * 8
    assert traffic(SLICES).hbm_bytes == few * (2 + 4 + 1 + 4)
    # Read whole where it is needed whole.
    whole = SLICES.replace("ROOT %sum", "%all = bf16[] reduce(%chosen)\n  ROOT %sum")
    assert traffic(whole).hbm_bytes == 16 * 1024 * 3 + few * (4 + 4)
