"""What devices send one another, worked out by hand from what libtpu prints, shortened."""

import numpy as np
import pytest

from revnet_jax.programs import hlo
from revnet_jax.programs.collectives import members, sent_by_network, sent_bytes
from revnet_jax.programs.traffic import traffic

MIB = 2**20
ALL = "{{0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15}}"


def groups_of(attributes, num_devices=16):
    text = f"%x = f32[8] all-reduce(%y), channel_id=1, {attributes}, use_global_device_ids=true"
    module = hlo.parse(f"ENTRY %e (y: f32[8]) -> f32[8] {{\n  {text}\n}}\n")
    found = members(module.computations["e"].instructions["x"], num_devices)
    return sorted(sorted(group) for group in found.tolist())


EVENS_AND_ODDS = [list(range(0, 8, 2)), list(range(1, 8, 2))]


@pytest.mark.parametrize(
    ("attributes", "groups"),
    [
        ("replica_groups={{0,2,4,6},{1,3,5,7}}", EVENS_AND_ODDS),
        ("replica_groups={}", [list(range(8))]),
        ("to_apply=%add", [list(range(8))]),
        ("replica_groups=[1,8]<=[8]", [list(range(8))]),
        ("replica_groups=[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", EVENS_AND_ODDS),
        ("replica_groups=[4,2]<=[2,2,2]T(1,0,2)", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("replica_groups=[4,2]<=[2,2,2]T(1,2,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", EVENS_AND_ODDS),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=1] {'axis_0','axis_1'}", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        (
            "replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}",
            [[0, 2], [1, 3]],
        ),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(0,3,1,2) {'b'}", [[0, 3], [1, 2]]),
        ("source_target_pairs={{0,1},{1,2},{2,0}}", [[0, 1], [0, 2], [1, 2]]),
    ],
)
def test_who_sends_to_whom_is_read(attributes, groups):
    assert groups_of(attributes, num_devices=8) == groups


def test_a_format_that_is_not_known_is_refused():
    with pytest.raises(ValueError, match="expected replica_groups in a format that is known"):
        groups_of("replica_groups=diagonal(4)")


@pytest.mark.parametrize(
    ("kind", "groups", "sent"),
    [
        # 8 devices, 4 in each of 2 slices; 16 bytes, unless they are all that is gathered.
        ("all-gather", [[0, 1, 2, 3], [4, 5, 6, 7]], (12, 0)),
        ("all-gather", [[0, 4], [1, 5], [2, 6], [3, 7]], (0, 8)),
        ("all-gather", [list(range(8))], (12, 2)),  # 3/4 of all; and half of the quarter
        ("reduce-scatter", [list(range(8))], (12, 2)),
        ("all-reduce", [list(range(8))], (24, 4)),
        ("all-to-all", [list(range(8))], (6, 8)),  # 2 to each of 3 neighbours and 4 others
        ("collective-permute", [[0, 1], [1, 2]], (16, 0)),
        ("collective-permute", [[3, 4], [1, 2]], (0, 16)),
    ],
)
def test_within_slices_and_between_them(kind, groups, sent):
    found = sent_by_network(kind, 16, np.asarray(groups), [0] * 4 + [1] * 4)
    assert found == sent
    in_one = sent_by_network(kind, 16, np.asarray(groups), ())
    assert in_one == (sum(found), 0)  # as much in all, however it is done


def test_bytes_sent_are_those_of_the_cheapest_way():
    assert sent_bytes("all-gather", 16, 4) == sent_bytes("reduce-scatter", 16, 4) == 12
    assert sent_bytes("all-reduce", 16, 4) == 24
    assert sent_bytes("collective-permute", 16, 2) == 16
    assert all(sent_bytes(kind, 16, 1) == 0 for kind in ("all-reduce", "collective-permute"))


