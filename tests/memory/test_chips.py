"""The table of chips, and the least time that work takes on them."""

import pytest

from revnet_jax.memory.chips import CHIPS, chip_of, least_seconds

V5E = CHIPS["v5e"]


def test_chips_are_found_by_the_names_that_devices_have():
    assert chip_of("TPU v5 lite") is V5E
    assert chip_of("TPU v5") is CHIPS["v5p"]
    assert chip_of("NVIDIA H100 80GB HBM3") is CHIPS["h100"]
    for other in ("cpu", "NVIDIA A100-SXM4-40GB", "NVIDIA H100 PCIe"):
        assert chip_of(other) is None


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_figures_are_of_the_right_size(chip):
    """A slip of a unit would make them a thousand times too large or too small."""
    assert 1e14 < chip.peak_flops < 3e15
    assert 1e10 < chip.hbm_bytes < 2e11
    assert 5e11 < chip.hbm_bandwidth < 1e13
    assert 1e11 < chip.link_bandwidth < 1e12
    assert chip.source.startswith("https://")


def seconds(flops=0, hbm_bytes=0, host_bytes=0, collectives=None, num_devices=4):
    return least_seconds(
        V5E,
        flops=flops,
        hbm_bytes=hbm_bytes,
        host_bytes=host_bytes,
        collectives=collectives or {},
        num_devices=num_devices,
    )


def test_the_slower_of_arithmetic_and_memory_decides():
    assert seconds(flops=197e12, hbm_bytes=1e9) == 1
    assert seconds(flops=1e12, hbm_bytes=2 * 819e9) == 2
    assert seconds(flops=1e12, host_bytes=3 * 16e9) == 3


def test_collectives_come_on_top():
    assert seconds(flops=197e12, collectives={"all-gather": 200e9}) == 1 + 3 / 4
    assert seconds(collectives={"all-reduce": 200e9}) == 2 * 3 / 4
    assert seconds(collectives={"all-reduce": 200e9}, num_devices=1) == 0
