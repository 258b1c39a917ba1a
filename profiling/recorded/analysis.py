"""Where the time of recorded steps of training or decoding went, as numbers: `analyse(trace)` gives an `Analysis`.

Every instant of the window is counted once: it belongs to a category (costs.py) or it is idle, so categories
and idle add up to the wall time exactly. Where streams overlap, computing owns the instant, then communication, then
copies; so the time that `communication` owns is the exposed one. What a span of work is, and of which category and
phase, is in events.py. Without a device the CPU's operators are analysed, and nothing is said about a device. All times
are whole nanoseconds.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from nanochat.errors import UserError
from profiling.recorded import checked, costs, custom_ops
from profiling.recorded.costs import COMMUNICATION, PRODUCTS
from profiling.recorded.events import Phases, Span, kernels, operators
from profiling.recorded.idle import idle_causes
from profiling.recorded.trace import DEVICE, Event, Interval, Trace, both, gaps, length, owners, union

VERSION = 1  # of the JSON
BEFORE = "before the recording"  # when it was allocated, of what was there already


@dataclass(frozen=True)
class Analysis:
    """See the module. `ops` are rows by name, category and fp8, longest first; `gaps` are idle times by their cause.

    A row's `shapes` are those of its calls whose time predicted/predict.py can say: flops, bytes, count and ns of each.
    """

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
            made = checked.made(cls, content)
        except checked.Damaged as problem:
            raise UserError(f"{where} is damaged: {problem}; {again}") from None
        if not all(isinstance(row.get("name"), str) and _is_time(row.get("ns")) for row in made.ops):
            raise UserError(f"{where} is damaged: a row of ops has no name or ns; {again}")
        return made


def _is_time(ns: Any) -> bool:
    return isinstance(ns, int) and abs(ns) < checked.MOST


def analyse(trace: Trace) -> Analysis:
    on_device = bool(trace.of(*DEVICE))
    steps = sorted(
        (e for e in trace.of("user_annotation") if e.name.startswith("ProfilerStep#")), key=lambda e: e.start
    )
    window = _window(trace, steps)
    spans = kernels(trace) if on_device else operators(trace)
    ranked = [(span.start, span.end, costs.RANK[span.category]) for span in spans]
    owned = [0] * len(spans)
    idle_ns = 0
    for start, end, i in owners(ranked, window):
        if i is None:
            idle_ns += end - start
        else:
            owned[i] += end - start
    category_ns: Counter[str] = Counter()
    phase_ns: dict[str, Counter[str]] = defaultdict(Counter)
    for span, ns in zip(spans, owned):
        category_ns[span.category] += ns
        phase_ns[span.phase][span.category] += ns
    ops, products = _ops(spans, owned, window)
    busy = union(_clip(((span.start, span.end) for span in spans), window))
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
        communication=_communication([span for span in spans if span.inside(window)], window),
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


# ---- what the spans did


def _ops(spans: list[Span], owned: list[int], window: Interval) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """(rows by name, category and fp8; what is known of the matrix products outside the optimizer), in the window.

    A product's FLOPs and bytes are in the row of its first kernel, over the time of all its kernels; where the window
    cuts it, as much of them counts as of its time, and it is none of the row's shapes.
    """
    rows: dict[tuple[str, str, bool], dict[str, Any]] = {}
    shapes: dict[tuple[str, str, bool], dict[tuple[int, int], list[int]]] = {}  # → (FLOPs, bytes) → count, ns
    products = dict(flops=0, fp8_flops=0, known_ns=0, unknown_ns=0)
    ran: Counter[int] = Counter()  # time in the window of each event
    whole: Counter[int] = Counter()  # of all kernels of each product, and what of it is in the window
    within: Counter[int] = Counter()
    for span in spans:
        inside = span.inside(window)
        ran[id(span.event)] += inside
        if span.multiplies:
            whole[id(span.op)] += span.end - span.start
            within[id(span.op)] += inside
    counted: set[int] = set()  # events, and operators whose FLOPs were given to their first kernel
    for span, ns in zip(spans, owned):
        if not span.inside(window):
            continue
        op, event, took = span.op, span.event, ran[id(span.event)]
        cost = costs.product(op.name, op.args) if op else None
        fp8 = bool(cost and cost.fp8 and span.multiplies)
        zero = dict(count=0, ns=0, owned_ns=0, flops=0, flops_ns=0, fp8=fp8, bytes=0, bytes_ns=0)
        key = (event.name, span.category, fp8)
        row = rows.setdefault(key, dict(name=event.name, category=span.category, **zero))
        row["owned_ns"] += ns
        if span.category == PRODUCTS:
            products["known_ns" if cost else "unknown_ns"] += ns
        if id(event) in counted:
            continue
        fresh = op is event or id(op) not in counted
        counted.add(id(event))
        row["count"] += 1
        row["ns"] += took
        if cost and fresh and span.multiplies:
            counted.add(id(op))
            took, share = within[id(op)], within[id(op)] / whole[id(op)]
            known = share == 1 and (cost.half or cost.fp8)
            flops, moved = round(cost.flops * share), cost.bytes and round(cost.bytes * share)
            row.update(flops=row["flops"] + flops, flops_ns=row["flops_ns"] + took)
            if span.category == PRODUCTS:
                products["fp8_flops" if fp8 else "flops"] += flops
        else:
            own = custom_ops.cost(op.name, op.args) if op and op is not event else None
            flops, moved = (own.flops, own.bytes) if own else (0, costs.streamed(op.name, op.args) if op else None)
            known = took == event.end - event.start and bool(own or costs.STREAMS.match(event.name))
            known = known and (not flops or bool(own and own.half))
            if flops:
                row.update(flops=row["flops"] + flops, flops_ns=row["flops_ns"] + took)
        if moved:
            row.update(bytes=row["bytes"] + moved, bytes_ns=row["bytes_ns"] + took)
        if moved and known:
            seen = shapes.setdefault(key, {}).setdefault((flops, moved), [0, 0])
            seen[:] = seen[0] + 1, seen[1] + took
    for key, row in rows.items():
        row["shapes"] = [
            dict(flops=flops, bytes=moved, count=count, ns=ns)
            for (flops, moved), (count, ns) in shapes.get(key, {}).items()
        ]
    return sorted(rows.values(), key=lambda row: -row["ns"]), products


def _communication(spans: list[Span], window: Interval) -> dict[str, Any]:
    """Total, exposed (nothing computes meanwhile) and overlapped time; each collective with its bus bandwidth."""

    def when(chosen: Any) -> list[Interval]:
        return union(_clip(((p.start, p.end) for p in chosen), window))

    own = [p for p in spans if p.category == COMMUNICATION]
    computing = when(p for p in spans if costs.RANK[p.category] == 0)
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
    phases = Phases(trace)
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
    return dict(peak_bytes=total, by_phase={**by_phase, **({BEFORE: before} if before > 0 else {})})
