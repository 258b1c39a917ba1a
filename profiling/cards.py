"""The cards that a step can be predicted for: data-sheet peaks, and what fraction of them is reached.

Peaks are dense, from the vendors' data sheets (the sources are beside nanochat/hardware.py's table); NVLink is both
directions together. Fractions are fitted on published measurements; profiling/points.py shows how well they do.
"""

from dataclasses import dataclass

from nanochat.errors import UserError
from nanochat.hardware import PEAKS


@dataclass(frozen=True)
class Card:
    """bf16 and fp8 in FLOP/s (fp8 0: none), memory and link bandwidth in bytes/s."""

    name: str
    bf16: float
    fp8: float
    memory: float
    link: float
    attention: float  # forward, as a share of bf16: FA3 on Hopper, FA2 or Triton elsewhere
    gemm: float  # products of nanochat's sizes, as a share of bf16

    def products(self, fp8: bool = False) -> float:
        """FLOP/s that a step's matrix products reach."""
        return GEMM_FP8 * self.fp8 if fp8 else self.gemm * self.bf16


GEMM_FP8 = 0.60  # the same in fp8
STREAMING = 0.92  # of the memory's bandwidth, at 32 MB and more
LAUNCH = 6e-6  # seconds before a kernel's first byte, as do_bench sees it
BUS = 0.485  # of the link, which counts both directions: all-reduce of 256 MiB on 8 GPUs, 436 of 900 GB/s

# The products of a step reach 0.94 of the best product published for a card (H100: 794.5 TFLOP/s, A100: 271, B200:
# 1,745), or 0.75 of its peak where none is. Links in GB/s; cards without NVLink have PCIe.
_DRIVER = {
    "A100": ("NVIDIA A100-SXM4-80GB", 600, 0.45, 0.94 * 271 / 312),
    "H100": ("NVIDIA H100 80GB HBM3", 900, 0.57, 0.94 * 794.5 / 989),  # FA3's forward at D = 128: 566 of 989 TFLOP/s
    "H200": ("NVIDIA H200", 900, 0.57, 0.94 * 794.5 / 989),
    "B200": ("NVIDIA B200", 1800, 0.45, 0.94 * 1745 / 2250),
    "L40S": ("NVIDIA L40S", 32, 0.45, 0.75),
    "RTX 3090": ("NVIDIA GeForce RTX 3090", 32, 0.45, 0.75),
    "RTX 4090": ("NVIDIA GeForce RTX 4090", 32, 0.45, 0.75),
    "RTX 4070": ("NVIDIA GeForce RTX 4070", 32, 0.45, 0.75),
    "RTX 5090": ("NVIDIA GeForce RTX 5090", 64, 0.45, 0.75),
    "MI300X": ("AMD Instinct MI300X", 896, 0.45, 0.75),
}


def card(name: str) -> Card:
    """By short name. Raises UserError for one that is not known: no look-alike is taken instead."""
    if name not in _DRIVER:
        raise UserError(f"--card {name!r} is not known; there are {', '.join(_DRIVER)}")
    driver, link, attention, gemm = _DRIVER[name]
    peak = PEAKS[driver]
    return Card(name, peak.bf16 * 1e12, (peak.fp8 or 0) * 1e12, peak.bandwidth * 1e12, link * 1e9, attention, gemm)
