"""Published measurements beside what our models predict: `python -m profiling points`.

Kernels: t = launch + max(bytes / streaming bandwidth, FLOPs / (gemm · peak)). Steps: simulate.py.
All-reduces: cards.py. Points that a constant was fitted on are marked; the others say how far the prediction
can be trusted, and a test holds them to their bands. Sources: nanochat's log and discussions, Liger-Kernel's, quack's,
FlashAttention-3's and NVIDIA's published benchmarks, as collected in this project's design.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nanochat.flags import parse
from nanochat.recipe import model_config
from profiling.predicted.cards import all_reduce, card, names
from profiling.predicted.simulate import Job, seconds


@dataclass(frozen=True)
class Point:
    """Measured and predicted in one unit; band: relative error allowed; exception: why one lies outside it."""

    hardware: str
    what: str
    measured: float
    unit: str
    predict: Callable[[], float]
    band: float
    fitted: bool = False
    exception: str = ""

    @property
    def error(self) -> float:
        return self.predict() / self.measured - 1


def streamed(name: str, moved: float) -> float:
    """Seconds of a kernel that moves bytes."""
    return card(name).launch + moved / card(name).stream


def multiplied(name: str, flops: float, fp8: bool = False) -> float:
    """Seconds of a matrix product."""
    return card(name).launch + flops / card(name).products(fp8)


def best(name: str, fp8: bool = False) -> float:
    """TFLOP/s that a step's products are taken to reach."""
    return card(name).products(fp8) / 1e12


def trained(name: str, depth: int, **job: Any) -> float:
    """Seconds of a training step."""
    return seconds(Job(model_config(depth, 32768), card(name), **job))


def bus(size: int) -> float:
    """GB/s of an all-reduce on 8 H200, counted as NCCL's tests do: 2·(n-1)/n of its bytes."""
    return 2 * 7 / 8 * size / all_reduce(card("H200"), size, 8) / 1e9


H8 = "8 x H100"
MLP = 2 * 65536 * 1664 * 6656
WIDE = 4096 * 16384 * 2  # bytes
ROWS = 4096 * 32768 * 2

POINTS = [
    Point(H8, "d24 bf16, short windows 1024", 655.5, "ms", lambda: 1e3 * trained("H100", 24, short=1024), 0.15,
          fitted=True),
    Point(H8, "d26 fp8, 0.5M tokens", 705, "ms", lambda: 1e3 * trained("H100", 26, variant="fp8 loop"), 0.15),
    Point(H8, "d26 fp8, 1M tokens", 1373, "ms",
          lambda: 1e3 * trained("H100", 26, variant="fp8 loop", total=1 << 20), 0.15),
    Point("8 x A100", "d20, taken as today's architecture", 990, "ms",
          lambda: 1e3 * trained("A100", 20, short=1024), 0.15),
    Point("RTX 4070", "d12", 55.7, "K tok/s", lambda: 524.288 / trained("RTX 4070", 12, gpus=1, batch=4), 0.15,
          exception="needs about 74% of the assumed peak: this card clocks above its data sheet"),
    Point("H100", "65536x1664 by 1664x6656, bf16", 2.00, "ms", lambda: 1e3 * multiplied("H100", MLP), 0.35),
    Point("H100", "the same in fp8", 1.45, "ms", lambda: 1e3 * multiplied("H100", MLP, fp8=True), 0.35),
    Point("A100", "X·Xᵀ of 4096", 0.664, "ms", lambda: 1e3 * multiplied("A100", 2 * 4096**3), 0.35),
    Point("A100", "X·Xᵀ of 8192", 5.16, "ms", lambda: 1e3 * multiplied("A100", 2 * 8192**3), 0.35),
    Point("H100", "best bf16 product", 794.5, "TFLOP/s", lambda: best("H100"), 0.35, fitted=True),
    Point("H100", "best fp8 product", 1403, "TFLOP/s", lambda: best("H100", fp8=True), 0.35),
    Point("A100", "best bf16 product", 271, "TFLOP/s", lambda: best("A100"), 0.35, fitted=True),
    Point("B200", "best bf16 product", 1745, "TFLOP/s", lambda: best("B200"), 0.35, fitted=True),
    Point("H100", "copy 16384x32768 bf16", 3003, "GB/s", lambda: card("H100").stream / 1e9, 0.10),
    Point("H100", "softmax float32 16K x 131K", 3.01, "TB/s", lambda: card("H100").stream / 1e12, 0.10),
    Point("H100", "relu² forward 4096x16384", 94.4, "µs", lambda: 1e6 * streamed("H100", 2 * WIDE), 0.10),
    Point("H100", "relu² backward", 137.1, "µs", lambda: 1e6 * streamed("H100", 3 * WIDE), 0.10),
    Point("H100", "RMSNorm 4096x2048", 17.6, "µs", lambda: 1e6 * streamed("H100", WIDE / 4), 0.25),
    Point("H100", "RMSNorm 4096x16384", 95.0, "µs", lambda: 1e6 * streamed("H100", 2 * WIDE), 0.10, fitted=True),
    Point("A100", "RMSNorm 2048x16384", 95.3, "µs", lambda: 1e6 * streamed("A100", WIDE), 0.30),
    Point("RTX 5090", "RMSNorm 4096x32768", 1520, "GB/s", lambda: 2e-9 * ROWS / streamed("RTX 5090", 2 * ROWS), 0.30),
    Point("RTX 5090", "CE forward 4096x32768", 1517, "GB/s", lambda: 1e-9 * ROWS / streamed("RTX 5090", ROWS), 0.30),
    Point("RTX 5090", "CE backward", 1466, "GB/s", lambda: 2e-9 * ROWS / streamed("RTX 5090", 2 * ROWS), 0.30),
    Point("H100", "FA3 forward (8, 16, 2048, 128)", 566, "TFLOP/s",
          lambda: card("H100").attention * card("H100").bf16 / 1e12, 0.15, fitted=True),
    Point("8 x H200", "all-reduce 1 MiB", 40, "GB/s", lambda: bus(1 << 20), 0.15, fitted=True),
    Point("8 x H200", "all-reduce 16 MiB", 220, "GB/s", lambda: bus(16 << 20), 0.15, fitted=True),
    Point("8 x H200", "all-reduce 256 MiB", 436, "GB/s", lambda: bus(256 << 20), 0.15),
    Point("8 x H200", "all-reduce 8 GiB", 477, "GB/s", lambda: bus(8 << 30), 0.15, fitted=True),
]  # fmt: skip


def table() -> str:
    """Markdown: every point, its residual and its band."""
    text = "| hardware | what | measured | predicted | error | band | |\n|---|---|---|---|---|---|---|\n"
    for p in POINTS:
        note = "fitted" if p.fitted else p.exception
        text += f"| {p.hardware} | {p.what} | {p.measured:g} {p.unit} | {p.predict():.4g} | {p.error:+.0%} "
        text += f"| ±{p.band:.0%} | {note} |\n"
    return text


@dataclass
class Flags:
    pass


def main() -> None:
    parse(Flags, __doc__ or "")
    used = [f"{name} {card(name).constants}" for name in names() if card(name).calibrated]
    print(f"PREDICTED with {'; '.join(used) or 'the fitted constants of cards.py'}.\n")
    print(table())
    rows = [dict(hardware=p.hardware, what=p.what, measured=p.measured, unit=p.unit, predicted=p.predict(),
                 error=p.error, band=p.band, fitted=p.fitted, exception=p.exception) for p in POINTS]  # fmt: skip
    print(json.dumps(rows, ensure_ascii=False))
