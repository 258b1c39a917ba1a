"""Prints the names of the ops, of those given, whose kernels for an H100 add numbers up. Needs no interpreter."""

import sys

import torch

from kernels import OPS, targets

for name in sys.argv[1:]:
    case = next(case for key, case in OPS[name].cases.items() if key.startswith("odd"))
    made = [targets.compiled(launch, "sm_90") for launch in targets.launches(OPS[name], case, torch.float32, "sm_90")]
    assert made, name
    if any(word in kernel.asm["ttir"] for kernel in made for word in ("tt.reduce", "tt.dot", "tt.scan", "atomic")):
        print(name)
