"""Kernels with one fault each, compiled for sm_90 in a process of its own; prints what the report finds, as JSON."""

import json

import torch

from kernels import targets
from kernels.triton_utils import Launch, tl, triton


@triton.jit
def good_norm_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, 2 * tl.load(x_ptr + at, mask=at < N), mask=at < N)


@triton.jit
def double_norm_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < N).to(tl.float64)
    tl.store(y_ptr + at, (x * 1.1).to(tl.float32), mask=at < N)


@triton.jit
def narrow_norm_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, 2 * tl.load(x_ptr + 3 * at, mask=at < N), mask=at < N)


@triton.jit
def spilling_norm_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < N).to(tl.float32)
    tl.store(y_ptr + at, x / tl.sum(x) / tl.max(x) / tl.sum(x * x), mask=at < N)


@triton.jit
def product_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    at = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + at)
    if UPCAST:
        x = x.to(tl.float32)
    tl.store(y_ptr + at, tl.dot(x, x, input_precision=PRECISION))


def found(kernel, dtype, warps=4, **constants):
    x = torch.empty(1 << 20, dtype=dtype, device="meta")
    launch = Launch(kernel, (1,), (x, x, 1 << 20), dict(constants, num_warps=warps))
    return targets.faults(targets.build("test", "test", launch, "sm_90"), dtype)


f32, bf16 = torch.float32, torch.bfloat16
rows = {
    "good": found(good_norm_kernel, bf16, BLOCK=2048),
    "float64": found(double_norm_kernel, f32, BLOCK=1024),
    "narrow": found(narrow_norm_kernel, bf16, BLOCK=2048),
    "spills": found(spilling_norm_kernel, f32, warps=1, BLOCK=16384),
    "tf32": found(product_kernel, f32, BLOCK=64, PRECISION="tf32", UPCAST=False),
    "ieee": found(product_kernel, f32, BLOCK=32, PRECISION="ieee", UPCAST=False),
    "tensor cores": found(product_kernel, bf16, BLOCK=64, PRECISION="ieee", UPCAST=False),
    "no tensor cores": found(product_kernel, bf16, BLOCK=32, PRECISION="ieee", UPCAST=True),
    "does not compile": found(product_kernel, bf16, BLOCK=64, PRECISION="nonsense", UPCAST=False),
}
print(json.dumps(rows))
