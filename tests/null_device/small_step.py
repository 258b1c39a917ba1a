"""A child of lower.ask: the launches of a step, and what it allocates, as JSON; kernels are not compiled."""

from dataclasses import asdict

from profiling.compiled import launches, lower, memory

case = lower.child_case()
ready = lower.prepared(case)
found, events = launches.recorded(ready)
phases = memory.report(events)
made = dict(
    launches=[asdict(launch) for launch in found.launches],
    generated=sorted(found.generated),
    ours=sorted(found.ours),
    phases=phases,
    peak=max(phase["peak"] for phase in phases.values()),
    graphs=[graph.name for graph in ready.graphs],
)
lower.child_ends(made)
