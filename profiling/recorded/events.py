"""The spans of work in a recorded trace: what ran from when to when, who launched it, of which category and phase.

On a device a span is a kernel or a copy, and belongs to the phase in which it was launched: forward, backward and
optimizer of training, prefill, decode and sampling of an engine. Without a device a span is what an operator of the
CPU did itself between two that it called. analysis.py adds them up.
"""

from bisect import bisect_right
from dataclasses import dataclass

from profiling.recorded import costs
from profiling.recorded.costs import COMMUNICATION, OPTIMIZER, PRODUCTS
from profiling.recorded.trace import DEVICE, Event, Interval, Trace, self_spans

# The annotations in nanochat/trainer.py, and those in nanochat/engine/engine.py.
PHASES = ("data", "forward", "backward", "optimizer", "prefill", "decode", "sampling")


@dataclass(frozen=True)
class Span:
    """A stretch of work: a kernel, or what an operator did itself between two that it called."""

    start: int
    end: int
    event: Event
    op: Event | None  # the operator that launched it, or itself
    category: str
    phase: str

    def inside(self, window: Interval) -> int:
        """How much of it lies in the window, ns."""
        return max(0, min(self.end, window[1]) - max(self.start, window[0]))

    @property
    def multiplies(self) -> bool:
        """Whether it is a matrix product's own work: a split product has several kernels, and others convert for it."""
        return self.op is not None and (self.op is self.event or costs.category(self.event.name) == PRODUCTS)


class Phases:
    """The phase in which an instant of the host's time lies."""

    def __init__(self, trace: Trace):
        marks = [e for e in trace.of("user_annotation") if e.name in PHASES]
        if not any(e.name == OPTIMIZER for e in marks):  # torch marks Optimizer.step itself
            marks += [e for e in trace.of("user_annotation") if e.name.startswith("Optimizer.step#")]
        self.marks = sorted(marks, key=lambda e: e.start)
        self.starts = [e.start for e in self.marks]

    def at(self, instant: int) -> str:
        i = bisect_right(self.starts, instant) - 1
        if i < 0 or instant >= self.marks[i].end:
            return "between"
        return self.marks[i].name if self.marks[i].name in PHASES else OPTIMIZER


def _category(event: Event, op: Event | None, phase: str) -> str:
    """By the kernel's name, then by its operator's; whatever computes in the optimizer is the optimizer's."""
    if event.kind in ("gpu_memcpy", "gpu_memset"):
        return costs.COPIES
    found = costs.category(event.name)
    if found in (costs.STREAMING, costs.OTHER) and op is not None and op is not event:
        of_op = costs.category(op.name)
        found = of_op if of_op in (costs.LOSS, costs.ATTENTION, PRODUCTS) or found == costs.OTHER else found
        if found == costs.COPIES:  # aten::copy_ as a kernel converts or moves within the GPU: a pass like any other
            found = costs.STREAMING
    return OPTIMIZER if phase == OPTIMIZER and found != COMMUNICATION else found


def kernels(trace: Trace) -> list[Span]:
    """What ran on the device, with the operator that launched it and the phase of the launch."""
    phases = Phases(trace)
    ops = {event.args["External id"]: event for event in trace.of("cpu_op") if "External id" in event.args}
    launches = {
        event.args["correlation"]: event
        for event in trace.of("cuda_runtime", "cuda_driver")
        if "correlation" in event.args
    }
    spans = []
    for event in trace.of(*DEVICE):
        op = ops.get(event.args.get("External id"))
        launch = launches.get(event.args.get("correlation")) or op
        phase = phases.at(launch.start) if launch else "between"
        spans.append(Span(event.start, event.end, event, op, _category(event, op, phase), phase))
    return spans


def operators(trace: Trace) -> list[Span]:
    """What the CPU's operators did themselves, in the phase in which each stretch lies."""
    phases = Phases(trace)
    events = trace.of("cpu_op")
    spans = []
    for start, end, i in self_spans(events):
        phase = phases.at(start)
        spans.append(Span(start, end, events[i], events[i], _category(events[i], events[i], phase), phase))
    return spans
