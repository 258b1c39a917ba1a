"""The cards that a step or a kernel can be predicted for: data-sheet peaks, and what fraction of them is reached.

Peaks are dense, of nanochat/hardware.py's table with its sources; NVLink is both directions together. Fractions are
fitted on published measurements; points.py shows how well they do. Where `python -m profiling calibrate` was
run on a card, its file in profiling/calibration/ replaces them. A card that has peaks and no fractions is a `Sheet`:
what was reached can be set against its peaks, and nothing is predicted for it.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nanochat.errors import UserError
from nanochat.files import json_of
from nanochat.hardware import PEAKS
from nanochat.typed import fits

FOLDER = Path(__file__).parents[1] / "calibration"
VERSION = 1  # of the files in it

GEMM_FP8 = 0.60  # of the fp8 peak: products of nanochat's sizes
STREAMING = 0.92  # of the memory's bandwidth, at 32 MB and more
LAUNCH = 6e-6  # seconds before a kernel's first byte, as do_bench sees it


@dataclass(frozen=True)
class Card:
    """bf16 and fp8 in FLOP/s (fp8 0: none), memory and link bandwidth in bytes/s, capacity in bytes, clock in Hz."""

    name: str
    driver: str  # its name as the driver reports it
    target: str  # what kernels are compiled to for it
    bf16: float
    fp8: float
    memory: float
    link: float
    capacity: float
    sms: int
    clock: float
    attention: float  # forward, as a share of bf16: FA3 on Hopper, FA2 or Triton elsewhere
    gemm: float  # products of nanochat's sizes, as a share of bf16
    gemm_fp8: float = GEMM_FP8
    streaming: float = STREAMING
    launch: float = LAUNCH
    calibrated: str = ""  # the day on which this kind of card was measured; "": fractions are fitted

    def products(self, fp8: bool = False) -> float:
        """FLOP/s that a step's matrix products reach."""
        return self.gemm_fp8 * self.fp8 if fp8 else self.gemm * self.bf16

    @property
    def stream(self) -> float:
        """Bytes/s that a kernel reaches which does nothing but move memory."""
        return self.streaming * self.memory

    @property
    def constants(self) -> str:
        """Where the fractions come from, for a report."""
        return f"calibrated on {self.calibrated}" if self.calibrated else "constants fitted on published measurements"


@dataclass(frozen=True)
class Sheet:
    """A card of which no more than the peaks is known; units as in Card."""

    name: str  # as the driver reports it
    bf16: float
    fp8: float
    memory: float


Known = Card | Sheet


# An all-reduce takes START + SQRT·√x + x / (BUS · link) seconds for x = 2·(n-1)/n of its bytes: what is cut into chunks
# pays for each chunk and for filling the pipe with one, and with the best number of chunks both grow as √x. Fitted on
# 8 H200 at 1 MiB, 16 MiB and 8 GiB; points.py has 256 MiB beside it.
START, SQRT, BUS = 31.6e-6, 7.81e-9, 0.547


def all_reduce(chip: Card, size: float, gpus: int) -> float:
    """Seconds of an all-reduce of `size` bytes; a reduce-scatter and the all-gather after it take as long together."""
    moved = 2 * (gpus - 1) / gpus * size
    return START + SQRT * moved**0.5 + moved / (BUS * chip.link)


