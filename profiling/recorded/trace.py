"""Reading a trace that torch.profiler wrote, and arithmetic on intervals of time.

`read` gives the timed events of a Kineto/Chrome trace (.json or .json.gz). Times are whole nanoseconds: sums of parts
then equal the whole exactly, where floating-point microseconds would not. An interval is (start, end). `owners` is
the heart of the analysis: it gives every instant to one span of work, so that what overlaps is counted once. Read
analysis.py next.
"""

import gzip
import heapq
import json
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

from nanochat.errors import UserError
from nanochat.files import json_of
from profiling.recorded import checked

Interval = tuple[int, int]
DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of events that ran on a GPU


@dataclass(frozen=True)
class Event:
    """Something that took from `start` to `end` (ns) on a CPU thread, or on a stream of a device."""

    name: str
    kind: str  # Kineto's category: kernel, cpu_op, user_annotation, cuda_runtime …
    start: int
    end: int
    thread: tuple[Any, Any] = (0, 0)
    args: dict[str, Any] = field(default_factory=dict)

    @property
    def interval(self) -> Interval:
        return self.start, self.end


@dataclass(frozen=True)
class Decoding:
    """How an engine decoded. Of a step, on average: FLOPs and least bytes of the tokens made, prompt tokens beside.

    Of each step: how many rows were decoded, and how many prompt tokens read.
    """

    how: str  # nanochat.engine.Engine.decoding
    flops: float
    bytes: float
    prompt_tokens: float
    rows: list[int] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Run:
    """What record.py writes about the run into a trace, as `nanochat`; what is read is checked against it."""

    stage: str
    first_step: int
    tokens_per_step: float
    world: int
    device: str
    dtype: str
    fp8: str | None
    compiled: bool
    torch: str
    flops_per_token: dict[str, float]  # of training
    nvml: list[dict[str, Any]] = field(default_factory=list)
    beside: list[str] = field(default_factory=list)  # what was done between the recorded steps
    decoding: Decoding | None = None  # where nothing was trained
    # The shortest warm step before the recording, and the mean of it: of steps of the same kind, with nothing beside.
    unrecorded_ms: float | None = None
    recorded_ms: float | None = None

    def __post_init__(self) -> None:
        for name in ("tokens_per_step", "world", "unrecorded_ms", "recorded_ms"):
            value = getattr(self, name)
            if value is not None and not value > 0:  # NaN too
                raise ValueError(f"{name}: is {value}, wanted more than 0")
        for value in [value for row in self.nvml for value in row.values()]:
            inside = value if isinstance(value, list) else [value]
            if any(isinstance(one, list | dict) for one in inside):
                raise ValueError("nvml: a row has a list of lists or an object, wanted numbers, text or a list of them")


@dataclass(frozen=True)
class Trace:
    """Timed events by their start; memory: (ns, bytes allocated in all, bytes of this call, address), on one device."""

    events: list[Event]
    memory: list[tuple[int, int, int, Any]] = field(default_factory=list)
    card: str | None = None  # as the driver names it
    meta: dict[str, Any] = field(default_factory=dict)  # what record.py wrote about the run

    def of(self, *kinds: str) -> list[Event]:
        return [event for event in self.events if event.kind in kinds]


def read(path: Path) -> Trace:
    """Raises UserError for a file that is missing, cut off, no trace, or a trace of nothing."""
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
        # A kernel's name is whatever bytes its maker chose.
        content = json_of(raw.decode(json.detect_encoding(raw), errors="replace"), parse_float=_Written)
    except OSError as problem:
        raise UserError(
            f"{path} cannot be read ({problem.strerror or problem}); give a .json or .json.gz trace"
        ) from None
    except (EOFError, zlib.error):
        raise UserError(f"{path} is cut off or no JSON; record it again, or copy it again") from None
    except ValueError as problem:  # json_of says what is wrong
        raise UserError(f"{path} is cut off or no JSON ({problem}); record it again, or copy it again") from None
    return parse(content, str(path))


class _Written(float):
    """A number that remembers how it was written: microseconds since 1970 with their nanoseconds are no float."""

    __slots__ = ("text",)
    text: str

    def __new__(cls, text: str) -> "_Written":
        made = super().__new__(cls, text)
        made.text = text
        return made


def _ns(microseconds: Any) -> int:
    """Raises ValueError, TypeError or ArithmeticError for what is no time."""
    if not abs(float(microseconds)) < 1e18:  # NaN too
        raise OverflowError
    return round(Decimal(getattr(microseconds, "text", None) or str(microseconds)) * 1000)


def _text(value: Any) -> str:
    """As text that can be written to a file: JSON has half surrogate pairs too."""
    return str(value).encode(errors="replace").decode()


