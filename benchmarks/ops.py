"""One op at one case against all its contenders: gate, then time in turns, then rates.

`measure` gives a row per way (forward, backward, both) and contender; status is `timed`, `failed` (the gate, or it
broke: no speed) or `skipped` (why says what is missing). Forward is a training's: it keeps what backward needs. The
backward alone has its forward outside the clock. Rates are of the least bytes and FLOPs that the op can do with, so
roofline is the share of the time that this machine needs for them at its peaks.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks import timer
from benchmarks.contenders import Contender, Inputs, obstacle
from benchmarks.gate import Gate, agreement, answers, narrow
from kernels import dispatch, tuning, use
from kernels.probing import copied, directions
from kernels.registry import Op, tensors
from nanochat.capture import empty_cache

WAYS = ("forward", "backward", "both")

# Inputs that an op is measured with besides its own: torch's linear_cross_entropy has no softcap.
SETTINGS: dict[str, dict[str, Inputs]] = {
    "cross_entropy": {"": {}, "no softcap": dict(softcap=None)},
    "linear_cross_entropy": {"": {}, "no softcap": dict(softcap=None)},
}

# The least (bytes, FLOPs) of a backward, as multiples of the forward's. Passes: what is read and written, counted in
# each op's file; products: two for each of the forward's, in attention five for its two.
BACKWARD = {
    "rms_norm": (3 / 2, 2), "mix_rms_norm": (7 / 5, 2), "add_rms_norm": (1, 2), "rotary": (1, 1),
    "qk_norm_rotary": (3 / 2, 2), "cross_entropy": (2, 1), "linear_cross_entropy": (2, 2), "linear_relu2": (2, 2),
    "mlp_relu2": (3 / 2, 2), "flash_attention": (2, 5 / 2), "fp8_linear": (2, 2), "fp8_mlp_relu2": (3 / 2, 2),
    "fp8_mix_rms_norm": (7 / 6, 2), "fp8_add_rms_norm": (4 / 5, 2), "embedding": (1, 1),
}  # fmt: skip


@dataclass(frozen=True)
class Machine:
    """Where it runs: rates in FLOP/s and bytes/s, None where this machine's are not known."""

    device: torch.device
    dtype: torch.dtype
    flops: float | None
    fp8_flops: float | None
    bandwidth: float | None
    clock: tuning.Clock


@dataclass(frozen=True)
class Bench:
    """What is measured together: an op at a case, in a setting, and contenders that are left out, with the reason."""

    op: Op
    case: str
    setting: str = ""
    left_out: Mapping[str, str] = field(default_factory=dict)

    def inputs(self, case: Mapping[str, int], machine: Machine) -> Inputs:
        made = self.op.inputs(case, machine.dtype, str(machine.device))
        return {**made, **SETTINGS.get(self.op.name, {"": {}})[self.setting]}


def ways(op: Op, early: bool) -> tuple[str, ...]:
    """Which of the three an op has; with `early` (gradients made in forward) only both together."""
    return ("forward",) if not op.differentiable else ("both",) if early else WAYS


def prepared(op: Op, contender: Contender, inputs: Inputs, way: str) -> timer.Prepared:
    """What the timer takes: each call does the untimed part and returns the timed one."""
    extra = contender.extra(inputs)
    grads: list[Tensor] = []

    @use(contender.setting)
    def forward() -> list[Tensor]:
        result = contender.call(**inputs, **extra)
        return [output for output in tensors(result) if output.requires_grad] if op.differentiable else []

    @use(contender.setting)
    def backward(outputs: list[Tensor]) -> None:
        if not grads:
            grads.extend(directions(outputs))
        torch.autograd.backward(outputs, grads)

    def prepare() -> Callable[[], Any]:
        for name in op.differentiable:
            inputs[name].grad = None
        if way == "forward":
            return forward
        if way == "both":
            return lambda: backward(forward())
        outputs = forward()
        return lambda: backward(outputs)

    return prepare


def least(bench: Bench, way: str, dtype: torch.dtype) -> tuple[float, float]:
    """(bytes, FLOPs) that cannot be avoided."""
    case = bench.op.cases[bench.case]
    moved, flops = bench.op.bytes(case, dtype), bench.op.flops(case)
    more_moved, more_flops = BACKWARD.get(bench.op.name, (0, 0))
    forward, backward = way != "backward", way != "forward"
    return moved * (forward + backward * more_moved), flops * (forward + backward * more_flops)


def roofline_seconds(machine: Machine, moved: float, flops: float, fp8: bool) -> float | None:
    """The time at this machine's peaks; None where they are not known."""
    rate = machine.fp8_flops if fp8 else machine.flops
    return max(moved / machine.bandwidth, flops / rate) if rate and machine.bandwidth else None


def rates(bench: Bench, way: str, machine: Machine, samples: list[float]) -> dict[str, Any]:
    """The timed part of a row."""
    low, middle, high = timer.quartiles(samples)
    moved, flops = least(bench, way, machine.dtype)
    at_peak = roofline_seconds(machine, moved, flops, bench.op.name.startswith("fp8"))
    return dict(
        median_ms=middle, q1_ms=low, q3_ms=high, samples_ms=samples, gb_per_s=moved / middle / 1e6,
        tflop_per_s=flops / middle / 1e9, least_bytes=moved, least_flops=flops,
        roofline=None if at_peak is None else 1e3 * at_peak / middle,
    )  # fmt: skip