# An all-gather of 12 MiB beside two products: the text of each of the four has it.
CHAIN = """HloModule jit_step, is_scheduled=true, num_partitions=16

%start (p0: bf16[128,3072]) -> (bf16[128,3072], bf16[2048,3072], s32[2]) {
  %p0 = bf16[128,3072]{1,0} parameter(0)
  %gather.1 = bf16[2048,3072]{1,0} all-gather(%p0), channel_id=13, replica_groups=mesh['axis_0'=16,'axis_1'=1] {'axis_0'}, dimensions={0}, frontend_attributes={chain_id="4"}
  ROOT %call.1 = (bf16[128,3072]{1,0}, bf16[2048,3072]{1,0}, s32[2]{0:S(4)}) custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%carry (q0: bf16[128,3072], q1: bf16[2048,3072], q2: s32[2], q3: f32[256,1024]) -> (f32[256,1024], bf16[128,3072], bf16[2048,3072], s32[2]) {
  %q0 = bf16[128,3072]{1,0} parameter(0)
  %q1 = bf16[2048,3072]{1,0} parameter(1)
  %q2 = s32[2]{0:S(4)} parameter(2)
  %q3 = f32[256,1024]{1,0} parameter(3)
  %product = f32[256,1024]{1,0} tanh(%q3)
  %gather.2 = bf16[2048,3072]{1,0} all-gather(%q0), channel_id=13, replica_groups=mesh['axis_0'=16,'axis_1'=1] {'axis_0'}, dimensions={0}, frontend_attributes={chain_id="4"}
  ROOT %call.2 = (f32[256,1024]{1,0}, bf16[128,3072]{1,0}, bf16[2048,3072]{1,0}, s32[2]{0:S(4)}) custom-call(%product, %q0, %q1, %gather.2, %q2), custom_call_target="AsyncCollectiveFusion"
}

%finish (r0: bf16[128,3072], r1: bf16[2048,3072], r2: s32[2]) -> bf16[2048,3072] {
  %r0 = bf16[128,3072]{1,0} parameter(0)
  %r1 = bf16[2048,3072]{1,0} parameter(1)
  %gather.3 = bf16[2048,3072]{1,0} all-gather(%r0), channel_id=13, replica_groups=mesh['axis_0'=16,'axis_1'=1] {'axis_0'}, dimensions={0}, frontend_attributes={chain_id="4"}
  %r2 = s32[2]{0:S(4)} parameter(2)
  ROOT %call.3 = bf16[2048,3072]{1,0} custom-call(%r0, %r1, %gather.3, %r2), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (w: bf16[128,3072], x: f32[256,1024]) -> bf16[2048,3072] {
  %w = bf16[128,3072]{1,0} parameter(0)
  %x = f32[256,1024]{1,0} parameter(1)
  %begun = (bf16[128,3072]{1,0}, bf16[2048,3072]{1,0}, s32[2]{0:S(4)}) fusion(%w), kind=kCustom, output_to_operand_aliasing={{0}: (0, {})}, calls=%start
  %b0 = bf16[128,3072]{1,0} get-tuple-element(%begun), index=0
  %b1 = bf16[2048,3072]{1,0} get-tuple-element(%begun), index=1
  %b2 = s32[2]{0:S(4)} get-tuple-element(%begun), index=2
  %beside = (f32[256,1024]{1,0}, bf16[128,3072]{1,0}, bf16[2048,3072]{1,0}, s32[2]{0:S(4)}) fusion(%b0, %b1, %b2, %x), kind=kOutput, output_to_operand_aliasing={{1}: (0, {}), {2}: (1, {}), {3}: (2, {})}, calls=%carry
  %c1 = bf16[2048,3072]{1,0} get-tuple-element(%beside), index=2
  ROOT %done = bf16[2048,3072]{1,0} fusion(%b0, %c1, %b2), kind=kCustom, output_to_operand_aliasing={{}: (1, {})}, calls=%finish
}
"""  # noqa: E501


