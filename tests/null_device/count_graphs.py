"""Run on the null device: the graphs that two optimizer steps compile, for each case (JSON); names by case, as JSON.

With --count-only Inductor, nearly all of the time, is left out: Dynamo and AOTAutograd have the graphs apart before it
gets them, and what stands for its code gives back tensors of the shapes that it would.
"""

import gc
import json
import sys
from functools import partial
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent.parent)]

import torch  # noqa: E402
from torch._dynamo.backends.common import aot_autograd  # noqa: E402
from torch._inductor import compile_fx  # noqa: E402

from profiling.compiled.case import Case  # noqa: E402
from profiling.compiled.lower import prepared  # noqa: E402


def counting(names):
    """A backend in Inductor's place, which adds a name for every graph."""

    def compiler(name, graph, inputs):
        names.append(name)
        nodes = next(iter(reversed(graph.graph.nodes))).args[0]
        outputs = [getattr(node, "meta", {}).get("val") for node in nodes]

        def call(args):
            args.clear()
            return [value if value is None else like(value) for value in outputs]

        call._boxed_call = True
        return call

    parts = dict(fw_compiler="forward", bw_compiler="backward", inference_compiler="inference")
    compilers = {part: partial(compiler, name) for part, name in parts.items()}
    backend = aot_autograd(**compilers, keep_inference_input_mutations=True)
    return lambda model, inputs, **options: backend(model, inputs)


def like(value):
    return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=value.device)


def count(case, count_only):
    """(graphs by name, how many of them only the second step compiled)."""
    torch._dynamo.reset()
    gc.collect()  # and not within, where it would be a fifth of the time
    ready, names = prepared(case), []
    if count_only:
        compile_fx.compile_fx = counting(names)
    found = lambda: names if count_only else [graph.name for graph in ready.graphs]
    with ready.fake:
        ready.step()
    first = len(found())
    for group in ready.program.optimizer.param_groups:  # what a schedule changes from step to step
        group["lr"] *= 0.9
        group["weight_decay"] *= 0.9
        if group["kind"] == "muon":
            group["momentum"] = 0.9
    with ready.fake:
        ready.step()
    return list(found()), len(found()) - first


if __name__ == "__main__":
    gc.disable()
    count_only, cases = "--count-only" in sys.argv, [word for word in sys.argv[1:] if word != "--count-only"]
    found = [count(Case(**json.loads(case)), count_only) for case in cases]
    print(json.dumps([dict(names=names, anew=anew) for names, anew in found]))
