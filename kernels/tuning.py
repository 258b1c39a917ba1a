"""`python -m kernels tune`: tries block sizes on the GPU that is here and writes what was fastest.

Each op's forward and backward is timed together at its large cases, for a few candidates around the static row, next to
the compiled reference, in turns, so that a change of clocks meets all alike. A candidate must give the right answer
first.
"""

import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from kernels import dispatch, probing, tuned
from kernels.dispatch import use
from kernels.registry import OPS, Case, Op, tensors

# What to try for a block size of the static row: these multiples of it.
FACTORS = {"elements": (0.5, 1, 2), "backward_elements": (0.5, 1, 2), "BLOCK_V": (0.5, 1, 2), "BLOCK": (0.5, 1, 2, 4),
           "rows": (1, 2), "BLOCK_C": (0.5, 1, 2), "BLOCK_S": (0.5, 1), "BLOCK_R": (0.5, 1),
           "num_warps": (0.5, 1, 2)}  # fmt: skip
REPEATS = 15


def candidates(config: dict[str, int]) -> list[dict[str, int]]:
    """The static row and its neighbours; every value stays at least 1."""
    ranges = [[max(1, int(value * factor)) for factor in FACTORS.get(key, (1,))] for key, value in config.items()]
    return [dict(zip(config, values)) for values in itertools.product(*ranges)]


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


def best(op: Op, case: Case, dtype: torch.dtype, configs: list[dict[str, int]], size: int) -> dict[str, Any]:
    """The measured row for one op and case: the fastest config, its time, the compiled reference's."""
    table = tuned.table(tuned.architecture(torch.cuda.current_device()))
    before = dict(table)
    reference = step(op, case, dtype, "torch", compiled=True)
    kernel = step(op, case, dtype, "triton", compiled=False)
    found: list[tuple[float, float, dict[str, int]]] = []
    try:
        for config in configs:
            table[tuned.owner(op.name)] = [dict(dtype="*", up_to=size, config=config)]
            try:
                if not right(op, case, dtype):
                    raise RuntimeError("its answer is wrong")
                ms, reference_ms = timed([kernel, reference])
                found.append((ms, reference_ms, config))
            except Exception as problem:  # too much shared memory, too many registers: not a candidate
                print(f"{op.name}: {config} does not run: {str(problem).splitlines()[:1]}")
    finally:
        table.clear()
        table.update(before)
    if not found:
        raise ValueError(f"{op.name}: no candidate ran at size {size}")
    ms, reference_ms, config = min(found, key=lambda row: row[0])
    return dict(dtype=str(dtype)[6:], up_to=size, config=config, ms=ms, reference_ms=reference_ms)


def tune(names: list[str]) -> None:
    """Measures and writes kernels/tuned/<arch>.json. Raises ValueError without a CUDA device."""
    if not torch.cuda.is_available():
        raise ValueError("tuning needs a CUDA device, and there is none here")
    device = torch.device("cuda", torch.cuda.current_device())
    arch = tuned.architecture(torch.cuda.current_device())
    table = dict(tuned.table(arch))
    for name in names:
        op, rows = OPS[name], []
        for case in sorted(
            (c for c in op.cases if c.startswith("d")), key=lambda c: op.bytes(op.cases[c], torch.float32)
        ):
            size = op.size(op.cases[case])
            static = tuned.config(name, torch.bfloat16, size, device)
            configs = candidates(static) if tuned.owner(name) == name else [static]  # shared rows are not its to change
            row = best(op, op.cases[case], torch.bfloat16, configs, size)
            print(
                f"{name:22} {case:9} {row['ms']:.4f} ms, compiled reference {row['reference_ms']:.4f} ms, "
                f"{row['config']}"
            )
            rows.append(row)
        table[name] = sorted({row["up_to"]: row for row in rows}.values(), key=lambda row: row["up_to"])
    path = tuned.FOLDER / f"{arch}.json"
    path.write_text(json.dumps(table, indent=1) + "\n")
    tuned.table.cache_clear()
    dispatch.forget()
    print(f"written: {path}")
