"""Block sizes as data: tables by architecture, and the question whether a kernel is worth its launch. A leaf.

`default.json` holds static rows, chosen by reasoning and not measured (an architecture's own file may have such, too).
Measured ones come first: those of this machine's cards (measured.py), then those that somebody has committed as
`<arch>.json` (sm_90.json, …). A row is for one kernel and dtype ("*": any) and sizes up to `up_to`; the first that fits
counts. An op may share the rows of another, named in place of its own. A measured row also has the milliseconds of the
kernel, and those of the compiled reference where it was measured beside it; `measured_with` names the op that the rows
were searched with, where it is not their owner, and `measured` says on what.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .. import measured as kept
from ..architectures import LIKE
from ..constant import constant

FOLDER = Path(__file__).parent
Row = dict[str, Any]
COUNTED = dict(streaming="streaming bytes", peak="memory", flops="FLOPs")  # columns of counts.json
# By less than a hundredth the counts are for the reference of these; its generated code breaks a promise of ours.
KEPT = {"fp8_add_rms_norm": "the compiled reference touches memory 8 bytes at a time"}
FASTER, FASTER_MS = 0.95, 0.002  # by so much less the reference's time must be to count: two medians, an event's step
UNPROVEN = ("linear_relu2", "mlp_relu2")  # faster only if our GEMM comes near cuBLAS's: to be shown first
# In float32 their products are IEEE's, on the ordinary units, where PyTorch's have TF32: to be shown too.
PRODUCTS = ("polar_express", "newton_schulz", "flash_attention")
STATE = ("muon_momentum_", "muon_update_", "adamw_")  # in float32 in every training; the counts' other ops in bfloat16


@cache
def table(arch: str) -> dict[str, Any]:
    """Rows by op; empty where nothing was measured. Raises ValueError for a file that is damaged."""
    path = FOLDER / f"{arch}.json"
    try:
        return json.loads(path.read_bytes()) if path.exists() else {}
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is damaged: it is no JSON; take it from the repository again") from None


def ops() -> list[str]:
    """The ops that have a Triton kernel."""
    return [name for name in table("default") if not name.endswith("_backward")]


_trial: tuple[str, dict[str, int]] | None = None  # (name of rows, config) that come before all others


@contextmanager
def trial(name: str, config: dict[str, int]) -> Iterator[None]:
    """Within it, the rows of this name are one, with this config: for the tuner."""
    global _trial
    before, _trial = _trial, (owner(name), config)
    try:
        yield
    finally:
        _trial = before


_assumed = ""  # the architecture whose rows meta tensors take, while something is compiled for it


@contextmanager
def assume(arch: str) -> Iterator[None]:
    """Within it, launches on meta tensors use this architecture's rows."""
    global _assumed
    before, _assumed = _assumed, arch
    try:
        yield
    finally:
        _assumed = before


@cache
def architecture(index: int) -> str:
    """Of a GPU: "sm_90", or on ROCm "gfx942"."""
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def owner(op: str) -> str:
    """The op whose rows this one uses: itself, or the one that it shares them with."""
    entry = table("default")[op]
    return entry if isinstance(entry, str) else op


def rows(op: str, dtype: torch.dtype, size: int, device: torch.device) -> list[Row]:
    """All rows that fit: measured ones first, the architecture's, those of the one it is like, the default's."""
    if _trial and owner(op) == _trial[0]:
        return [dict(config=_trial[1])]
    index = device.index or 0
    arch, mine = (architecture(index), kept.blocks(index)) if device.type == "cuda" else (_assumed, {})
    alike = [row for row in _of(table(LIKE.get(arch, "")), op) if "ms" not in row]  # measured there says nothing here
    found = mine.get(op, []) + mine.get(owner(op), []) + _of(table(arch), op) + alike + _of(table("default"), op)
    return [row for row in found if row["dtype"] in ("*", str(dtype)[6:]) and size <= row.get("up_to", size)]


def _of(rows_by_op: dict[str, Any], op: str) -> list[Row]:
    found = rows_by_op.get(op, [])
    return rows_by_op.get(found, []) if isinstance(found, str) else found


def config(op: str, dtype: torch.dtype, size: int, device: torch.device) -> dict[str, int]:
    """Block sizes, num_warps and num_stages for an op's kernels. Raises ValueError when no row fits."""
    found = rows(op, dtype, size, device)
    if not found:
        raise ValueError(f"{op}: no row of kernels/tuned/default.json is for {dtype} at size {size}")
    return dict(found[0]["config"])


@constant
def value(op: str, key: str, dtype: torch.dtype, size: int, device: torch.device) -> int:
    """One number of an op's config, where code that `torch.compile` traces needs it."""
    return config(op, dtype, size, device)[key]


def measured(op: str, dtype: torch.dtype, size: int, device: torch.device) -> Row | None:
    """The row by which an op was measured beside the compiled reference on such a card, if it was."""
    return next((row for row in rows(op, dtype, size, device) if "reference_ms" in row), None)


def counted(op: str, dtype: torch.dtype, device: torch.device) -> Row | None:
    """What the compiled step is with an op's kernels, in shares of what it is without, as counted for such a card.

    None where the op has other bytes than in the step that was counted, one in bfloat16.
    """
    if dtype.itemsize != 2 and op not in STATE:
        return None
    arch, found = architecture(device.index or 0), table("counts")
    return found.get(arch, found.get(LIKE.get(arch, ""), {})).get(op)


def pays(row: Row) -> bool:
    """Whether a step with an op's kernels moves fewer bytes, holds less memory or multiplies less; not at a tie."""
    return min(row[what] for what in COUNTED) < 1


def verdict(op: str, dtype: torch.dtype, size: int, device: torch.device, compiled: bool) -> tuple[bool, str]:
    """Whether an op's kernels are taken on a GPU on which they are right, and by which rule.

    Measured beside the compiled reference on such a card, the times decide; else, in code that torch.compile traces,
    the counts of the compiled step, but for KEPT; else they are taken, but those of UNPROVEN, and PRODUCTS in float32.
    """
    if row := measured(op, dtype, size, device):
        least = row["ms"] if op in UNPROVEN else min(FASTER * row["ms"], row["ms"] - FASTER_MS)
        return row["reference_ms"] >= least, (
            f"measured on this kind of card: {row['ms']:.3g} ms, {row['reference_ms']:.3g} by torch.compile"
        )
    if op in UNPROVEN or (op in PRODUCTS and dtype == torch.float32):
        return False, "default: torch.compile where no measurement says that our products are as fast as the vendor's"
    if compiled and (row := counted(op, dtype, device)):
        shares = ", ".join(f"{row[what]:.3f} of its {said}" for what, said in COUNTED.items())
        kept = f"; kept all the same: {KEPT[op]}" if op in KEPT and not pays(row) else ""
        return pays(row) or bool(kept), f"counts of the compiled step: {shares}, with our kernels{kept}"
    return True, "default: our kernels where nothing else is known"
