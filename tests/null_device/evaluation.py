"""The most bytes that a compiled validation allocates beside the model: a case as JSON, and where the answer goes."""

import torch
from torch._library.custom_ops import OPDEFS

import kernels
from nanochat.evaluate.bits_per_byte import score
from profiling.compiled import lower, memory

case = lower.child_case()
ready = lower.prepared(case)
scored = torch.compile(score, dynamic=False)
with ready.fake, torch.no_grad(), kernels.use(case.kernels):
    ready.program.model.eval()
    sizes = torch.zeros(case.config["vocab_size"], dtype=torch.int64, device="cuda")
    scored(ready.program.model, ready.program.ids, ready.program.ids, sizes)
    allocations = memory.Allocations({name: op._init_fn for name, op in OPDEFS.items()})
    with allocations:
        scored(ready.program.model, ready.program.ids, ready.program.ids, sizes)
lower.child_ends(memory.report(allocations.events)["before"]["peak"])
