"""What a run of the suite covers: cases, minutes, repeats, and which contenders are left out with what reason.

`smoke` shows on any CPU in a minute that everything works; its shapes are too small to say anything about speed.
`quick` is for one GPU and planned for 8 minutes: every op, two sizes; `full` takes all sizes and about an hour. Being
late costs repeats (benchmarks/timer.py), never an op; how long a compiler takes is not bounded.
"""

from dataclasses import dataclass

import torch

from benchmarks.ops import SETTINGS, Bench, Machine
from kernels import OPS, tuning
from kernels.registry import Case, Op
from nanochat.errors import UserError
from nanochat.hardware import PEAKS, compute_dtype, device_name, has_gpu, limits


@dataclass(frozen=True)
class Profile:
    cases: tuple[str, ...]  # by name; where an op has none so called, those whose names begin so
    most_bytes: float  # that a case may have to move; larger ones are left out
    minutes: float
    most: int  # turns of the timer
    compile: str  # "all"; "largest": the op's largest case; or the one op that is compiled, at its largest case
    training: float  # share of the minutes that is kept for the training step; 0: without it


PROFILES = {
    "smoke": Profile(("odd", "d4"), 1e8, 0.6, 3, "rms_norm", 0.0),
    "quick": Profile(("d12", "d24", "d24_full"), 3e9, 7, 25, "largest", 0.35),
    "full": Profile(("d", "head"), 1e11, 60, 100, "all", 0.1),
}


def machine() -> Machine:
    """This one: its first GPU where there is one, else the CPU. Its rates are the data sheet's, or measured now."""
    device = torch.device("cuda" if has_gpu() else "cpu")
    dtype, _ = compute_dtype(device)
    name = device_name(device)
    flops, bandwidth = limits(name, dtype) or (None, None)
    fp8 = 1e12 * PEAKS[name].fp8 if name in PEAKS and PEAKS[name].fp8 else flops  # type: ignore[operator]
    return Machine(device, dtype, flops, fp8, bandwidth, tuning.clock(str(device)))


def chosen(op: Op, profile: Profile) -> dict[str, Case]:
    """The op's cases of a profile, the smallest first; its largest that is small enough where none is called so."""
    size = lambda name: op.bytes(op.cases[name], torch.bfloat16)
    fit = sorted((name for name in op.cases if size(name) <= profile.most_bytes), key=size)
    named = [name for name in fit if name in profile.cases] or [name for name in fit if name.startswith(profile.cases)]
    return {name: op.cases[name] for name in named or fit[-1:]}


def benches(names: list[str], profile: Profile) -> list[Bench]:
    """All that a profile measures. Raises UserError for an op that is not there."""
    if unknown := [name for name in names if name not in OPS]:
        raise UserError(f"--op: no op is called {', '.join(unknown)}; there are {', '.join(OPS)}")
    found = []
    for name in names:
        cases = list(chosen(OPS[name], profile))
        for case in cases:
            left_out = {}
            wanted = profile.compile == "all" or (case == cases[-1] and profile.compile in ("largest", name))
            if not wanted:
                rest = "the largest case" if profile.compile == "largest" else f"{profile.compile}'s largest case"
                left_out["compiled"] = f"this profile compiles {rest} only, to be done in time"
            found += [Bench(OPS[name], case, setting, left_out) for setting in SETTINGS.get(name, {"": {}})]
    return found
