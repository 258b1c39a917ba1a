"""Chapter 13: why one kernel is near its roofline and another loses to the compiler."""

import torch

from kernels import OPS
from nanochat.cards import PEAKS
from nanochat.course.chapter import Chapter, near, number, results, table

OP, CASE, TOOK, CARD = "rms_norm", "d24", 0.070, "NVIDIA H100 80GB HBM3"


def picture() -> str:
    """Forward and backward together on an H100: ours, and the fastest of the others."""
    cases: dict[tuple[str, str], list[dict]] = {}
    for row in results("nvidia-h100-80gb-hbm3.json")["rows"]:
        if row["way"] == "both" and row["status"] == "timed":
            cases.setdefault((row["op"], row["case"]), []).append(row)
    lines = []
    for (op, case), rows in cases.items():
        ours = next(row for row in rows if row["contender"] == "triton")
        other = min((row for row in rows if row is not ours), key=lambda row: row["median_ms"])
        lines.append(
            [f"{op}, {case}", f"{ours['median_ms']:.2f}", f"{ours['gb_per_s']:,.0f}", f"{ours['tflop_per_s']:.0f}",
             f"{ours['roofline']:.0%}", f"{other['median_ms']:.2f} ({other['contender']})",
             f"{other['median_ms'] / ours['median_ms']:.2f}"]
        )  # fmt: skip
    return table(["op, case", "ms", "GB/s", "TFLOP/s", "of roofline", "best other, ms", "times its speed"], lines)


def check(answer: str) -> str:
    value, op, peak = number(answer), OPS[OP], PEAKS[CARD]
    case = op.cases[CASE]
    percent = lambda seconds: 100 * 1e3 * seconds / TOOK
    streaming = op.bytes(case, torch.bfloat16) / (peak.bandwidth * 1e12)
    right = percent(max(streaming, op.flops(case) / (peak.bf16 * 1e12)))
    if near(value, right):
        return ""
    if near(value, right / 100):
        return "Right, as a fraction; the question is for percent."
    if near(value, percent(op.flops(case) / (peak.bf16 * 1e12))):
        return "That is the time of its FLOPs. The other limit, of its bytes, is the longer one: it decides."
    if near(value, right / 2) or near(value, 2 * right):
        return "Off by a factor of two: x is read once and y written once, 2 bytes an element."
    return (
        "Least bytes (`bytes` of the op) over the bandwidth, FLOPs over the peak; the longer time, over the time "
        "it took."
    )


CHAPTER = Chapter(
    "The roofline",
    f'A kernel takes {TOOK:.3f} ms for the forward of `{OP}` at case {CASE} in bfloat16 on an "{CARD}". Which '
    "percentage "
    "of its roofline is that?",
    picture,
    check,
)
