"""`python -m kernels readme`: writes kernels/README.md from compiling every kernel and from running them interpreted.

Compiling and interpreting exclude each other in one process, so each has one of its own. No number in the result is
typed in: all are read from machine code, counted in the interpreter, or computed from the registry.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from . import architectures, measured, traffic, tuned
from .registry import OPS
from .triton_utils import INSTALLED, triton

PATH = Path(__file__).parent / "README.md"
CASE = "d4"  # small enough to interpret
SHAPE, DTYPE = "d24", "bfloat16"


def in_child(*words: str, interpret: bool) -> Any:
    """The JSON that a command prints. Raises ValueError with its message when it fails."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    made = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, env=environment)
    if not made.stdout.startswith(("[", "{")):
        raise ValueError(f"`python -m {' '.join(words)}` failed: {made.stderr.strip()[-400:]}")
    return json.loads(made.stdout)


def counted() -> dict[str, Any]:
    """For each op with a kernel: bytes and FLOPs counted at CASE in float32, and the least there could be."""
    table = {}
    for name in tuned.ops():
        op = OPS[name]
        case = op.cases.get(CASE) or min(op.cases.values(), key=lambda case: op.bytes(case, torch.float32))
        forward, backward = traffic.of_op(op, case, torch.float32)
        table[name] = dict(
            least=op.bytes(case, torch.float32),
            forward=forward.read + forward.written,
            backward=backward.read + backward.written,
            flops=forward.flops,
        )
    return table


def tiles(T: int, pattern: tuple[int | None, ...]) -> dict[str, list[float]]:
    """Attention's tiles over layers with these windows: {"forward": [visited, needed], "backward": …}."""
    op, found = OPS["flash_attention"], dict(forward=[0.0, 0.0], backward=[0.0, 0.0])
    parts = (tuned.table("default")[f"flash_attention_{part}"] for part in ("dq_backward", "backward"))
    dq, dkdv = ([row["config"] for row in part if row["dtype"] == "float32"] for part in parts)
    assert dq == dkdv  # or products would be of tiles of two sizes
    for window in pattern:
        case = dict(B=1, T=T, H=1, K=1, D=16, W=-1 if window is None else window)
        counts = dict(zip(found, traffic.of_op(op, case, torch.float32)))
        for way, name, products in (("forward", "flash_attention", 2), ("backward", "flash_attention_backward", 7)):
            config = tuned.config(name, torch.float32, 16, torch.device("cpu"))
            rows, columns = config["BLOCK_M"], config["BLOCK_N"]
            found[way][0] += counts[way].flops / (products * 2 * rows * columns * 16)
            found[way][1] += needed_tiles(T, T, window, rows, columns)
    return found


def needed_tiles(T: int, S: int, window: int | None, rows: int, columns: int) -> int:
    """Tiles (rows of queries, columns of keys) that hold a visible pair, by looking at every pair."""
    i, j = torch.arange(T)[:, None] + S - T, torch.arange(S)[None]
    seen = (j <= i) & (j >= i - (S if window is None else window))
    return sum(bool(part.any()) for band in seen.split(rows) for part in band.split(columns, dim=1))


def symmetric_share(size: int = 1536) -> float:
    """FLOPs of the symmetric product's kernel at (size, size), of the 2·size³ of a full product."""
    from .newton_schulz import _symmetric_product

    with traffic.counting() as count:
        _symmetric_product(torch.zeros(1, size, size, dtype=torch.float16), None, 1.0, 0.0, False)
    return count.flops / (2 * size**3)


def write() -> None:
    """Raises ValueError when Triton is missing or a kernel breaks a promise."""
    if not INSTALLED:
        raise ValueError("writing kernels/README.md needs Triton (pip install triton)")
    print("compiling every kernel for every target: minutes …", file=sys.stderr, flush=True)
    rows = in_child("kernels", "compile", "--shape", SHAPE, "--dtype", DTYPE, "--json", interpret=False)
    print(
        "running every kernel in the interpreter, counting its loads and stores: minutes …", file=sys.stderr, flush=True
    )
    found = in_child("kernels.readme", interpret=True)
    measured.replace(PATH, text(rows, found["counted"], found["symmetric_share"], found["tiles"]))
    print(f"written: {PATH}")