def peak_mb(prepare: timer.Prepared) -> float:
    """Most memory allocated during a call, its forward included, above what lay there before."""
    prepare()  # drops the gradients of the call before: they would lie there now, and be freed before the peak
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    prepare()()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def on_gpu(op: Op, way: str, prepare: timer.Prepared) -> dict[str, Any]:
    """What only a GPU has: peak memory, and the time of graph replays (null and why where it cannot be captured)."""
    found: dict[str, Any] = dict(peak_mb=peak_mb(prepare))
    if way != "backward":
        try:
            found["graph_ms"] = timer.replayed(prepare)
        except Exception as problem:  # a host read or a library call that a capture forbids
            torch.cuda.synchronize()
            found.update(graph_ms=None, graph_why=sentence(problem))
    return found


def sentence(problem: Exception) -> str:
    lines = [line.strip() for line in str(problem).split("\n") if line.strip()]
    return f"{type(problem).__name__}: {lines[0] if lines else ''}"


def whole(op: Op, inputs: Inputs) -> list[Tensor]:
    """The eager reference's answers at full size; none where they do not fit: others must then only run there."""
    try:
        return answers(op, Contender(op.reference), inputs)
    except torch.OutOfMemoryError:
        empty_cache()
        return []


def judged(bench: Bench, contenders: Mapping[str, Contender], inputs: Inputs, machine: Machine) -> dict[str, dict]:
    """Status, why and gate of every contender. Nothing is timed yet."""
    op, case = bench.op, bench.op.cases[bench.case]
    if why := op.refuses(machine.dtype):
        return {name: dict(status="skipped", why=why) for name in contenders}
    small = narrow(case)
    gate = Gate(op, bench.inputs(small, machine), machine.dtype)
    usual = None if small == case else whole(op, inputs)
    found: dict[str, dict] = {}
    for name, contender in contenders.items():
        why = bench.left_out.get(name) or obstacle(contender, inputs, machine.device)
        if name == "triton" and not why:
            why = dispatch.uncompilable(op.name, machine.dtype, op.size(case), machine.device.index or 0)
        found[name] = dict(status="skipped" if why else "passed", why=why)
        if why:
            continue
        try:
            verdict = gate.judge(contender)
            why = verdict.why
            if not why and usual is not None:
                why = agreement(op, contender, inputs, usual, machine.dtype)
            errors = dict(
                error=verdict.error, reference_error=verdict.reference_error, allowed=verdict.allowed,
                ratio=verdict.error / max(verdict.reference_error, torch.finfo(machine.dtype).eps),
            )  # fmt: skip
            found[name] = dict(status="failed" if why else "passed", why=why, gate=errors)
        except Exception as problem:  # whatever a library, a compiler or a card throws: the report says it
            found[name] = dict(status="failed", why=sentence(problem))
    return found


def measure(
    bench: Bench, contenders: Mapping[str, Contender], machine: Machine, seconds: Callable[[], float], most: int
) -> list[dict[str, Any]]:
    """Rows of all ways and contenders. `seconds()`: what is left for the timing once everything is checked."""
    torch._dynamo.reset()  # or the compiler, after eight shapes of a function, silently runs it as it is
    if machine.device.type == "cuda":
        empty_cache()
    op = bench.op
    inputs = copied(bench.inputs(op.cases[bench.case], machine), op.differentiable)
    verdicts = judged(bench, contenders, inputs, machine)
    passed = {name: c for name, c in contenders.items() if verdicts[name]["status"] == "passed"}
    own = {name: copied(inputs, op.differentiable) if c.overwrites else inputs for name, c in passed.items()}
    rows, wanted = [], ways(op, contenders["eager"].early)
    for i, way in enumerate(wanted):
        running, state = {}, {name: dict(verdict) for name, verdict in verdicts.items()}
        for name, contender in contenders.items():
            if state[name]["status"] == "passed" and contender.early and way not in ways(op, True):
                state[name].update(status="skipped", why="its forward makes the gradients already: see both")
            elif state[name]["status"] == "passed":
                try:
                    prepare = prepared(op, contender, own[name], way)
                    prepare()()  # what breaks here would break the others' turns
                    running[name] = prepare
                except Exception as problem:
                    state[name].update(status="failed", why=sentence(problem))
        samples = timer.in_turns(running, seconds() / (len(wanted) - i), most, machine.clock)
        for name in contenders:
            row = dict(op=op.name, setting=bench.setting, case=bench.case, way=way, contender=name, **state[name])
            row["dtype"] = str(machine.dtype)[6:]
            if name in samples:
                row.update(rates(bench, way, machine, samples[name]), status="timed")
                if "eager" in samples:
                    row["times_eager"] = timer.quartiles(samples["eager"])[1] / row["median_ms"]
                if machine.device.type == "cuda":
                    row.update(on_gpu(op, way, running[name]))
            json.dumps(row, allow_nan=False)  # raises for what the file could not hold, while it is known whose it is
            rows.append(row)
    return rows


def failed(
    bench: Bench, contenders: Mapping[str, Contender], machine: Machine, problem: BaseException
) -> list[dict[str, Any]]:
    """The rows of a bench whose `measure` raised: all of them failed, with the reason."""
    return [
        dict(
            op=bench.op.name, setting=bench.setting, case=bench.case, way=way, contender=name, status="failed",
            why=sentence(problem), dtype=str(machine.dtype)[6:],
        )
        for way in ways(bench.op, contenders["eager"].early) for name in contenders if name not in bench.left_out
    ]  # fmt: skip
