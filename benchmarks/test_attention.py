"""A window on the CPU: the blocked reference against SDPA with a (T, T) mask, in one run, in turns.

python -m pytest benchmarks/test_attention.py --benchmark-only      (or python -m benchmarks.test_attention)
"""

import json
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from benchmarks import timer
from kernels import tuning, use
from kernels.attention import flash_attention
from nanochat.flags import parse, run_script

T, WINDOW, H, D = 2048, 512, 6, 64


def inputs(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, T, H, D, generator=generator).to(dtype).requires_grad_() for _ in range(3)]


def blocked(q, k, v):
    with use("torch"):
        return flash_attention(q, k, v, window=WINDOW)


def masked(q, k, v):
    i = torch.arange(T)
    mask = (i[None] <= i[:, None]) & (i[None] >= i[:, None] - WINDOW)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)


def step(attention, tensors) -> None:
    attention(*tensors).square().sum().backward()


@pytest.mark.parametrize("attention", [blocked, masked])
def test_forward_and_backward(benchmark, attention):
    tensors = inputs(torch.float32)
    with torch.no_grad():
        assert torch.allclose(blocked(*tensors), masked(*tensors), atol=1e-5)  # no time for a wrong answer
    benchmark(step, attention, tensors)


@dataclass
class Flags:
    pass


def main() -> None:
    """Medians of runs in turns, and their ratio, as one line of JSON."""
    parse(Flags, __doc__ or "")
    result: dict[str, object] = dict(T=T, window=WINDOW, heads=H, head_dim=D, threads=torch.get_num_threads())
    clock = tuning.clock("cpu")
    for dtype in (torch.float32, torch.bfloat16):
        tensors = inputs(dtype)
        for name, call in (("forward", lambda a, t=tensors: a(*t)), ("both", lambda a, t=tensors: step(a, t))):
            calls = {a.__name__: lambda a=a, call=call: lambda: call(a) for a in (blocked, masked)}
            samples = timer.in_turns(calls, 60.0, 11, clock)
            mine, theirs = (timer.quartiles(samples[key])[1] for key in ("blocked", "masked"))
            result[f"{str(dtype)[6:]} {name}"] = dict(blocked_ms=mine, masked_ms=theirs, ratio=theirs / mine)
    print(json.dumps(result))


if __name__ == "__main__":
    run_script(main)
