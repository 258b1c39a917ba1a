"""The table of peaks: against what the chips' units multiply, and against itself."""

import pytest

from nanochat.cards import PEAKS

# Multiprocessors and boost clock (MHz) from NVIDIA's pages of GeForce cards; tensor cores that halve float32 sums do
# 512 FLOP a clock in each.
GEFORCE = {
    "2060": (30, 1680), "2060 SUPER": (34, 1650), "2070": (36, 1620), "2070 SUPER": (40, 1770), "2080": (46, 1710),
    "2080 SUPER": (48, 1815), "2080 Ti": (68, 1545), "3050": (20, 1777), "3060": (28, 1777), "3060 Ti": (38, 1665),
    "3070": (46, 1725), "3070 Ti": (48, 1770), "3080": (68, 1710), "3080 Ti": (80, 1665), "3090": (82, 1695),
    "3090 Ti": (84, 1860), "4060": (24, 2460), "4060 Ti": (34, 2535), "4070": (46, 2475), "4070 SUPER": (56, 2475),
    "4070 Ti": (60, 2610), "4070 Ti SUPER": (66, 2610), "4080": (76, 2505), "4080 SUPER": (80, 2550),
    "4090": (128, 2520), "4090 D": (114, 2520), "5060": (30, 2497), "5060 Ti": (36, 2572), "5070": (48, 2512),
    "5070 Ti": (70, 2452), "5080": (84, 2617), "5090": (170, 2407),
}  # fmt: skip


def test_geforce_rates_are_those_of_their_multiprocessors():
    table = {name.removeprefix("NVIDIA GeForce RTX "): peak for name, peak in PEAKS.items() if "GeForce" in name}
    assert table.keys() == GEFORCE.keys()
    for name, (count, clock) in GEFORCE.items():
        assert table[name].bf16 == pytest.approx(count * 512 * clock / 1e6, rel=0.01), name


def test_fp8_is_twice_as_fast_where_there_is_any():
    for name, peak in PEAKS.items():
        assert peak.fp8 is None or peak.fp8 == pytest.approx(2 * peak.bf16, rel=0.02), name
        assert 15 < peak.bf16 < 3000 and 0.15 < peak.bandwidth <= 8, name


def test_cards_before_ampere_compute_in_float16():
    old = [name for name, peak in PEAKS.items() if peak.dtype == "float16"]
    assert all(any(word in name for word in ("V100", "T4", "RTX 20", "Quadro", "TITAN")) for name in old)
    assert "Tesla T4" in old and len(old) == 6 + 1 + 7 + 3
