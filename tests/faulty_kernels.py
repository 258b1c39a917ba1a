"""Kernels with one fault each, compiled in a process of its own; prints what the report finds, as JSON.

With the argument `crash`, only one that makes Triton 3.9's compiler for AMD RDNA end the process (SIGSEGV in LLVM's
SLP vectorizer): sums of rows that are added up over a loop.
"""

import json
import sys

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


@triton.jit
def transposing_kernel(x_ptr, y_ptr, N, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    x = tl.load(x_ptr + rows[:, None] * COLUMNS + columns[None, :])
    tl.store(y_ptr + columns[:, None] * ROWS + rows[None, :], tl.trans(x))


@triton.jit
def summing_kernel(x_ptr, y_ptr, N, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    columns = tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(N, ROWS), tl.num_programs(0)):
        rows = tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS)
        at = rows[:, None] * COLUMNS + columns[None, :]
        mask = (rows < N)[:, None] & (columns < COLUMNS)[None, :]
        m = tl.load(x_ptr + at, mask=mask, other=0.0)
        total += tl.sum(m * tl.load(y_ptr + at, mask=mask, other=0.0), axis=1)
    tl.store(y_ptr + tl.program_id(0), tl.sum(total))


def found(kernel, dtype, warps=4, target="sm_90", **constants):
    x = torch.empty(1 << 20, dtype=dtype, device="meta")
    launch = Launch(kernel, (1,), (x, x, 1 << 20), dict(constants, num_warps=warps))
    return targets.faults(targets.build("test", "test", launch, target), dtype)


f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
if sys.argv[1:] == ["crash"]:
    print(json.dumps(found(summing_kernel, f32, target="gfx1100", ROWS=8, COLUMNS=256)))
    sys.exit()
product = dict(BLOCK=64, PRECISION="ieee", UPCAST=False)
rows = {
    "good": found(good_norm_kernel, bf16, BLOCK=2048),
    "float64": found(double_norm_kernel, f32, BLOCK=1024),
    "narrow": found(narrow_norm_kernel, bf16, BLOCK=2048),
    "spills": found(spilling_norm_kernel, f32, warps=1, BLOCK=16384),
    "tf32": found(product_kernel, f32, BLOCK=64, PRECISION="tf32", UPCAST=False),
    "ieee": found(product_kernel, f32, BLOCK=32, PRECISION="ieee", UPCAST=False),
    "tensor cores": found(product_kernel, bf16, BLOCK=64, PRECISION="ieee", UPCAST=False),
    "no tensor cores": found(product_kernel, bf16, BLOCK=32, PRECISION="ieee", UPCAST=True),
    "shared memory": found(transposing_kernel, f32, warps=32, target="sm_86", ROWS=256, COLUMNS=128),
    "shared memory of an H100": found(transposing_kernel, f32, warps=32, ROWS=256, COLUMNS=128),
    "no tensor cores for sm_75": found(product_kernel, f16, target="sm_75", **product),
    "WMMA": found(product_kernel, f16, target="gfx1100", **product),
    "MFMA": found(product_kernel, f16, target="gfx950", **product),
    "does not compile": found(product_kernel, bf16, BLOCK=64, PRECISION="nonsense", UPCAST=False),
}
print(json.dumps(rows))
