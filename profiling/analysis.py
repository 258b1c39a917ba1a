"""Where the time of a recorded stretch of training went, as numbers: `analyse(trace)` gives an `Analysis`.

Every instant of the window is counted once: it belongs to a category (profiling/costs.py) or it is idle, so categories
and idle add up to the wall time exactly. Where streams overlap, computing owns the instant, then communication, then
copies; so the time that `communication` owns is the exposed one. A kernel belongs to the phase (forward, backward,
optimizer) in which it was launched. Without a device the CPU's operators are analysed, by the time that each takes
itself without those that it calls; nothing is said about a device then. All times are whole nanoseconds.
"""

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from pydantic import TypeAdapter, ValidationError

from nanochat.errors import UserError
from profiling import costs
from profiling.costs import COMMUNICATION, OPTIMIZER, PRODUCTS
from profiling.idle import idle_causes
from profiling.trace import DEVICE, Event, Interval, Trace, both, first, gaps, length, owners, self_pieces, union

VERSION = 1  # of the JSON
PHASES = ("data", "forward", "backward", "optimizer")  # the annotations in nanochat/trainer.py


@dataclass(frozen=True)
class Analysis:
    """See the module. `ops` are rows by name, category and fp8, longest first; `gaps` are idle times by their cause."""

    version: int
    on_device: bool
    card: str | None
    meta: dict[str, Any]
    wall_ns: int
    step_ns: list[int]
    idle_ns: int
    category_ns: dict[str, int]
    phase_ns: dict[str, dict[str, int]]  # phase → category → time owned
    products: dict[str, int]  # flops, fp8_flops, known_ns and unknown_ns: time owned with and without known shapes
    communication: dict[str, Any]
    ops: list[dict[str, Any]]
    gaps: dict[str, dict[str, int]]
    longest_gaps: list[dict[str, Any]]
    memory: dict[str, Any] | None

    @property
    def steps(self) -> int:
        return max(1, len(self.step_ns))

    def json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def load(cls, content: Any, where: str) -> "Analysis":
        """From the JSON. Raises UserError for another version, or for something else."""
        if not isinstance(content, dict) or not {"version", "category_ns", "ops"} <= content.keys():
            raise UserError(f"{where} is no profile.json; `python -m profiling trace FILE` writes one from a trace")
        if content["version"] != VERSION:
            raise UserError(
                f"{where} is of version {content['version']}, and this code reads version {VERSION}; make it again "
                "from its trace with `python -m profiling trace FILE`"
            )
        again = "make it again from its trace with `python -m profiling trace FILE`"
        try:
            made = TypeAdapter(cls).validate_python(content)
        except ValidationError as problem:
            raise UserError(f"{where} is damaged: {first(problem)}; {again}") from None
        if not all(isinstance(row.get("name"), str) and isinstance(row.get("ns"), int) for row in made.ops):
            raise UserError(f"{where} is damaged: a row of ops has no name or ns; {again}")
        return made


@dataclass(frozen=True)
class Piece:
    """A stretch of work: a kernel, or what an operator did itself between two that it called."""

    start: int
    end: int
    event: Event
    op: Event | None  # the operator that launched it, or itself
    category: str
    phase: str