HEAD = """# What the kernels become on real cards

Written by `python -m kernels readme`; change nothing by hand. Which implementation runs on your machine, and why:
`python -m kernels`. To read one op, open its file: formula, cost, reference, kernel, public function, in that order.

## Machine code, {dtype}, shapes of {shape}

Compiled ahead of time by Triton {triton}, read with nvdisasm and cuobjdump (AMD: from the assembly). No card was
involved; none of this is a speed. *Access*: bytes of the memory instruction through which most data flows (16 is the
widest that all have). *Occupancy*: warps that fit on a multiprocessor, of the most it can hold.

| kernel | of op | target | registers | spilled bytes | shared memory | occupancy | access | tensor core | float64 |
|---|---|---|---|---|---|---|---|---|---|
"""

TRAFFIC = """
## Bytes asked for, against the least

Counted in Triton's interpreter at {case}, float32: every element loaded or stored that no mask hides, before any cache.
1.00 means that nothing is read twice. *Least* is the forward's: inputs once, results once. What cuBLAS does, and
PyTorch's own passes between two kernels, are not in it.

| op | least, forward | forward | ratio | backward |
|---|---|---|---|---|
"""

NOTES = """
- The fp8 ops are compiled for cards whose fp8 formats they speak: {without}.
{refused}
- fp8 norms walk over their rows twice, the second time in cache; fp8 products round x, the weights and the gradient,
  each read once for its maximum and once to be rounded (the least has no rounding in it).
- cross_entropy reads its row once for the loss and once more, from L2, in backward.
- linear_cross_entropy's kernel walks twice over logits that are in cache and writes their gradient in place. Its
  least is x and the weight alone, since the logits never reach memory as a whole.
- The Muon parts read once more what a norm of the row or matrix must be known for.
- The Newton–Schulz ops load each tile of X as often as a tile of the result needs it. The symmetric product at 1536
  does {share:.1%} of a full product's FLOPs.
"""


TILES = """
## Attention's tiles for SSSL at T = 2048

Three layers with a window of 512 and one without, counted from the products that the interpreter does; needed are those
with a visible (query, key) pair. Backward makes the scores twice (for dq, and for dk and dv).

| | visited | needed | ratio |
|---|---|---|---|
"""


def text(rows: list[dict[str, Any]], moved: dict[str, Any], share: float, visited: dict[str, list[float]]) -> str:
    """The whole README."""
    made = HEAD.format(dtype=DTYPE, shape=SHAPE, triton=triton.__version__)
    seen = set()
    for row in rows:
        cells = [f"{row[key]}" for key in ("kernel", "op", "target")]
        if row["error"]:
            cells += [row["error"], *[""] * 6]
        else:
            spilled = f"{row['spill_bytes']}" + (f" ({row['spill_reason']})" if row["spill_reason"] else "")
            cells += [f"{row['registers']}", spilled, f"{row['shared_bytes']:,}", f"{row['occupancy']:.0%}"]
            cells += [f"{row['access_bytes']} B", row["tensor_core"] or "–", f"{row['float64_instructions']}"]
        if tuple(cells) not in seen:
            seen.add(tuple(cells))
            made += f"| {' | '.join(cells)} |\n"
    made += TRAFFIC.format(case=CASE)
    for name, row in moved.items():
        ratio = f"{row['forward'] / row['least']:.2f}" if row["forward"] else "PyTorch's own"
        made += f"| {name} | {row['least']:,} | {row['forward']:,} | {ratio} | {row['backward']:,} |\n"
    without = "; ".join(f"{target} {why}" for target, why in architectures.NO_FP8.items())
    made += NOTES.format(share=share, without=without, refused=refusals()) + TILES
    for way, (found, least) in visited.items():
        made += f"| {way} | {found:,.0f} | {least:,} | {found / least:.2f} |\n"
    return made


def refusals() -> str:
    """A line for each reason why ops are not for an architecture."""
    found: dict[tuple[str, str], list[str]] = {}
    for (op, arch), why in architectures.REFUSED.items():
        found.setdefault((arch, why), []).append(op)
    return "\n".join(f"- Not compiled for {arch}: {', '.join(ops)}; {why}." for (arch, why), ops in found.items())


if __name__ == "__main__":
    pattern = (512, 512, 512, None)  # SSSL
    print(json.dumps(dict(counted=counted(), symmetric_share=symmetric_share(), tiles=tiles(2048, pattern))))
