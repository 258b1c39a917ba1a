"""Measuring block sizes on the GPU that is here: `python -m kernels tune`, and what a first training does by itself.

An op's forward and backward are timed together. From the row in force, one block size at a time is halved or doubled;
a neighbour that is faster, timed in turns with the best so far so that a change of clocks meets both alike, becomes the
best, until none is, or the time is over. A candidate must give the right answer first. The compiled reference is timed
beside it where asked for: alone, an op says little about a compiled step, in which its neighbours may be fused.
"""

import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from kernels import dispatch, measured, probing, tuned
from kernels.dispatch import use
from kernels.registry import OPS, Case, Op, tensors

FIXED = ("GROUP_M",)  # order of programs: nothing that could not be a little better or worse on any card
ADDED = ("num_stages",)  # what goes up and down by one; the rest is a power of two
GAIN = 0.98  # of the best time that a neighbour must stay below
REPEATS = 15
Say = Callable[[str], None]


def neighbours(config: dict[str, int]) -> list[dict[str, int]]:
    """One block size changed by a step, up or down; every value stays at least 1."""
    found = []
    for key, value in config.items():
        if key not in FIXED:
            steps = (value - 1, value + 1) if key in ADDED else (value // 2, value * 2)
            found += [{**config, key: step} for step in steps if step >= 1]
    return found


def clock(device: str = "cuda") -> Callable[[Callable[[], Any]], float]:
    """A function that takes the milliseconds of one call, which finds the caches swept.

    On a GPU, several sweeps are queued before the call, so that its launches wait in line and what is timed is the
    card's work, not the host's.
    """
    on_gpu = device.startswith("cuda")
    sweep = torch.empty((256 if on_gpu else 64) << 20, dtype=torch.int8, device=device)

    def on_card(call: Callable[[], Any]) -> float:
        for _ in range(4):
            sweep.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)

    def on_host(call: Callable[[], Any]) -> float:
        sweep.zero_()
        started = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - started)

    return on_card if on_gpu else on_host


def turns(
    prepared: list[Callable[[], Callable[[], Any]]], clock: Callable[[Callable[[], Any]], float]
) -> Iterator[list[float]]:
    """For ever: milliseconds of every call, taken one after the other, so that a change of clocks meets all alike.

    Each of `prepared` does what shall not be timed and returns the call that shall.
    """
    while True:
        yield [clock(prepare()) for prepare in prepared]


def timed(calls: list[Callable[[], Any]], repeats: int = REPEATS) -> list[float]:
    """Median milliseconds of each call on the GPU, after two turns that are not counted."""
    rounds = turns([lambda call=call: call for call in calls], clock())  # type: ignore[misc]
    return [statistics.median(taken) for taken in zip(*itertools.islice(rounds, 2, repeats + 2))]


def step(op: Op, case: Case, dtype: torch.dtype, setting: str, compiled: bool) -> Callable[[], Any]:
    """A call that runs the op, forward and backward, in an implementation."""
    inputs = op.inputs(case, dtype, "cuda")
    for name in op.differentiable:
        inputs[name].requires_grad_()
    function = torch.compile(op.fn, dynamic=False) if compiled else op.fn

    def call() -> None:
        with use(f"torch,{op.name}={setting}"):
            result = function(**inputs)
            if op.differentiable:
                outputs = [output for output in tensors(result) if output.requires_grad]
                torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
                for name in op.differentiable:
                    inputs[name].grad = None

    return call


def right(op: Op, case: Case, dtype: torch.dtype, device: str = "cuda") -> bool:
    """Whether the kernel's results and gradients are the reference's in the same dtype, within several roundings.

    Not against float64, as a card is probed: these cases are as large as a model's.
    """
    assert op.triton is not None
    inputs = op.inputs(case, dtype, device)
    found, usual = (probing.answers(op, call, inputs) for call in (op.triton, op.reference))
    allowed = [4 * tolerance for tolerance in probing.tolerances(op, dtype, len(usual))]
    return all(probing.relative(a, b) <= most for a, b, most in zip(found, usual, allowed))


def climb(
    op: Op, case: Case, dtype: torch.dtype, rows: str, start: dict[str, int], ends: float, say: Say
) -> tuple[dict[str, int], float]:
    """(the fastest config found for the rows of this name, its milliseconds), before time.monotonic() is `ends`.

    Raises RuntimeError when not even `start` runs and is right.
    """
    kernel = step(op, case, dtype, "triton", compiled=False)

    def trial(config: dict[str, int]) -> Callable[[], None]:
        def call() -> None:
            with tuned.trial(rows, config):
                kernel()

        return call

    def check(config: dict[str, int]) -> None:
        with tuned.trial(rows, config):
            if not right(op, case, dtype):
                raise RuntimeError("its answer is wrong")

    check(start)
    best, (ms,) = start, timed([trial(start)])
    tried, improved = [start], True
    while improved:
        improved = False
        for config in neighbours(best):
            if config in tried or time.monotonic() > ends:
                continue
            tried.append(config)
            try:
                check(config)
                now, then = timed([trial(config), trial(best)])
            except Exception as problem:  # too much shared memory, too many registers: not a candidate
                say(f"{op.name}: {config} does not run: {str(problem).splitlines()[:1]}")
                continue
            if now < GAIN * then:
                best, ms, improved = config, now, True
                break  # its own neighbours come next
    return best, ms


