"""Run on the null device: the graphs that two optimizer steps compile, for each case (JSON); names by case, as JSON."""

import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent.parent)]

import torch  # noqa: E402

from profiling.compiled.lower import Case, prepared  # noqa: E402

found = []
for text in sys.argv[1:]:
    torch._dynamo.reset()
    ready = prepared(Case(**json.loads(text)))
    with ready.fake:
        ready.step()
    first = len(ready.graphs)
    for group in ready.program.optimizer.param_groups:  # what a schedule changes from step to step
        group["lr"] *= 0.9
        group["weight_decay"] *= 0.9
        if group["kind"] == "muon":
            group["momentum"] = 0.9
    with ready.fake:
        ready.step()
    found.append(dict(names=[graph.name for graph in ready.graphs], anew=len(ready.graphs) - first))
print(json.dumps(found))
