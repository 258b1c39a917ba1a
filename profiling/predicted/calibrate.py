"""Measures what this GPU reaches of its data sheet: `python -m profiling calibrate`, a minute or two.

Launches, streaming (copy and triad of several sizes), matrix products of the model's shapes and attention's forward in
the dtype that training takes here ("bf16" in the file stands for float16 on a T4), products in fp8. The rates go into
profiling/calibration/<gpu>.json with what they were measured with; from then on cards.card() takes them instead of the
fitted constants, and every report that uses them says "calibrated" and the day.
"""

import datetime
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kernels import OPS
from kernels.triton_utils import INSTALLED, triton
from kernels.tuning import timed
from nanochat import drivers
from nanochat.errors import UserError
from nanochat.files import write_atomically
from nanochat.flags import parse
from nanochat.hardware import compute_dtype
from profiling import nvml
from profiling.predicted import cards

SIZES = (32 << 20, 128 << 20, 512 << 20)  # bytes of an operand
MOVED = {"copy": 2, "triad": 3}  # operands read or written: y = x, z = x + 2·y
# (M, N, K) of the products at depth 12 and 24: attention's projections, the MLP's two, the head for some rows.
PRODUCTS = ((65536, 768, 768), (65536, 3072, 768), (65536, 768, 3072), (32768, 1536, 1536), (32768, 6144, 1536),
            (32768, 1536, 6144), (8192, 32768, 1536))  # fmt: skip
ATTENTION = dict(B=16, T=2048, H=12, K=12, D=128, W=-1)

Seconds = Callable[[str, tuple[int, ...]], float]  # (what, sizes) → seconds of one call


def rates(seconds: Seconds, fp8: bool) -> tuple[dict[str, float | None], list[dict[str, Any]]]:
    """(the rates that cards.py takes, every single measurement)."""
    launch = seconds("launch", ())
    notes: list[dict[str, Any]] = [dict(what="launch", sizes=[], seconds=launch)]

    def measure(what: str, sizes: tuple[int, ...], work: float) -> tuple[float, float]:
        """(work, seconds beyond those of a launch). Raises UserError for a time that cannot be."""
        took = seconds(what, sizes)
        if not took > launch:
            raise UserError(f"{what} {sizes} took {took:.3g} s, no longer than an empty launch: is the GPU shared?")
        notes.append(dict(what=what, sizes=list(sizes), seconds=took, per_s=work / (took - launch)))
        return work, took - launch

    def together(made: list[tuple[float, float]]) -> float:
        """Work a second over all of them: as a step that does one after the other."""
        return sum(work for work, _ in made) / sum(took for _, took in made)

    moved = [measure(what, (size,), passes * size) for what, passes in MOVED.items() for size in SIZES]
    products = {
        kind: together([measure(kind, shape, 2.0 * shape[0] * shape[1] * shape[2]) for shape in PRODUCTS])
        for kind in (("bf16", "fp8") if fp8 else ("bf16",))
    }

    def attention() -> tuple[float, float]:
        """Of fewer rows where so many do not fit: torch's own may keep all scores."""
        for case in (ATTENTION, ATTENTION | dict(B=4)):
            try:
                return measure("attention", tuple(case.values()), OPS["flash_attention"].flops(case))
            except torch.OutOfMemoryError:
                continue
        case = ATTENTION | dict(B=1)
        return measure("attention", tuple(case.values()), OPS["flash_attention"].flops(case))

    return dict(
        launch_s=launch,
        stream_bytes_per_s=statistics.median(work / took for work, took in moved),
        bf16_flop_per_s=products["bf16"],
        fp8_flop_per_s=products.get("fp8"),
        attention_flop_per_s=together([attention()]),
    ), notes


def on_gpu(what: str, sizes: tuple[int, ...], dtype: torch.dtype) -> float:
    """Seconds of a call on this GPU: the median of some, with the cache swept between."""
    return timed([call(what, sizes, dtype)])[0] / 1e3


def call(what: str, sizes: tuple[int, ...], dtype: torch.dtype, device: str = "cuda") -> Callable[[], Any]:
    """What is measured, with its operands on the GPU; random ones, because zeros make products faster."""
    make = lambda *shape: torch.randn(*shape, device=device, dtype=dtype)
    if what == "launch":
        one = torch.zeros(1, device=device)
        return lambda: one.zero_()
    if what in MOVED:
        x, y, z = (make(sizes[0] // dtype.itemsize) for _ in range(3))
        return (lambda: y.copy_(x)) if what == "copy" else (lambda: torch.add(x, y, alpha=2, out=z))
    if what == "attention":
        op = OPS["flash_attention"]
        inputs = op.inputs(dict(zip(ATTENTION, sizes)), dtype, device)
        return lambda: op.fn(**inputs)
    M, N, K = sizes
    a, b = make(M, K), make(N, K)
    if what == "bf16":
        return lambda: a @ b.t()
    small_a, small_b = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
    scale = torch.ones((), device=device)
    return lambda: torch._scaled_mm(
        small_a, small_b, scale_a=scale, scale_b=scale, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def calibrate(name: str, seconds: Seconds, fp8: bool, environment: dict[str, Any], folder: Path) -> Path:
    """Measures and writes the file of the GPU of this name (as its driver reports it).

    Raises UserError where its memory is too small, or times cannot be.
    """
    try:
        found, notes = rates(seconds, fp8)
    except torch.OutOfMemoryError:
        raise UserError("what calibrating measures does not fit in the memory that is free on this GPU") from None
    made = dict(
        version=cards.VERSION, gpu=name, date=str(datetime.date.today()), rates=found, environment=environment,
        measurements=notes,
    )  # fmt: skip
    path = folder / f"{cards.slug(name)}.json"
    write_atomically(path, (json.dumps(made, indent=1) + "\n").encode())
    return path


@dataclass
class Flags:
    """None; CUDA_VISIBLE_DEVICES says which GPU."""


def main() -> None:
    parse(Flags, __doc__ or "")
    if not torch.cuda.is_available():
        why = drivers.unusable()[0] or "torch sees no CUDA device here"
        raise UserError(f"calibrating measures a GPU, and {why}; fitted constants are used")
    name = torch.cuda.get_device_name()
    before = nvml.snapshot()
    dtype, _ = compute_dtype(torch.device("cuda"))
    environment = dict(dtype=str(dtype)[6:], torch=torch.__version__, cuda=torch.version.cuda, hip=torch.version.hip,
                       triton=triton.__version__ if INSTALLED else None, before=before)  # fmt: skip
    fp8 = not torch.version.hip and torch.cuda.get_device_capability() >= (8, 9)

    def measured(what: str, sizes: tuple[int, ...]) -> float:
        took = on_gpu(what, sizes, dtype)
        environment["after"] = nvml.snapshot()  # clocks of a card that is warm: of the last one stays
        return took

    path = calibrate(name, measured, fp8, environment, cards.FOLDER)
    made = cards.read(path)
    for row in made["measurements"]:
        speed = f"{row['per_s'] / 1e12:9.3f} T/s" if "per_s" in row else ""
        print(f"{row['what']:10} {str(tuple(row['sizes'])):32} {1e6 * row['seconds']:10.1f} µs {speed}")
    if not isinstance(cards.by_driver(name), cards.Card):
        print(f"cards.py has no row for {name!r} yet: until then no report can use the file")
    print(f"written: {path}")
    print(json.dumps(dict(gpu=name, file=str(path), date=made["date"], **made["rates"])))
