"""A branch is the same compiled program forward and in its rewind, for absent devices."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from revnet_jax.planning.topology import parse_topology
from revnet_jax.programs.same_program import isolated_parts, not_found
from tests.nvidia import needs_compiler

CHAINS = ("mlp", "affine", "bdia", "symplectic", "three streams", "invertible", "single layers")
# Branches are written as users write them.
AS_USERS_RUN_IT = {
    "JAX_NUMPY_DTYPE_PROMOTION": "standard",
    "JAX_NUMPY_RANK_PROMOTION": "allow",
}
TEXT = """
%sum (a: f32[], b: f32[]) -> f32[] {{
  %b = f32[] parameter(1)
  %a = f32[] parameter(0)
  ROOT %add = f32[] add({reducer})
}}

%fused (x: f32[4,8]) -> f32[4] {{
  %x = f32[4,8]{{1,0}} parameter(0)
  %{squared} = f32[4,8]{{1,0}} {function}(%x, %x)
  %zero = f32[] constant(0)
  ROOT %reduce = f32[4]{{0}} reduce(%{squared}, %zero), dimensions={{1}}, to_apply=%sum
}}

ENTRY %main (x: f32[4,8]) -> f32[4] {{
  %x = f32[4,8]{{1,0:S({space})}} parameter(0)
  %merge = f32[4,8]{{1,0}} add(%x, %x), metadata={{op_name="jit(f)/{scope}/add"}}
  ROOT %f = f32[4]{{0}} fusion(%x), kind=kLoop, calls=%fused, metadata={{op_name="{op_name}"}}
}}
"""


def parts(scope="forward", *, reducer="%a, %b", squared="y", function="multiply", space=0):
    text = TEXT.format(
        scope=scope,
        op_name=f"jit(f)/{scope}/jvp()/isolated/sum",
        reducer=reducer,
        squared=squared,
        function=function,
        space=space,
    )
    return isolated_parts(text, "forward"), isolated_parts(text, "rewind")


def test_what_is_isolated_is_found_by_its_scope():
    for scope, places in (("forward", ["f"]), ("head", [])):
        forward, rewind = parts(scope)
        assert [part.name for part in forward] == places
        assert rewind == []


def test_names_orders_and_memories_make_no_difference_but_arithmetic_does():
    these, _ = parts()
    in_rewind = lambda **changes: parts("rewind", **changes)[1]
    assert not_found(these, in_rewind(reducer="%b, %a", squared="z", space=1)) == []
    assert not_found(these, in_rewind(function="maximum")) == these
    assert not_found(these * 2, in_rewind()) == these  # as often as it is there


DIFFERENCE = """
%fused (a: f32[8], b: f32[8]) -> f32[8] {{
  %a = f32[8]{{0}} parameter({a})
  %b = f32[8]{{0}} parameter({b})
  ROOT %d = f32[8]{{0}} subtract(%a, %b)
}}

ENTRY %main (x: f32[8], y: f32[8]) -> f32[8] {{
  %x = f32[8]{{0}} parameter(0)
  %y = f32[8]{{0}} parameter(1)
  ROOT %f = f32[8]{{0}} fusion(%{first}, %{second}), kind=kLoop, calls=%fused, {name}
}}
"""


def test_operands_count_by_what_is_done_with_them():
    def part(a, b, first, second):
        name = 'metadata={op_name="jit(f)/forward/isolated/sub"}'
        text = DIFFERENCE.format(a=a, b=b, first=first, second=second, name=name)
        return isolated_parts(text, "forward")

    x_minus_y = part(0, 1, "x", "y")
    assert not_found(part(1, 0, "y", "x"), x_minus_y) == []  # the same, numbered otherwise
    x_minus_x = part(0, 1, "x", "x")
    assert not_found(x_minus_x, x_minus_y) == x_minus_x


COPIED = """
%fused (a: f32[8,4], b: f32[8,4]) -> f32[8,4] {
  %a = f32[8,4]{0,1} parameter(0)
  %b = f32[8,4]{1,0} parameter(1)
  %c = f32[8,4]{1,0} copy(%a)
  ROOT %d = f32[8,4]{1,0} subtract(%c, %b)
}

%moved (m: f32[8,4]) -> f32[8,4] {
  %m = f32[8,4]{1,0} parameter(0)
  ROOT %n = f32[8,4]{0,1} copy(%m)
}

