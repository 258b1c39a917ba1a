"""Predicted times: each term by hand, bands as published points leave them, never without the word predicted."""

import math
from dataclasses import replace

import pytest

from profiling.predicted import cards
from profiling.predicted.cards import card
from profiling.predicted.predict import LARGE, predict

H100 = replace(card("H100"), streaming=0.92, gemm=0.75, gemm_fp8=0.60, launch=6e-6, calibrated="")
MEASURED_HERE = replace(H100, calibrated="2026-01-01")


def row(**changed):
    """A kernel of 4 warps and 1,000 programs on sm_90, of 100 instructions a thread."""
    fields = dict(target="sm_90", mix={"integer": 92, "LDG.128": 4, "STS.64": 4}, warps=4, programs=1000, times=1,
                   looped=False, dot_rows=0, occupancy=0.5, error="")  # fmt: skip
    return {**fields, **changed}


def test_a_streaming_kernel_takes_a_launch_and_its_bytes():
    said = predict(H100, "rms_norm", 200e6, 200e6, [row()])
    assert said.bound == "memory" and said.seconds == pytest.approx(6e-6 + 200e6 / (0.92 * 3.35e12))
    assert (said.low, said.high) == pytest.approx((0.7 * said.seconds, 1.3 * said.seconds))
    assert predict(MEASURED_HERE, "rms_norm", 200e6, 200e6, [row()]).band == 0.10


def test_bands():
    assert predict(MEASURED_HERE, "rms_norm", LARGE - 1, 1).band == 0.25
    assert predict(H100, "rms_norm", LARGE - 1, 1).band == 0.30  # not better known than a large one
    product = predict(MEASURED_HERE, "linear_relu2", 1e9, 1e12)
    assert (product.usual, product.band, product.bound) == (0.15, 0.35, "tensor cores")


def test_what_is_asked_for_twice_widens_the_band_upwards_and_no_further_than_that():
    assert predict(MEASURED_HERE, "rms_norm", 1e9, 1e9, asked=1.44).band == pytest.approx(0.44)
    assert predict(MEASURED_HERE, "rms_norm", 1e9, 1e9, asked=1.03).band == 0.10
    assert predict(MEASURED_HERE, "linear_relu2", 1e9, 1e12, asked=8.0).band == 0.35


@pytest.mark.parametrize("op, looped", [("rotary", True), ("cross_entropy", False), ("flash_attention", False)])
def test_a_loop_leaves_a_lower_bound_only(op, looped):
    said = predict(H100, op, 1e9, 1e9, [row(looped=looped)])
    assert said.lower_bound and said.low == said.seconds and said.high == math.inf and "at least" in str(said)


def test_products_loop_too_but_their_flops_are_known():
    assert not predict(H100, "linear_relu2", 1e9, 1e13, [row(looped=True)]).lower_bound


def test_products_by_hand():
    said = predict(H100, "linear_relu2", 1e6, 989e9)
    assert said.seconds == pytest.approx(6e-6 + 1e-3 / 0.75)
    attention = predict(H100, "flash_attention", 1e6, 989e9)
    assert attention.lower_bound and attention.parts["tensor cores"] == pytest.approx(1e-3 / H100.attention)
    assert predict(H100, "fp8_linear", 1e6, 989e9).parts["tensor cores"] == pytest.approx(989e9 / (0.6 * 1979e12))


def test_a_last_wave_that_is_nearly_empty_costs_a_whole_one():
    # 132 SMs x 8 blocks of 4 warps (half of 64 warps)
    full, one_more = (row(dot_rows=64, programs=132 * 8 * 2 + extra) for extra in (0, 1))
    plain = predict(H100, "linear_relu2", 1e6, 1e12).parts["tensor cores"]
    assert predict(H100, "linear_relu2", 1e6, 1e12, [full]).parts["tensor cores"] == pytest.approx(plain)
    longer = predict(H100, "linear_relu2", 1e6, 1e12, [one_more]).parts["tensor cores"]
    assert longer == pytest.approx(plain * 3 / (2 + 1 / 1056))


def test_instructions_and_shared_memory_by_hand():
    many = row(programs=10**7, times=2)
    said = predict(H100, "rms_norm", 1e6, 1e6, [many])
    assert said.bound == "issue slots"
    assert said.parts["issue slots"] == pytest.approx(100 * 4 * 2e7 / (4 * 132 * 1.83e9))
    assert said.parts["shared memory"] == pytest.approx(4 * 8 * 32 * 4 * 2e7 / (128 * 132 * 1.83e9))
    amd = predict(card("MI300X"), "rms_norm", 1e6, 1e6, [row(target="gfx942", mix={"ds_read.64": 10})])
    assert amd.parts["shared memory"] == pytest.approx(10 * 8 * 64 * 4 * 1000 / (128 * 304 * 2.1e9))
    assert amd.parts["issue slots"] == pytest.approx(10 * 4 * 1000 / (304 * 2.1e9))


def test_instructions_of_a_loop_are_not_known():
    assert set(predict(H100, "rms_norm", 1e6, 1e6, [row(looped=True)]).parts) == {"memory"}


@pytest.mark.parametrize("name, moved, measured", [
    ("H100", 2 * 4096 * 16384 * 2, 94.4e-6), ("H100", 3 * 4096 * 16384 * 2, 137.1e-6),
    ("H100", 2 * 4096 * 2048 * 2, 17.6e-6), ("A100", 2 * 2048 * 16384 * 2, 95.3e-6),
    ("RTX 5090", 2 * 4096 * 32768 * 2, 2 * 4096 * 32768 * 2 / 1520e9),
])  # fmt: skip
def test_published_streaming_kernels_are_within_the_band(name, moved, measured, monkeypatch, tmp_path):
    monkeypatch.setattr(cards, "FOLDER", tmp_path)
    said = predict(card(name), "rms_norm", moved, moved)
    assert said.low <= measured <= said.high


def test_it_always_says_predicted():
    for op, flops in (("rms_norm", 1e9), ("linear_relu2", 1e13), ("cross_entropy", 1e9)):
        for chip in (H100, MEASURED_HERE, card("MI300X")):
            said = predict(chip, op, 1e9, flops, [row(target=chip.target)])
            text, cell = str(said), said.cell()
            assert (
                text.startswith("predicted ")
                and cell.startswith("predicted\u00a0")
                and "bound by" in text
                and ("±" in text or "at least" in text)
            )