def test_a_gather_beside_products_is_sent_and_written_once():
    moved = traffic(CHAIN)
    assert moved.ici_bytes == {"all-gather": 12 * MIB * 15 // 16}
    part = 128 * 3072 * 2
    # Read and written: the part, what is gathered, and the two arrays of the product.
    assert moved.hbm_bytes == part + 16 * part + 2 * MIB


# A gradient's product in rounds: each of sixteen devices passes two parts of sixteen on, one to
# the left and one to the right, twice a trip and four trips, and one part once more.
WINDOWED = """HloModule jit_step, is_scheduled=true, num_partitions=16

%round (a: (bf16[128,3072], bf16[128,3072], u32[])) -> (bf16[128,3072], bf16[128,3072], u32[]) {
  %a = (bf16[128,3072]{1,0}, bf16[128,3072]{1,0}, u32[]) parameter(0)
  %one = u32[] constant(1)
  %left = bf16[128,3072]{1,0} get-tuple-element(%a), index=0
  %right = bf16[128,3072]{1,0} get-tuple-element(%a), index=1
  %n = u32[] get-tuple-element(%a), index=2
  %s1 = (bf16[128,3072]{1,0}, bf16[128,3072]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%left), channel_id=1, source_target_pairs={{0,1},{1,0}}
  %s2 = (bf16[128,3072]{1,0}, bf16[128,3072]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%right), channel_id=2, source_target_pairs={{0,1},{1,0}}
  %d1 = bf16[128,3072]{1,0} collective-permute-done(%s1)
  %d2 = bf16[128,3072]{1,0} collective-permute-done(%s2)
  %s3 = (bf16[128,3072]{1,0}, bf16[128,3072]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%d1), channel_id=3, source_target_pairs={{0,1},{1,0}}
  %s4 = (bf16[128,3072]{1,0}, bf16[128,3072]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%d2), channel_id=4, source_target_pairs={{0,1},{1,0}}
  %d3 = bf16[128,3072]{1,0} collective-permute-done(%s3)
  %d4 = bf16[128,3072]{1,0} collective-permute-done(%s4)
  %m = u32[] add(%n, %one)
  %o = u32[] add(%m, %one)
  ROOT %next = (bf16[128,3072]{1,0}, bf16[128,3072]{1,0}, u32[]) tuple(%d3, %d4, %o)
}

%more (b: (bf16[128,3072], bf16[128,3072], u32[])) -> pred[] {
  %b = (bf16[128,3072]{1,0}, bf16[128,3072]{1,0}, u32[]) parameter(0)
  %i = u32[] get-tuple-element(%b), index=2
  %eight = u32[] constant(8)
  ROOT %less = pred[] compare(%i, %eight), direction=LT
}

ENTRY %main (z: bf16[128,3072], zero: u32[]) -> bf16[128,3072] {
  %z = bf16[128,3072]{1,0} parameter(0)
  %zero = u32[] parameter(1)
  %init = (bf16[128,3072]{1,0}, bf16[128,3072]{1,0}, u32[]) tuple(%z, %z, %zero)
  %loop = (bf16[128,3072]{1,0}, bf16[128,3072]{1,0}, u32[]) while(%init), condition=%more, body=%round
  %part = bf16[128,3072]{1,0} get-tuple-element(%loop), index=0
  %last = (bf16[128,3072]{1,0}, bf16[128,3072]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%part), channel_id=5, source_target_pairs={{0,1},{1,0}}
  ROOT %end = bf16[128,3072]{1,0} collective-permute-done(%last)
}
"""  # noqa: E501


def test_a_scattered_product_counts_its_rounds():
    moved = traffic(WINDOWED)
    part = 128 * 3072 * 2
    assert moved.ici_bytes == {"collective-permute": (4 * 4 + 1) * part}
    assert moved.hbm_bytes == pytest.approx((4 * 4 + 1) * 2 * part, rel=1e-3)  # read and written


# Of two slices of eight devices, one's program: a sum over its own devices of which each keeps a
# part, and a sum of these parts over slices.
SLICES = """HloModule jit_step, is_scheduled=true, num_partitions=8

%all-reduce-scatter (p0: bf16[8192,1024]) -> bf16[1024,1024] {
  %p0 = bf16[8192,1024]{1,0} parameter(0)
  %sum = bf16[8192,1024]{1,0} all-reduce(%p0), channel_id=3, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %i = u32[] partition-id()
  ROOT %part = bf16[1024,1024]{1,0} dynamic-slice(%sum, %i), dynamic_slice_sizes={1024,1024}
}

%gather (r0: bf16[1024,1024]) -> bf16[8192,1024] {
  %r0 = bf16[1024,1024]{1,0} parameter(0)
  ROOT %whole = bf16[8192,1024]{1,0} all-gather(%r0), channel_id=4, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
}

ENTRY %main (g: bf16[8192,1024]) -> bf16[8192,1024] {
  %g = bf16[8192,1024]{1,0} parameter(0)
  %mine = bf16[1024,1024]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter
  %after = token[] after-all()
  %send = (bf16[1024,1024]{1,0}, u32[], token[]) send(%mine, %after), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2}x{0:7}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv = (bf16[1024,1024]{1,0}, u32[], token[]) recv(%after), channel_id=1, is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2}x{0:7}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %sent = token[] send-done(%send), channel_id=2
  %received = (bf16[1024,1024]{1,0}, token[]) recv-done(%recv), channel_id=1
  %both = bf16[1024,1024]{1,0} get-tuple-element(%received), index=0
  %started = ((bf16[1024,1024]{1,0}, token[]), bf16[8192,1024]{1,0}) call-start(%both), async_execution_thread="sparsecore", to_apply=%gather
  ROOT %result = bf16[8192,1024]{1,0} call-done(%started)
}
"""  # noqa: E501


def test_networks_are_told_apart():
    moved = traffic(SLICES, [0] * 8 + [1] * 8)
    assert moved.ici_bytes == {"reduce-scatter": 14 * MIB, "all-gather": 14 * MIB}
    assert moved.dcn_bytes == {"all-reduce": 2 * MIB}  # half of it, twice


def test_one_program_for_all_slices():
    text = f"""HloModule jit_step, num_partitions=16

ENTRY %main (g: f32[1048576]) -> f32[1048576] {{
  %g = f32[1048576]{{0}} parameter(0)
  %inside = f32[1048576]{{0}} all-reduce(%g), replica_groups=[2,8]<=[16], to_apply=%add
  ROOT %across = f32[1048576]{{0}} all-reduce(%inside), replica_groups={ALL}, to_apply=%add
}}
"""
    moved = traffic(text, [0] * 8 + [1] * 8)
    # The second sum too is taken within slices first: then half of an eighth goes there and back.
    assert moved.ici_bytes == {"all-reduce": 14 * MIB}
    assert moved.dcn_bytes == {"all-reduce": MIB / 2}