def analyse(trace: Trace) -> Analysis:
    on_device = bool(trace.of(*DEVICE))
    steps = sorted(
        (e for e in trace.of("user_annotation") if e.name.startswith("ProfilerStep#")), key=lambda e: e.start
    )
    window = _window(trace, steps)
    pieces = _kernels(trace) if on_device else _operators(trace)
    ranked = [(piece.start, piece.end, costs.RANK[piece.category]) for piece in pieces]
    owned = [0] * len(pieces)
    idle_ns = 0
    for start, end, i in owners(ranked, window):
        if i is None:
            idle_ns += end - start
        else:
            owned[i] += end - start
    category_ns: Counter[str] = Counter()
    phase_ns: dict[str, Counter[str]] = defaultdict(Counter)
    for piece, ns in zip(pieces, owned):
        category_ns[piece.category] += ns
        phase_ns[piece.phase][piece.category] += ns
    ops, products = _ops(pieces, owned, window)
    busy = union(_clip(((piece.start, piece.end) for piece in pieces), window))
    causes, longest = idle_causes(gaps(busy, window), trace, window, on_device)
    return Analysis(
        version=VERSION,
        on_device=on_device,
        card=trace.card if on_device else None,
        meta=trace.meta,
        wall_ns=window[1] - window[0],
        step_ns=[step.end - step.start for step in steps],
        idle_ns=idle_ns,
        category_ns={name: category_ns[name] for name in costs.CATEGORIES if category_ns[name]},
        phase_ns={name: dict(found) for name, found in phase_ns.items() if any(found.values())},
        products=products,
        communication=_communication([piece for piece in pieces if _inside(piece, window)], window),
        ops=ops,
        gaps=causes,
        longest_gaps=longest,
        memory=_memory(trace),
    )


def _window(trace: Trace, steps: Sequence[Event]) -> Interval:
    """From the first recorded step to the end of the last; without marked steps, of all work. Kernels may end later."""
    work = trace.of(*DEVICE)
    if not steps:
        work += trace.of("cpu_op")
    start = steps[0].start if steps else min(event.start for event in work)
    end = max(event.end for event in (*work, *steps))
    if end <= start:
        raise UserError("nothing in the trace took any time (every dur is 0); record it again")
    return start, end


def _clip(intervals: Any, window: Interval) -> list[Interval]:
    return [(max(start, window[0]), min(end, window[1])) for start, end in intervals]


# ---- pieces of work


class _Phases:
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


def _kernels(trace: Trace) -> list[Piece]:
    """What ran on the device, with the operator that launched it and the phase of the launch."""
    phases = _Phases(trace)
    ops = {event.args["External id"]: event for event in trace.of("cpu_op") if "External id" in event.args}
    launches = {
        event.args["correlation"]: event
        for event in trace.of("cuda_runtime", "cuda_driver")
        if "correlation" in event.args
    }
    pieces = []
    for event in trace.of(*DEVICE):
        op = ops.get(event.args.get("External id"))
        launch = launches.get(event.args.get("correlation")) or op
        phase = phases.at(launch.start) if launch else "between"
        pieces.append(Piece(event.start, event.end, event, op, _category(event, op, phase), phase))
    return pieces


def _operators(trace: Trace) -> list[Piece]:
    phases = _Phases(trace)
    events = trace.of("cpu_op")
    pieces = []
    for start, end, i in self_pieces(events):
        phase = phases.at(start)
        pieces.append(Piece(start, end, events[i], events[i], _category(events[i], events[i], phase), phase))
    return pieces


# ---- what they did


def _inside(piece: Piece, window: Interval) -> int:
    """How much of the piece lies in the window, ns."""
    return max(0, min(piece.end, window[1]) - max(piece.start, window[0]))


def _multiplies(piece: Piece) -> bool:
    """Whether it is a matrix product's own work: a split product has several kernels, and others convert for it."""
    return piece.op is not None and (piece.op is piece.event or costs.category(piece.event.name) == PRODUCTS)


