"""The table of chips, and the least time that work takes on them."""

import pytest

from revnet_jax.errors import UserError
from revnet_jax.planning.chips import CHIPS, chip_of, fillable_bytes, step_seconds

V5E = CHIPS["v5e"]


def test_chips_are_found_by_the_names_that_devices_have():
    assert chip_of("TPU v5 lite") is V5E
    assert chip_of("TPU v5") is CHIPS["v5p"]
    assert chip_of("NVIDIA H100 80GB HBM3") is CHIPS["h100"]
    assert chip_of("NVIDIA B200") is CHIPS["b200"]
    for other in ("cpu", "NVIDIA A100-SXM4-40GB", "NVIDIA H100 PCIe"):
        assert chip_of(other) is None


def test_of_a_gpu_jax_takes_a_share(monkeypatch):
    """The allocator's, as `bytes_limit` of a GPU's `memory_stats()` says it."""
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    gib = lambda name: round(fillable_bytes(CHIPS[name]) / 2**30, 2)
    assert [gib(name) for name in ("h100", "h200", "v5e")] == [59.33, 105.75, 15.75]
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    assert gib("h100") == 71.2
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.5")
    assert gib("h100") == 39.55
    for wrong in ("90", "nine"):
        monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", wrong)
        with pytest.raises(UserError, match=f"XLA_CLIENT_MEM_FRACTION: got '{wrong}', expected"):
            fillable_bytes(CHIPS["h100"])


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_figures_are_of_the_right_size(chip):
    """A slip of a unit would make them a thousand times too large or too small."""
    assert 1e14 < chip.peak_flops < 3e15
    assert 1e10 < chip.hbm_bytes < 2e11
    assert 5e11 < chip.hbm_bandwidth < 1e13
    assert 1e11 < chip.link_bandwidth < 1e12
    assert chip.dcn_bandwidth is None or 1e9 < chip.dcn_bandwidth < 1e11
    assert chip.source.startswith("https://")


def seconds(chip=V5E, flops=0.0, hbm_bytes=0.0, host_bytes=0.0, ici_bytes=(), dcn_bytes=()):
    return step_seconds(
        chip,
        flops=flops,
        hbm_bytes=hbm_bytes,
        host_bytes=host_bytes,
        ici_bytes=dict(ici_bytes),
        dcn_bytes=dict(dcn_bytes),
    )


def test_the_slower_of_arithmetic_and_memory_decides():
    assert seconds(flops=197e12, hbm_bytes=1e9).busy == 1
    assert seconds(flops=1e12, hbm_bytes=2 * 819e9).busy == 2
    assert seconds(flops=1e12, host_bytes=3 * 16e9).busy == 3


def test_what_is_sent_comes_on_top_or_hides_behind():
    found = seconds(
        flops=197e12,
        ici_bytes={"all-gather": 100e9, "reduce-scatter": 50e9},
        dcn_bytes={"all-reduce": 3.125e9 / 2},
    )
    assert found == (1, 0.75, 0.5)
    assert found.in_turn == 2.25
    assert found.overlapped == 1
    assert seconds(ici_bytes={"all-gather": 100e9}).overlapped == 0.5


def test_where_no_speed_is_published_there_is_no_time():
    assert seconds(CHIPS["v4"], dcn_bytes={"all-reduce": 1}) is None
    assert seconds(CHIPS["v4"], flops=275e12).overlapped == 1