def measure(
    op: Op, case: Case, dtype: torch.dtype, ends: float = math.inf, reference: bool = True, say: Say = print
) -> measured.Blocks:
    """Rows for the op's forward (by its own name) and, where they are apart, backward ("…_backward"), at this case.

    Rows that it shares with another op are taken as they are. Raises RuntimeError when its kernels do not run.
    """
    device, size, found = torch.device("cuda", torch.cuda.current_device()), op.size(case), {}
    parts = [op.name, *([f"{op.name}_backward"] if f"{op.name}_backward" in tuned.table("default") else [])]
    for part in parts:
        start = tuned.config(part, dtype, size, device)
        own = tuned.owner(part) == part
        config, ms = climb(op, case, dtype, part, start, ends if own else 0.0, say)
        found[part] = [dict(dtype=str(dtype)[6:], up_to=size, config=config, ms=ms)]
        measured.adopt(_merged(measured.blocks(device.index or 0), found))  # backward's turn meets the new forward
    if reference:
        calls = [step(op, case, dtype, "triton", compiled=False), step(op, case, dtype, "torch", compiled=True)]
        row = found[op.name][0]
        row["ms"], row["reference_ms"] = timed(calls)
    return found


def tune(
    cases: Mapping[str, list[Case]], seconds: float = math.inf, reference: bool = True, say: Say = print
) -> measured.Blocks:
    """Rows by op for each of its cases, in this order, as far as the time goes; progress is said.

    This process uses them from now on. Raises ValueError without a CUDA device.
    """
    if not torch.cuda.is_available():
        raise ValueError("tuning needs a CUDA device, and there is none here")
    index = torch.cuda.current_device()
    new = torch.version.hip or torch.cuda.get_device_capability(index) >= dispatch.LEAST
    dtype = torch.bfloat16 if new else torch.float16
    ends, found = time.monotonic() + seconds, dict(measured.blocks(index))
    for name, several in cases.items():
        for case in several:
            if time.monotonic() > ends:
                say(f"{name}: no time was left; its static block sizes stay")
                continue
            try:
                rows = measure(OPS[name], case, dtype, ends, reference, say)
            except Exception as problem:  # its kernels do not run here: dispatch will find out and say so
                say(f"{name}: not tuned: {type(problem).__name__}: {str(problem).splitlines()[:1]}")
                continue
            found = _merged(found, rows)
            for part, (row,) in rows.items():
                beside = f", compiled reference {row['reference_ms']:.4f} ms" if "reference_ms" in row else ""
                say(f"{part:24} {row['ms']:.4f} ms{beside}, {row['config']}")
    measured.adopt(found)
    dispatch.forget()
    return found


def _merged(rows: measured.Blocks, new: measured.Blocks) -> measured.Blocks:
    """Both, by size; of two for the same dtype and size, the new one."""
    found = dict(rows)
    for part, more in new.items():
        same = {(row["dtype"], row["up_to"]): row for row in [*found.get(part, []), *more]}
        found[part] = sorted(same.values(), key=lambda row: row["up_to"])
    return found


def registered_cases(names: list[str]) -> dict[str, list[Case]]:
    """The registry's cases at the sizes of models, small ones first."""
    return {
        name: sorted(
            (case for key, case in OPS[name].cases.items() if key.startswith("d")),
            key=lambda case: OPS[name].bytes(case, torch.float32),
        )
        for name in names
    }


def into_repository(rows: measured.Blocks) -> None:
    """Writes kernels/tuned/<arch>.json: what contributors commit. Rows that are there for other sizes stay."""
    index = torch.cuda.current_device()
    path = tuned.FOLDER / f"{tuned.architecture(index)}.json"
    before = tuned.table(tuned.architecture(index))
    lists = {name: found for name, found in before.items() if isinstance(found, list)}
    merged = _merged({name: [row for row in found if "up_to" in row] for name, found in lists.items()}, rows)
    unlimited = {name: [row for row in found if "up_to" not in row] for name, found in lists.items()}
    table = before | {name: merged.get(name, []) + unlimited.get(name, []) for name in {**lists, **merged}}
    measured.replace(path, json.dumps(table, indent=1) + "\n")
    tuned.table.cache_clear()