def _ops(pieces: list[Piece], owned: list[int], window: Interval) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """(rows by name, category and fp8; what is known of the matrix products outside the optimizer), in the window.

    A product's FLOPs and bytes are in the row of its first kernel, over the time of all its kernels; where the window
    cuts it, as much of them counts as of its time.
    """
    rows: dict[tuple[str, str, bool], dict[str, Any]] = {}
    products = dict(flops=0, fp8_flops=0, known_ns=0, unknown_ns=0)
    ran: Counter[int] = Counter()  # time in the window of each event
    whole: Counter[int] = Counter()  # of all kernels of each product, and what of it is in the window
    within: Counter[int] = Counter()
    for piece in pieces:
        inside = _inside(piece, window)
        ran[id(piece.event)] += inside
        if _multiplies(piece):
            whole[id(piece.op)] += piece.end - piece.start
            within[id(piece.op)] += inside
    counted: set[int] = set()  # events, and operators whose FLOPs were given to their first kernel
    for piece, ns in zip(pieces, owned):
        if not _inside(piece, window):
            continue
        op, event, took = piece.op, piece.event, ran[id(piece.event)]
        cost = costs.product(op.name, op.args) if op else None
        fp8 = bool(cost and cost[2] and _multiplies(piece))
        zero = dict(count=0, ns=0, owned_ns=0, flops=0, flops_ns=0, fp8=fp8, bytes=0, bytes_ns=0)
        row = rows.setdefault((event.name, piece.category, fp8), dict(name=event.name, category=piece.category, **zero))
        row["owned_ns"] += ns
        if piece.category == PRODUCTS:
            products["known_ns" if cost else "unknown_ns"] += ns
        if id(event) in counted:
            continue
        fresh = op is event or id(op) not in counted
        counted.add(id(event))
        row["count"] += 1
        row["ns"] += took
        if cost and fresh and _multiplies(piece):
            counted.add(id(op))
            flops, moved, _ = cost
            took, share = within[id(op)], within[id(op)] / whole[id(op)]
            flops, moved = round(flops * share), moved and round(moved * share)
            row.update(flops=row["flops"] + flops, flops_ns=row["flops_ns"] + took)
            if piece.category == PRODUCTS:
                products["fp8_flops" if fp8 else "flops"] += flops
        else:
            moved = costs.streamed(op.name, op.args) if op else None
        if moved:
            row.update(bytes=row["bytes"] + moved, bytes_ns=row["bytes_ns"] + took)
    return sorted(rows.values(), key=lambda row: -row["ns"]), products


def _communication(pieces: list[Piece], window: Interval) -> dict[str, Any]:
    """Total, exposed (nothing computes meanwhile) and overlapped time; each collective with its bus bandwidth."""

    def when(chosen: Any) -> list[Interval]:
        return union(_clip(((p.start, p.end) for p in chosen), window))

    own = [p for p in pieces if p.category == COMMUNICATION]
    computing = when(p for p in pieces if costs.RANK[p.category] == 0)
    total = when(own)
    overlapped = length(both(total, computing))
    collectives = []
    for name, group in groupby(sorted(own, key=lambda p: p.event.name), key=lambda p: p.event.name):
        events = list({id(p.event): p.event for p in group}.values())
        wires = [costs.bus_bytes(event.args) for event in events]
        ns = sum(event.end - event.start for event in events)
        known = None if None in wires or not ns else sum(wires) / ns  # type: ignore[arg-type]  # bytes a ns: GB/s
        collectives.append(dict(name=name, count=len(events), ns=ns, bus_gb_per_s=known))
    return dict(
        total_ns=length(total),
        exposed_ns=length(total) - overlapped,
        overlapped_ns=overlapped,
        collectives=sorted(collectives, key=lambda row: -row["ns"]),
    )


# ---- memory


def _memory(trace: Trace) -> dict[str, Any] | None:
    """At the moment of most allocated bytes: how many there were, by the phase that allocated them."""
    if not trace.memory:
        return None
    phases = _Phases(trace)
    top = max(range(len(trace.memory)), key=lambda i: trace.memory[i][1])
    live: dict[Any, tuple[int, str]] = {}
    for when, _, count, address in trace.memory[: top + 1]:
        if count > 0:
            live[address] = (count, phases.at(when))
        else:
            live.pop(address, None)
    by_phase: Counter[str] = Counter()
    for count, phase in live.values():
        by_phase[phase] += count
    total = trace.memory[top][1]
    before = total - sum(by_phase.values())
    return dict(peak_bytes=total, by_phase={**by_phase, **({"before the recording": before} if before > 0 else {})})