def parse(content: Any, where: str = "the trace") -> Trace:
    """From a trace's JSON. Raises UserError for what is none."""
    listed = content.get("traceEvents") if isinstance(content, dict) else content
    if not isinstance(listed, list):
        raise UserError(
            f"{where} is no trace: it has no list of traceEvents; torch.profiler's export_chrome_trace makes one"
        )
    events, memory = [], []
    for number, raw in enumerate(listed):
        try:
            if raw.get("ph") == "X":
                start = _ns(raw["ts"])
                end = start + max(0, _ns(raw.get("dur", 0)))
                args = dict(raw.get("args") or {})
                thread = (raw.get("pid"), raw.get("tid"))
                hash((thread, args.get("External id"), args.get("correlation")))  # they are looked up by these
                events.append(Event(_text(raw["name"]), _text(raw.get("cat", "")), start, end, thread, args))
            elif raw.get("name") == "[memory]":
                args = raw["args"]
                at = (args["Device Type"], args["Device Id"])
                hash((at, args["Addr"]))
                total, count = int(args["Total Allocated"]), int(args["Bytes"])
                memory.append((_ns(raw["ts"]), total, count, args["Addr"], at))
        except (AttributeError, KeyError, TypeError, ValueError, ArithmeticError):
            raise UserError(f"{where}: event {number} is damaged (name, ts, dur or args); record it again") from None
    if not any(event.kind in (*DEVICE, "cpu_op") for event in events):
        raise UserError(f"{where} holds no kernel and no operator; was anything run while it was recorded?")
    events.sort(key=lambda event: (event.start, -event.end))
    about = content if isinstance(content, dict) else {}
    cards, run = about.get("deviceProperties") or [{}], about.get("nanochat") or {}
    if not isinstance(cards, list) or not isinstance(cards[0], dict):
        raise UserError(f"{where}: deviceProperties is no list of devices; record the trace again")
    try:
        if run:
            run = json.loads(_text(json.dumps(run, ensure_ascii=False)))
            checked.made(Run, run)
    except checked.Damaged as problem:
        raise UserError(f"{where} is damaged: nanochat.{problem}; record the trace again") from None
    on_gpu = [row for row in memory if row[4][0] == 1]  # where there is a GPU, its memory is what is short
    rows = sorted((on_gpu or memory), key=lambda row: row[0])
    card = cards[0].get("name")
    card = _text(card) if isinstance(card, str) else None
    return Trace(events, [row[:4] for row in rows if row[4] == rows[0][4]], card, run)


# ---- intervals


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same instants as disjoint intervals in order; empty ones are dropped."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if end <= start:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def length(intervals: Iterable[Interval]) -> int:
    """Of disjoint intervals."""
    return sum(end - start for start, end in intervals)


def both(a: Sequence[Interval], b: Sequence[Interval]) -> list[Interval]:
    """Instants in a and in b, each given as `union` gives them."""
    found, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        start, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if start < end:
            found.append((start, end))
        if a[i][1] <= b[j][1]:
            i += 1
        else:
            j += 1
    return found


def gaps(busy: Sequence[Interval], window: Interval) -> list[Interval]:
    """What of the window lies in none of the disjoint intervals."""
    edges = [window[0], *(edge for interval in busy for edge in interval), window[1]]
    return [(a, b) for a, b in zip(edges[::2], edges[1::2]) if a < b]


def owners(spans: Sequence[tuple[int, int, int]], window: Interval) -> Iterator[tuple[int, int, int | None]]:
    """(start, end, index of the span that owns this stretch, or None) over the whole window, in order.

    A span is (start, end, rank). Of those that run at an instant the lowest rank owns it; among equals the one that
    started first.
    """
    clipped = [(max(s, window[0]), min(e, window[1]), rank, i) for i, (s, e, rank) in enumerate(spans)]
    waiting = sorted((s, rank, e, i) for s, e, rank, i in clipped if s < e)
    edges = sorted({*window, *(s for s, *_ in waiting), *(e for _, _, e, _ in waiting)})
    running: list[tuple[int, int, int, int]] = []
    upcoming = 0
    for now, then in zip(edges, edges[1:]):
        while upcoming < len(waiting) and waiting[upcoming][0] == now:
            s, rank, e, i = waiting[upcoming]
            heapq.heappush(running, (rank, s, e, i))
            upcoming += 1
        while running and running[0][2] <= now:
            heapq.heappop(running)
        yield now, then, running[0][3] if running else None


def self_spans(events: Sequence[Event]) -> list[tuple[int, int, int]]:
    """(start, end, index) of what each event of CPU threads did itself: its time without that of those inside it."""
    threads: dict[Any, list[int]] = defaultdict(list)
    for i in sorted(range(len(events)), key=lambda i: (events[i].start, -events[i].end)):
        threads[events[i].thread].append(i)
    found = []
    for own in threads.values():
        nested = [(events[i].start, events[i].end, -depth) for depth, i in enumerate(own)]  # the innermost owns
        window = (events[own[0]].start, max(events[i].end for i in own))
        found += [(start, end, own[k]) for start, end, k in owners(nested, window) if k is not None]
    return found