# The products of a step reach 0.94 of the best product published for a card (H100: 794.5 TFLOP/s, A100: 271, B200:
# 1,745), or 0.75 of its peak where none is. Links in GB/s; cards without NVLink have PCIe. Multiprocessors and boost
# clocks in MHz from the same sheets; Hopper's and B200's clocks are those at which their peaks are stated.
_GEFORCE = "NVIDIA GeForce"
_CARDS = {  # driver's name, target, link, memory in GiB as drivers report it, SMs, clock, attention, products
    "A100": ("NVIDIA A100-SXM4-80GB", "sm_80", 600, 79.15, 108, 1410, 0.45, 0.94 * 271 / 312),
    "H100": ("NVIDIA H100 80GB HBM3", "sm_90", 900, 79.11, 132, 1830, 0.57, 0.94 * 794.5 / 989),  # FA3's forward: 566
    "H200": ("NVIDIA H200", "sm_90", 900, 139.81, 132, 1830, 0.57, 0.94 * 794.5 / 989),
    "B200": ("NVIDIA B200", "sm_100", 1800, 178.35, 148, 1860, 0.45, 0.94 * 1745 / 2250),
    "L40S": ("NVIDIA L40S", "sm_89", 32, 44.39, 142, 2520, 0.45, 0.75),
    "RTX 3090": (f"{_GEFORCE} RTX 3090", "sm_86", 32, 23.69, 82, 1695, 0.45, 0.75),
    "RTX 4090": (f"{_GEFORCE} RTX 4090", "sm_89", 32, 23.64, 128, 2520, 0.45, 0.75),
    "RTX 4070": (f"{_GEFORCE} RTX 4070", "sm_89", 32, 11.6, 46, 2475, 0.45, 0.75),
    "RTX 5090": (f"{_GEFORCE} RTX 5090", "sm_120", 64, 31.36, 170, 2407, 0.45, 0.75),
    "MI300X": ("AMD Instinct MI300X", "gfx942", 896, 191.98, 304, 2100, 0.45, 0.75),
}


def card(name: str) -> Card:
    """By short name, calibrated where there is a file for it.

    Raises UserError for a card that is not known (no look-alike is taken instead) and for a file that cannot be read.
    """
    short = {known.lower().removeprefix("rtx "): known for known in _CARDS}
    given, name = name, short.get(name.lower().removeprefix("rtx "), "")
    if not name:
        raise UserError(f"--card {given!r} is not known; there are {', '.join(_CARDS)}")
    driver, target, link, capacity, sms, clock, attention, gemm = _CARDS[name]
    found = Card(name, driver, target, *_peaks(driver), link * 1e9, capacity * 2**30, sms, clock * 1e6, attention, gemm)
    path = FOLDER / f"{slug(driver)}.json"
    return calibrated(found, read(path)) if path.exists() else found


def _peaks(driver: str) -> tuple[float, float, float]:
    """bf16 and fp8 in FLOP/s (fp8 0: none), memory in bytes/s."""
    peak = PEAKS[driver]
    return peak.bf16 * 1e12, (peak.fp8 or 0) * 1e12, peak.bandwidth * 1e12


def names() -> list[str]:
    return list(_CARDS)


def target_of(name: str) -> str:
    """What kernels are compiled to for a card of `names()`."""
    return _CARDS[name][1]


def slug(driver: str) -> str:
    """A GPU's name as a file's: "NVIDIA H100 80GB HBM3" → "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", driver.lower()).strip("-")


RATES = ("launch_s", "stream_bytes_per_s", "bf16_flop_per_s", "fp8_flop_per_s", "attention_flop_per_s")


def read(path: Path) -> dict[str, Any]:
    """A calibration file. Raises UserError, naming the file, for one that is damaged or of another version."""
    again = "measure again with python -m profiling calibrate, or delete it"
    try:
        made = json_of(path.read_bytes())
        if made["version"] != VERSION:
            raise UserError(f"{path} is of version {made['version']}, wanted {VERSION}: {again}")
        rates = made["rates"]
        needed = [rates[key] for key in RATES if key != "fp8_flop_per_s" or rates[key] is not None]
        if not all(fits(rate, float) and 0 < rate < 1e18 for rate in needed) or not isinstance(made["date"], str):
            raise ValueError
    except (ValueError, KeyError, TypeError, OSError):
        raise UserError(f"{path} is damaged: {again}") from None
    return made


def calibrated(chip: Card, made: dict[str, Any]) -> Card:
    """The card with the fractions that were measured on one of its kind."""
    rates = made["rates"]
    return replace(
        chip,
        launch=rates["launch_s"],
        streaming=rates["stream_bytes_per_s"] / chip.memory,
        gemm=rates["bf16_flop_per_s"] / chip.bf16,
        gemm_fp8=rates["fp8_flop_per_s"] / chip.fp8 if rates["fp8_flop_per_s"] and chip.fp8 else chip.gemm_fp8,
        attention=rates["attention_flop_per_s"] / chip.bf16,
        calibrated=made["date"],
    )


def by_driver(driver: str) -> Known | None:
    """By the exact name that the driver reports; None for a card that is not known."""
    full = next((card(name) for name, row in _CARDS.items() if row[0] == driver), None)
    return full or (Sheet(driver, *_peaks(driver)) if driver in PEAKS else None)
