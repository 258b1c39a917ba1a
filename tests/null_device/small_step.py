"""A child of lower.ask: the launches of a step, and what it allocates, as JSON; kernels are not compiled.

Also each pointwise kernel of Inductor's with the bytes of its arguments that have an element for each of its own.
"""

from dataclasses import asdict

from torch import Tensor

from profiling.compiled import launches, lower, memory

case = lower.child_case()
ready = lower.prepared(case)
elements = {}


def pointwise(name, source, args):
    if name.startswith("triton_poi_"):
        tensors = [x for x in args if isinstance(x, Tensor)]
        times = 1 + source.count("in_out_ptr0, ")  # of the first argument, where that is one
        whole = [x.nbytes * (times if i == 0 else 1) for i, x in enumerate(tensors) if x.numel() == args[len(tensors)]]
        elements[name] = sum(whole)


ready.launched.append(pointwise)
found, events = launches.recorded(ready)
phases = memory.report(events)
made = dict(
    launches=[asdict(launch) for launch in found.launches],
    generated=sorted(found.generated),
    ours=sorted(found.ours),
    elements=elements,
    phases=phases,
    peak=max(phase["peak"] for phase in phases.values()),
    graphs=[graph.name for graph in ready.graphs],
)
lower.child_ends(made)
