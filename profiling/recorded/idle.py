"""Why nothing ran: each gap in the work has one cause, read off what the host's threads did meanwhile.

Garbage collection, or waiting for data, where it fills at least half of the gap. Synchronisation, where the gap began
while the host waited for the device: nothing was queued then, and the device waits until the host has launched again.
Between kernels, where the gap is so short that no host could help it. Else the host: it launched too slowly.
"""

import re
from bisect import bisect_right
from typing import Any

from profiling.recorded.trace import Interval, Trace, union

GC = "garbage collection"  # annotated by record.py
WAITING = re.compile(r"(cuda|hip)(Stream|Device|Event)Synchronize|(cuda|hip)Memcpy$")
SHORT = 3_000  # ns: a pause that the GPU itself needs from one kernel to the next
LISTED = 20  # gaps


def idle_causes(
    idle: list[Interval], trace: Trace, window: Interval, on_device: bool
) -> tuple[dict, list[dict[str, Any]]]:
    """(cause → count and ns, the longest gaps). See the module."""
    marks = trace.of("user_annotation")
    filled = {
        GC: union(e.interval for e in marks if e.name == GC),
        "waiting for data": union(e.interval for e in marks if e.name == "data" or "DataLoader" in e.name),
    }
    waits = union(e.interval for e in trace.of("cuda_runtime", "cuda_driver") if WAITING.match(e.name))
    began = [start for start, _ in waits]
    inside = {cause: _overlaps(idle, when) for cause, when in filled.items()}

    def cause(i: int, gap: Interval) -> str:
        for name, overlap in inside.items():
            if 2 * overlap[i] >= gap[1] - gap[0]:
                return name
        if on_device and gap[1] - gap[0] < SHORT:
            return "between kernels"
        waiting = bisect_right(began, gap[0]) - 1
        if on_device and waiting >= 0 and gap[0] < waits[waiting][1]:
            return "synchronisation"
        return "host"

    causes: dict[str, dict[str, int]] = {}
    rows: list[dict[str, Any]] = []
    for i, gap in enumerate(idle):
        why = cause(i, gap)
        found = causes.setdefault(why, dict(count=0, ns=0))
        found["count"] += 1
        found["ns"] += gap[1] - gap[0]
        rows.append(dict(start_ns=gap[0] - window[0], ns=gap[1] - gap[0], cause=why))
    return causes, sorted(rows, key=lambda row: -row["ns"])[:LISTED]


def _overlaps(intervals: list[Interval], others: list[Interval]) -> list[int]:
    """Of each interval, how long it lies in the disjoint others."""
    starts = [start for start, _ in others]
    found = []
    for start, end in intervals:
        near = others[max(0, bisect_right(starts, start) - 1) : bisect_right(starts, end)]
        found.append(sum(max(0, min(end, e) - max(start, s)) for s, e in near))
    return found
