"""How long a call of an op should take on a card, before anything was run: a PREDICTION with its band, always.

    t = t0 + max(bytes / bandwidth, FLOPs / products' rate · waves, instructions / issue slots, shared-memory bytes)

Rates are of cards.py, or of the card's own calibration file. Instructions are counted in the machine code
(kernels/machine_code.py) of kernels without a loop; of one that loops, only what it must move or multiply is known, and
its time can only be longer than said. The bands are what published measurements left of such predictions
(points.py): a streaming kernel is within 30% on a card that nobody calibrated and 10% on one that was, a
product usually within 15%, one in ten is off by more than 35%.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kernels.architectures import ALL_TARGETS
from profiling.predicted.cards import Card

LARGE = 32e6  # bytes: from there on a kernel is said to stream
BACKWARD = 0.8  # of the rate of attention's forward is what its backward reaches
PRODUCTS = 16  # FLOPs a byte: only matrix products do more

# Relative errors: (usual, nine in ten are within it).
CALIBRATED, FITTED, SMALL, PRODUCT = (0.10, 0.10), (0.30, 0.30), (0.25, 0.25), (0.15, 0.35)

# Ops that loop over exponentials beside what they move or multiply: a lower bound is all that is known.
LOOPED = re.compile(r"cross_entropy|attention")


@dataclass(frozen=True)
class Prediction:
    """parts: seconds that each resource alone would take; the longest of them is the bound."""

    seconds: float
    bound: str
    parts: dict[str, float]
    usual: float  # relative error; of no meaning for a lower bound
    band: float
    lower_bound: bool
    calibrated: str

    @property
    def low(self) -> float:
        return self.seconds if self.lower_bound else self.seconds * (1 - self.band)

    @property
    def high(self) -> float:
        return math.inf if self.lower_bound else self.seconds * (1 + self.band)

    def __str__(self) -> str:
        if self.lower_bound:
            said = f"predicted at least {time_text(self.seconds)}"
        else:
            said = f"predicted {time_text(self.seconds)} ±{self.usual:.0%}"
            said += f" (±{self.band:.0%} in nine of ten)" if self.band > self.usual else ""
        return f"{said}, bound by {self.bound}"

    def cell(self) -> str:
        """The same on two lines that do not break, for a table."""
        said, _, bound = str(self).partition(", bound by ")
        said, _, wide = said.partition(" (")
        return f"{said}\n{bound}{', ' if wide else ''}{wide[:-1]}".replace(" ", "\u00a0")


def time_text(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.3g} µs"


def predict(
    chip: Card, op: str, moved: float, flops: float, kernels: Sequence[dict[str, Any]] = (), asked: float = 1.0
) -> Prediction:
    """A call of an op's forward. moved: bytes that must go to and from memory; kernels: rows of what it launches
    (static/launches.py), without those that did not compile; asked: bytes that they ask for, of those that must
    move. What is asked for twice may come out of a cache: it widens the band upwards, by no more than itself."""
    parts = {"memory": moved / chip.stream}
    product = flops > PRODUCTS * moved
    if product:
        rate = chip.attention * chip.bf16 if "attention" in op else chip.products(op.startswith("fp8_"))
        parts["tensor cores"] = flops / rate * waves(chip, kernels)
    if issued := sum(instructions(row) for row in kernels if not row["looped"]):
        parts["issue slots"] = issued / (slots(chip) * chip.sms * chip.clock)
    if shared := sum(shared_bytes(row) for row in kernels if not row["looped"]):
        parts["shared memory"] = shared / (128 * chip.sms * chip.clock)
    bound = max(parts, key=lambda part: parts[part])
    if product:
        usual, band = PRODUCT
    elif moved >= LARGE:
        usual, band = CALIBRATED if chip.calibrated else FITTED
    else:
        usual, band = SMALL if chip.calibrated else FITTED
    if not product and bound == "memory":
        band = max(band, min(asked, 2.0) - 1)
    looped = bool(LOOPED.search(op)) or (not product and any(row["looped"] for row in kernels))
    return Prediction(chip.launch + parts[bound], bound, parts, usual, band, looped, chip.calibrated)


def slots(chip: Card) -> int:
    """Warp instructions a clock: one for each of an SM's four partitions; a CDNA SIMD takes four clocks for each."""
    return 4 if ALL_TARGETS[chip.target].backend == "cuda" else 1


def instructions(row: dict[str, Any]) -> float:
    """Warp instructions of all its launches."""
    return sum(row["mix"].values()) * row["warps"] * row["programs"] * row["times"]


def shared_bytes(row: dict[str, Any]) -> float:
    """Bytes to and from shared memory of all its launches."""
    of_thread = sum(
        count * int(name.split(".")[1]) / 8
        for name, count in row["mix"].items()
        if re.match(r"(LDSM|LDS|STSM|STS|ds_read|ds_write)\.", name)
    )
    return of_thread * ALL_TARGETS[row["target"]].warp * row["warps"] * row["programs"] * row["times"]


def waves(chip: Card, kernels: Sequence[dict[str, Any]]) -> float:
    """How much longer the largest product takes because its last wave of blocks does not fill the card."""
    dots = [row for row in kernels if row["dot_rows"] and row["occupancy"]]
    if not dots:
        return 1.0  # a library's product, whose tiles are not known
    row = max(dots, key=lambda row: row["programs"])
    resident = row["occupancy"] * ALL_TARGETS[row["target"]].warps / row["warps"]
    full = row["programs"] / (chip.sms * resident)
    return math.ceil(full) / full