ENTRY %main (x: f32[8,4], y: f32[8,4]) -> f32[8,4] {
  %x = f32[8,4]{1,0} parameter(0)
  %y = f32[8,4]{1,0} parameter(1)
  %z = f32[8,4]{0,1} fusion(%x), kind=kLoop, calls=%moved, metadata={op_name="forward/isolated/z"}
  %w = f32[8,4]{0,1} copy(%x)
  ROOT %f = f32[8,4]{1,0} fusion(OPERANDS), kind=kLoop, calls=%fused, \
metadata={op_name="forward/isolated/sub"}
}
""".replace("\\\n", "")


def test_but_for_layouts_a_copy_is_what_it_is_a_copy_of():
    def parts(operands, **options):
        text = COPIED.replace("OPERANDS", operands)
        return isolated_parts(text, "forward", **options)

    assert len(parts("%w, %x")) == 2
    (x_minus_x,) = parts("%w, %x", layouts=False)  # the fusion that copies is no part
    assert not_found([x_minus_x], parts("%x, %x", layouts=False)) == []
    assert not_found([x_minus_x], parts("%w, %y", layouts=False)) == [x_minus_x]
    assert not_found(parts("%w, %x"), parts("%x, %x")) != []


PRODUCT = """
%fused (a: DTYPE[8,4], b: DTYPE[4,8]) -> f32[8,8] {
  %a = DTYPE[8,4]{1,0} parameter(0)
  %b = DTYPE[4,8]{1,0} parameter(1)
  ROOT %d = f32[8,8]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (x: DTYPE[8,4], y: DTYPE[4,8]) -> f32[8,8] {
  %x = DTYPE[8,4]{1,0} parameter(0)
  %y = DTYPE[4,8]{1,0} parameter(1)
  %p = f32[8,8]{1,0} dot(%x, %y), METADATA
  ROOT %f = f32[8,8]{1,0} fusion(%x, %y), kind=kOutput, calls=%fused, METADATA
}
""".replace("METADATA", 'metadata={op_name="forward/isolated/dot"}')


@pytest.mark.parametrize("layouts", [True, False])
def test_products_of_other_dtypes_are_others(layouts):
    parts = lambda dtype: isolated_parts(
        PRODUCT.replace("DTYPE", dtype), "forward", layouts=layouts
    )
    assert not_found(parts("f32"), parts("f32")) == []
    assert not_found(parts("f32"), parts("bf16")) == parts("f32")
    assert len(parts("f32")) == 2


CONVERTED = """
%fused (a: bf16[2,4,8]) -> DTYPE[4,2,8] {
  %a = bf16[2,4,8]{2,1,0} parameter(0)
  %b = bf16[SHAPE]{2,1,0} bitcast(%a)
  %c = DTYPE[SHAPE]{2,1,0} convert(%b)
  ROOT %d = DTYPE[4,2,8]{2,0,1} bitcast(%c)
}

ENTRY %main (x: bf16[2,4,8]) -> DTYPE[4,2,8] {
  %x = bf16[2,4,8]{2,1,0} parameter(0)
  ROOT %f = DTYPE[4,2,8]{2,0,1} fusion(%x), kind=kLoop, calls=%fused, \
metadata={op_name="forward/isolated/convert"}
}
""".replace("\\\n", "")


def test_but_for_layouts_axes_may_be_named_in_any_order_where_numbers_are_converted():
    def parts(shape, dtype, **options):
        text = CONVERTED.replace("SHAPE", shape).replace("DTYPE", dtype)
        return isolated_parts(text, "forward", **options)

    turned = parts("4,2,8", "f32", layouts=False)
    assert len(turned) == 1
    assert not_found(turned, parts("2,4,8", "f32", layouts=False)) == []
    assert not_found(turned, parts("2,4,8", "f16", layouts=False)) == turned
    assert not_found(parts("4,2,8", "f32"), parts("2,4,8", "f32")) != []


def differences(topology, names, python=sys.executable):
    result = subprocess.run(
        [python, "-m", "tests.programs.isolated_programs", topology, *names],
        env={**os.environ, **parse_topology(topology).environment, **AS_USERS_RUN_IT},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert [each["name"] for each in found] == [name for name in names if name != "--fused"]
    return found


def check(found, keys):
    for each in found:
        for mode in ("", " but for layouts"):  # there is something to compare
            assert each[f"rewind{mode}"] > each[f"parts{mode}"] >= 2
        for key in keys:
            assert each[key] == [], (each["name"], key)


@needs_compiler
@pytest.mark.parametrize(
    "names",
    [
        CHAINS[:3],
        CHAINS[3:6],
        (*CHAINS[6:], "decoder, dropout"),
        ("decoder", "decoder, unrolled", "decoder, experts"),
        ("decoder, BDIA", "decoder, LoRA", "decoder, operands kept"),
        ("decoder, MEFT", "decoder, 8 bits"),
        ("RevViT", "RevNet", "RevNet, layers alone"),
    ],
)
def test_on_an_h100_nothing_differs(names):
    """Forward, rewind, all of `store` and mixtures: so gradients are equal bit for bit."""
    check(differences("h100:1", names), ("forward", "store", "mixture"))


@needs_compiler
def test_on_an_h100_chunked_attention_differs_in_masks_alone():
    """`store` makes the masks of its chunks in both passes, a rewind once."""
    found = differences("h100:1", ["decoder, chunked", "decoder, windows", "decoder, float32"])
    check(found, ("forward", "mixture"))
    for each in found:
        mask = "and" if each["name"] == "decoder, windows" else "ge"
        assert {op_name.rpartition("/")[2] for _, op_name, _ in each["store"]} == {mask}


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", ["RevNet-38", "i-RevNet"])
def test_on_an_h100_nothing_differs_in_large_convolutional_networks(name):
    check(differences("h100:1", [name]), ("forward", "store", "mixture"))


@needs_compiler
def test_without_barriers_it_would():
    (found,) = differences("h100:1", ["--fused", "mlp"])
    assert found["forward"]


on_a_v5e = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no TPU compiler")


@pytest.mark.slow
@on_a_v5e
@pytest.mark.parametrize("name", [*CHAINS, "RevViT"])
def test_on_a_v5e_rewinds_do_not_differ(name):
    """Nor does a mixture's. `store` may lay out in another way what it stacks, and fuse it so."""
    check(differences("v5e:1x1", [name]), ("forward", "mixture", "store but for layouts"))


DECODERS = (
    *("decoder", "decoder, experts", "decoder, dropout"),
    *("decoder, BDIA", "decoder, LoRA"),
)
# Weights are read as they lie in a stack or once turned over, and what is kept in another order.
BUT_FOR_LAYOUTS = tuple(f"{key} but for layouts" for key in ("forward", "store", "mixture"))


@pytest.mark.slow
@on_a_v5e
@pytest.mark.parametrize("name", [*DECODERS, "i-RevNet", "RevNet, layers alone"])
def test_on_a_v5e_others_differ_in_layouts_alone(name):
    check(differences("v5e:1x1", [name]), BUT_FOR_LAYOUTS)


@pytest.mark.slow
@on_a_v5e
def test_on_a_v5e_chunked_attention_differs_in_integers_besides():
    """`store` makes the masks of its chunks where they are read."""
    (found,) = differences("v5e:1x1", ["decoder, chunked"])
    check([found], (BUT_FOR_LAYOUTS[0], BUT_FOR_LAYOUTS[2]))
    store = found["store but for layouts"]
    assert {name.rpartition("_fusion")[0] for name, _, _ in store} == {"iota_add", "iota_compare"}


@pytest.mark.slow
@on_a_v5e
@pytest.mark.parametrize(
    ("name", "others"),
    [("RevNet", set()), ("RevNet-38", {"fusion", "convert_reduce_fusion"})],
)
def test_on_a_v5e_a_mixture_has_other_fusions_of_batch_statistics(name, others):
    """Its single reversed layer is in no loop. What differs in the small network divides a sum by
    the number of its terms, a power of two here, which rounds nothing. In RevNet-38 two sums
    differ besides, which are taken within a convolution's fusion or after it: its mixture's
    gradient may differ from `reverse`'s by a rounding.
    """
    (found,) = differences("v5e:1x1", [name])
    check([found], BUT_FOR_LAYOUTS[:2])
    mixture = {name.rpartition(".")[0] for name, _, _ in found["mixture but for layouts"]}
    assert mixture == {"rsqrt_multiply_fusion"} | others
