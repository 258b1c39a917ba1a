"""Peak rates of GPUs, as data, by the exact name that the driver reports.

Dense rates (no sparsity) of matrix products with float32 accumulation, from the vendors' sheets; a card that is not
here, or only under another name, has no known peak, and its speed is measured instead. Laptop cards are left out: their
rate depends on the power that a laptop gives them.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Peak:
    """Dense matrix rate in `dtype` and in fp8 (TFLOP/s; None where there is no fp8) and memory bandwidth (TB/s).

    `dtype` is float16 where a card has no units for bfloat16; the rate's field keeps its name.
    """

    bf16: float
    fp8: float | None
    bandwidth: float
    dtype: str = "bfloat16"


def _fp16(rate: float, bandwidth: float) -> Peak:
    """A card before bfloat16: Volta and Turing."""
    return Peak(rate, None, bandwidth, "float16")


# NVIDIA's data sheets: V100 (Jan 2020), T4 (2019), A2, A10, A30, A40 (2021-22), A100 (Jan 2021), L4, L40, L40S (2023),
# H100 (2023; NVL 2024), H200 (2024), GH200 (2023), HGX B100, B200, B300 and GB200/GB300 NVL72 (2024-25), divided by
# their GPUs. They give tensor rates with sparsity from A100 on: halved here. A10G: AWS's G5, NVIDIA's A10G sheet. H800
# is an H100 with less NVLink, A800 an A100 likewise.
_DATA_CENTER = {
    "Tesla V100-PCIE-16GB": _fp16(112, 0.9),
    "Tesla V100-PCIE-32GB": _fp16(112, 0.9),
    "Tesla V100-SXM2-16GB": _fp16(125, 0.9),
    "Tesla V100-SXM2-32GB": _fp16(125, 0.9),
    "Tesla V100-SXM3-32GB": _fp16(125, 0.9),
    "Tesla V100S-PCIE-32GB": _fp16(130, 1.134),
    "Tesla T4": _fp16(65, 0.32),
    "NVIDIA A2": Peak(18, None, 0.2),
    "NVIDIA A10": Peak(125, None, 0.6),
    "NVIDIA A10G": Peak(70, None, 0.6),
    "NVIDIA A30": Peak(165, None, 0.933),
    "NVIDIA A40": Peak(149.7, None, 0.696),
    "NVIDIA A100-SXM4-40GB": Peak(312, None, 1.555),
    "NVIDIA A100-PCIE-40GB": Peak(312, None, 1.555),
    "NVIDIA A100-SXM4-80GB": Peak(312, None, 2.039),
    "NVIDIA A100 80GB PCIe": Peak(312, None, 1.935),
    "NVIDIA A800-SXM4-80GB": Peak(312, None, 2.039),
    "NVIDIA A800 80GB PCIe": Peak(312, None, 1.935),
    "NVIDIA L4": Peak(121, 242, 0.3),
    "NVIDIA L40": Peak(181, 362, 0.864),
    "NVIDIA L40S": Peak(362, 733, 0.864),
    "NVIDIA H100 80GB HBM3": Peak(989, 1979, 3.35),
    "NVIDIA H100 PCIe": Peak(756, 1513, 2.0),
    "NVIDIA H100 NVL": Peak(835, 1671, 3.9),
    "NVIDIA H800": Peak(989, 1979, 3.35),
    "NVIDIA H200": Peak(989, 1979, 4.8),
    "NVIDIA H200 NVL": Peak(835, 1671, 4.8),
    "NVIDIA GH200 480GB": Peak(989, 1979, 4.0),
    "NVIDIA B100": Peak(1750, 3500, 8.0),
    "NVIDIA B200": Peak(2250, 4500, 8.0),
    "NVIDIA B300 SXM6 AC": Peak(2250, 4500, 8.0),
    "NVIDIA GB200": Peak(2500, 5000, 8.0),
    "NVIDIA GB300": Peak(2500, 5000, 8.0),
}

# NVIDIA's white papers on Turing, GA102, Ada and RTX Blackwell. GeForce cards multiply at half the rate of the same
# chip's workstation cards when they add up in float32: multiprocessors x 512 x boost clock, which gives the papers'
# numbers and those of the cards that they leave out. "RTX 3080" is the card of 10 GB.
_GEFORCE = {
    "NVIDIA GeForce RTX 2060": _fp16(25.8, 0.336),
    "NVIDIA GeForce RTX 2060 SUPER": _fp16(28.7, 0.448),
    "NVIDIA GeForce RTX 2070": _fp16(29.9, 0.448),
    "NVIDIA GeForce RTX 2070 SUPER": _fp16(36.2, 0.448),
    "NVIDIA GeForce RTX 2080": _fp16(40.3, 0.448),
    "NVIDIA GeForce RTX 2080 SUPER": _fp16(44.6, 0.496),
    "NVIDIA GeForce RTX 2080 Ti": _fp16(53.8, 0.616),
    "NVIDIA GeForce RTX 3050": Peak(18.2, None, 0.224),
    "NVIDIA GeForce RTX 3060": Peak(25.5, None, 0.36),
    "NVIDIA GeForce RTX 3060 Ti": Peak(32.4, None, 0.448),
    "NVIDIA GeForce RTX 3070": Peak(40.6, None, 0.448),
    "NVIDIA GeForce RTX 3070 Ti": Peak(43.5, None, 0.608),
    "NVIDIA GeForce RTX 3080": Peak(59.5, None, 0.76),
    "NVIDIA GeForce RTX 3080 Ti": Peak(68.2, None, 0.912),
    "NVIDIA GeForce RTX 3090": Peak(71, None, 0.936),
    "NVIDIA GeForce RTX 3090 Ti": Peak(80, None, 1.008),
    "NVIDIA GeForce RTX 4060": Peak(30.2, 60.5, 0.272),
    "NVIDIA GeForce RTX 4060 Ti": Peak(44.1, 88.3, 0.288),
    "NVIDIA GeForce RTX 4070": Peak(58, 117, 0.504),
    "NVIDIA GeForce RTX 4070 SUPER": Peak(71, 142, 0.504),
    "NVIDIA GeForce RTX 4070 Ti": Peak(80.2, 160.4, 0.504),
    "NVIDIA GeForce RTX 4070 Ti SUPER": Peak(88.2, 176.4, 0.672),
    "NVIDIA GeForce RTX 4080": Peak(97.5, 194.9, 0.717),
    "NVIDIA GeForce RTX 4080 SUPER": Peak(104.4, 208.9, 0.736),
    "NVIDIA GeForce RTX 4090": Peak(165, 330, 1.008),
    "NVIDIA GeForce RTX 4090 D": Peak(147, 294, 1.008),
    "NVIDIA GeForce RTX 5060": Peak(38.4, 76.7, 0.448),
    "NVIDIA GeForce RTX 5060 Ti": Peak(47.4, 94.8, 0.448),
    "NVIDIA GeForce RTX 5070": Peak(61.7, 123.5, 0.672),
    "NVIDIA GeForce RTX 5070 Ti": Peak(87.9, 175.8, 0.896),
    "NVIDIA GeForce RTX 5080": Peak(112.6, 225.1, 0.96),
    "NVIDIA GeForce RTX 5090": Peak(209, 419, 1.792),
}

# NVIDIA's data sheets of the workstation cards: Quadro RTX (2018), RTX A2000 to A6000 (2021-22), RTX 2000 to 6000 Ada
# (2023-24), RTX PRO 6000 Blackwell (2025). Sheets give the fastest rate with sparsity (fp16 x 2 for Ampere, fp8 x 2 for
# Ada, fp4 x 2 for Blackwell). TITAN RTX stands here because its rate is not halved either.
_WORKSTATION = {
    "Quadro RTX 6000": _fp16(130.5, 0.672),
    "Quadro RTX 8000": _fp16(130.5, 0.672),
    "NVIDIA TITAN RTX": _fp16(130.5, 0.672),
    "NVIDIA RTX A2000": Peak(31.9, None, 0.288),
    "NVIDIA RTX A4000": Peak(76.7, None, 0.448),
    "NVIDIA RTX A4500": Peak(94.6, None, 0.64),
    "NVIDIA RTX A5000": Peak(111.1, None, 0.768),
    "NVIDIA RTX A5500": Peak(136.4, None, 0.768),
    "NVIDIA RTX A6000": Peak(154.8, None, 0.768),
    "NVIDIA RTX 2000 Ada Generation": Peak(48, 96, 0.224),
    "NVIDIA RTX 4000 Ada Generation": Peak(106.9, 213.8, 0.36),
    "NVIDIA RTX 4500 Ada Generation": Peak(158.5, 317, 0.432),
    "NVIDIA RTX 5000 Ada Generation": Peak(261.1, 522.2, 0.576),
    "NVIDIA RTX 6000 Ada Generation": Peak(364.2, 728.5, 0.96),
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": Peak(503.8, 1007.6, 1.792),
}

# AMD's data sheets of the Instinct cards: MI250X and MI250 (2021; half a card each, since torch sees a card's two dies
# as two GPUs; where the driver gives both one name, the slower one's rate), MI300A and MI300X (2023), MI325X (2024),
# MI350X and MI355X (2025).
_AMD = {
    "AMD Instinct MI250X/MI250": Peak(181, None, 1.6),
    "AMD Instinct MI250X": Peak(191.5, None, 1.6),
    "AMD Instinct MI300A": Peak(980.6, 1961, 5.3),
    "AMD Instinct MI300X": Peak(1307, 2615, 5.3),
    "AMD Instinct MI325X": Peak(1307, 2615, 6.0),
    "AMD Instinct MI350X": Peak(2307, 4614, 8.0),
    "AMD Instinct MI355X": Peak(2516, 5033, 8.0),
}

PEAKS = {**_DATA_CENTER, **_GEFORCE, **_WORKSTATION, **_AMD}
