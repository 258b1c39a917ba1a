"""Run on the computing null device: every op as `auto` sends it to a GPU, compiled once for sizes that change."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent.parent)]

import test_dynamic  # noqa: E402
import torch  # noqa: E402

for name, op in test_dynamic.OPS.items():
    torch._dynamo.reset()
    compiled = torch.compile(op.fn, fullgraph=True, dynamic=True, backend="eager")
    for case in test_dynamic.SIZES[name][:2]:
        compiled(**op.inputs(case, torch.float32, "cuda"))
    print(name)
