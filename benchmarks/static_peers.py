"""Our kernels and Liger-Kernel's, compiled for the same cards and read the same way, side by side.

    pip install liger-kernel;  python -m benchmarks.static_peers

Writes benchmarks/results/static-peers.json and .md. Liger's functions run on small CPU tensors of real widths with the
launch of Triton kernels replaced by a note of it; what is noted is compiled and read as ours is (kernels/targets.py).
No card is involved, so nothing here is a speed.
"""

import importlib.metadata
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kernels import OPS, targets
from kernels.architectures import ALL_TARGETS
from kernels.triton_utils import INSTALLED, Launch, triton
from nanochat.errors import UserError
from nanochat.files import write_atomically
from nanochat.flags import parse, run_script

RESULTS = Path(__file__).parent / "results"
TARGETS = ("sm_80", "sm_90", "sm_100")
DTYPE = torch.bfloat16
C, V, ROWS = 1536, 32768, 64  # nanochat's depth 24; few rows: they decide the grid, not the code


def recorded(call: Callable[[], Any]) -> list[Launch]:
    """The Triton launches of a call, noted instead of done."""
    notes: list[Launch] = []
    from triton.runtime.jit import JITFunction

    before = JITFunction.run

    def note(self: Any, *args: Any, grid: Any, warmup: bool, **constants: Any) -> None:
        notes.append(Launch(self, grid, args, constants))

    JITFunction.run = note
    try:
        call()
    finally:
        JITFunction.run = before
    return list({repr(targets.source(launch)): launch for launch in notes}.values())


def liger() -> dict[str, list[Launch]]:
    """Launches by the name of our op."""
    try:
        from liger_kernel.ops import cross_entropy, fused_linear_cross_entropy, rms_norm, rope
    except ImportError as missing:
        raise UserError(f"Liger-Kernel cannot be compared ({missing}): pip install '.[peers]'") from None

    x, weight = torch.zeros(ROWS, C, dtype=DTYPE), torch.ones(C, dtype=DTYPE)
    rstd, logits = torch.ones(ROWS), torch.zeros(ROWS, V, dtype=DTYPE)
    targets_ = torch.zeros(ROWS, dtype=torch.int64)
    q = torch.zeros(2, ROWS, 12, 128, dtype=DTYPE).transpose(1, 2)  # (B, H, T, D), as Hugging Face lays it out
    angles = torch.zeros(1, ROWS, 128, dtype=DTYPE)

    def norm() -> None:
        y, _, _, block, warps, mode = rms_norm.rms_norm_forward(x, weight, 1e-6, 0.0, "llama", None)
        rms_norm.rms_norm_backward(y, x, weight, rstd, 0.0, mode, block, warps, False, None)

    def rotate() -> None:
        rope.rope_forward(q, q.clone(), angles, angles)
        rope.rope_backward(q, q.clone(), angles, angles)

    def loss() -> None:
        cross_entropy.cross_entropy_forward(
            logits.requires_grad_(), targets_, None, -1, 0.0, 0.0, "mean", 15.0, False, False, False
        )

    def linear_loss() -> None:
        head = torch.zeros(V, C, dtype=DTYPE, requires_grad=True)
        fused_linear_cross_entropy.fused_linear_cross_entropy_forward(
            x.clone().requires_grad_(), head, targets_, ignore_index=-1, softcap=15.0
        )

    calls = dict(rms_norm=norm, rotary=rotate, cross_entropy=loss, linear_cross_entropy=linear_loss)
    return {name: recorded(call) for name, call in calls.items()}


@dataclass
class Flags:
    pass


def main() -> None:
    parse(Flags, __doc__ or "")
    if not INSTALLED:
        raise UserError("comparing needs Triton (pip install triton)")
    try:
        version = importlib.metadata.version("liger-kernel")
    except importlib.metadata.PackageNotFoundError:
        raise UserError("comparing needs Liger-Kernel (pip install liger-kernel)") from None
    rows = []
    for name, launches in liger().items():
        for target in TARGETS:
            case = OPS[name].cases["d24"]
            for whose, found in (("ours", targets.launches(OPS[name], case, DTYPE, target)), ("liger", launches)):
                rows += [dict(targets.build(name, "d24", launch, target), whose=whose) for launch in found]
    result = dict(triton=triton.__version__, liger=version, dtype=str(DTYPE)[6:], rows=rows)
    write_atomically(RESULTS / "static-peers.json", (json.dumps(result, indent=1) + "\n").encode())
    write_atomically(RESULTS / "static-peers.md", table(result).encode())
    print(table(result))


def in_flight(row: dict[str, Any]) -> int:
    """Bytes that a multiprocessor's resident threads ask for at once: a thread's loads times threads that fit."""
    machine = ALL_TARGETS[row["target"]]
    return round(row["occupancy"] * machine.warps * machine.warp * row["load_bytes"])


REASONS = """
What the table says. No kernel spills, and both sides access memory 16 bytes at a time. Bytes in flight are what hides
the memory's latency; about 15 KB a multiprocessor would do on an H100 (3.35 TB/s x 0.6 µs over 132 of them), and all
have a multiple of it, so that none should be short of it; what is faster, only a card can say.

- Norms: our occupancy is lower because a thread holds two rows' worth, and more bytes are in flight than in Liger's.
  Backward also computes 1/rms again, which Liger's reads from memory, and takes registers for that.
- Rotary: Liger's takes all heads of a token at once, 12 padded to 16, a quarter of its lanes masked; ours walks
  over the heads and keeps the angles in registers: fewer bytes in flight, none of them masked.
- Cross-entropy: Liger's takes a whole row of 32,768 with 32 warps, ours blocks of 4,096 with 8, so that four rows
  share a multiprocessor and one row's sum does not hold up the others. Liger's writes the gradient in forward; ours
  reads the logits once more in backward and writes nothing in forward: one pass less where no gradient is wanted.
"""


def table(result: dict[str, Any]) -> str:
    """Markdown, by op and target, ours above Liger's."""
    text = (
        "# Ours and Liger-Kernel's, as machine code\n\n"
        f"Compiled by Triton {result['triton']} in {result['dtype']} at nanochat's depth 24; Liger-Kernel "
        f"{result['liger']}.\nRead from the machine code by `python -m benchmarks.static_peers`; not a speed. "
        "*In flight*: bytes that the\nthreads resident on a multiprocessor ask for at once (loops count once).\n\n"
        "| op | target | whose | kernel | registers | spilled | shared memory | occupancy | access | in flight |\n"
        "|---|---|---|---|---|---|---|---|---|---|\n"
    )
    for row in result["rows"]:
        first = f"| {row['op']} | {row['target']} | {row['whose']} | {row['kernel']} | "
        if row["error"]:
            text += first + f"{row['error']} ||||||\n"
            continue
        text += first + (
            f"{row['registers']} | {row['spill_bytes']} | {row['shared_bytes']:,} | {row['occupancy']:.0%} "
            f"| {row['access_bytes']} B | {in_flight(row) / 1024:.0f} KB |\n"
        )
    return text + REASONS


if __name__ == "__main__":
    run_script(main, goes_on=True)
