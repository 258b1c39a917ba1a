"""What a kernel or an operator is by its name, and what it computes and moves by the shapes in its event.

The table is read from the top, the first match counts. FLOPs are known of matrix products (a multiply and an add are
two), bytes of products and of torch.compile's Triton kernels (whose every pointer is among the inputs); of everything
else neither is guessed.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

PRODUCTS, ATTENTION, STREAMING, LOSS = "matrix products", "attention", "norms, pointwise", "cross-entropy"
OPTIMIZER, COMMUNICATION, COPIES, OTHER = "optimizer", "communication", "copies", "other"
CATEGORIES = (PRODUCTS, ATTENTION, STREAMING, LOSS, OPTIMIZER, OTHER, COMMUNICATION, COPIES)
# Who owns an instant in which several streams work: computing hides communication, that hides copies.
RANK = {**dict.fromkeys(CATEGORIES, 0), COMMUNICATION: 1, COPIES: 2}

NAMES = [
    (COMMUNICATION, r"nccl|rccl|gloo:|c10d::|record_param_comms"),
    (LOSS, r"cross_entropy|nll_loss|log_softmax|logsumexp"),
    (ATTENTION, r"flash|fmha|attention|attn|sdpa|_delta_kernel|_decode_kernel|_combine_kernel"),
    (
        PRODUCTS,
        r"gemm|cutlass|cublas|nvjet|xmma|wgmma|cijk|splitk|_product_kernel|_symmetric_kernel|"
        r"aten::(_scaled_)?(b|add|baddb)?mm\b|aten::(linear|matmul|dot|mv|addmv|mkldnn_linear)|_linear_pointwise",
    ),
    (OPTIMIZER, r"multi_tensor_apply|adam|_momentum_kernel|_scale_rows_kernel|_squares_kernel|_step_kernel"),
    (COPIES, r"memcpy|memset|aten::(copy_|_?to(_copy)?|clone|contiguous)$"),
    (
        STREAMING,
        r"triton_|elementwise|reduce|norm|softmax|rotary|vectorized|index|scatter|gather|embedding|cat|fill|"
        r"_amax_kernel|_quantize_kernel|compiled|inductor|## call|cpp_fused|"
        r"aten::(add|sub|mul|div|sum|mean|pow|square|sqrt|rsqrt|reciprocal|relu|sigmoid|tanh|exp|log|where|neg|"
        r"clamp|zero|ones|stack|amax|max|min|abs|eq|ne|ge|gt|lt|le|roll|_foreach|linalg_vector_norm|threshold)",
    ),
]
_PATTERNS = [(category, re.compile(pattern)) for category, pattern in NAMES]


def category(name: str) -> str:
    """Of a kernel or operator by its name alone; `other` where nothing fits."""
    lower = name.lower()
    return next((found for found, pattern in _PATTERNS if pattern.search(lower)), OTHER)


ITEMSIZE = {"double": 8, "long int": 8, "float": 4, "int": 4, "short int": 2, "c10::bfloat16": 2, "c10::half": 2,
            "bfloat16": 2, "half": 2, "float32": 4, "float16": 2, "float64": 8, "int64": 8, "int32": 4, "long": 8,
            "bool": 1, "signed char": 1, "unsigned char": 1, "char": 1, "byte": 1, "int8": 1, "uint8": 1}  # fmt: skip


def itemsize(dtype: str) -> int | None:
    """Bytes of an element, by any of the names that traces use; None for an unknown one."""
    return 1 if "float8" in dtype.lower() else ITEMSIZE.get(dtype.lower())


# Which two inputs an operator multiplies.
_FACTORS = {"aten::mm": (0, 1), "aten::bmm": (0, 1), "aten::_scaled_mm": (0, 1), "aten::addmm": (1, 2),
            "aten::baddbmm": (1, 2), "mkldnn::_linear_pointwise": (0, 1)}  # fmt: skip


def product(name: str, args: dict[str, Any]) -> tuple[int, int | None, bool] | None:
    """(FLOPs, least bytes or None, whether in fp8) of an operator that is a matrix product with known shapes."""
    if name not in _FACTORS:
        return None
    dims, types = args.get("Input Dims") or [], args.get("Input type") or []
    try:
        a, b = (dims[i] for i in _FACTORS[name])
        dtypes = [types[i] for i in _FACTORS[name] if i < len(types)]
        *rows, inner = a
        columns = b[0] if name.startswith("mkldnn") else b[-1]  # a Linear's weight is (out, in)
        if not rows or not b or inner not in b[-2:]:
            return None
        flops = 2 * math.prod(rows) * inner * columns
    except (IndexError, TypeError, ValueError):
        return None
    sizes = [itemsize(dtype) for dtype in dtypes]
    moved = None
    if len(sizes) == 2 and all(sizes):
        out = max(2, *sizes)  # type: ignore[type-var]  # fp8 products write bfloat16 or wider
        moved = math.prod(a) * sizes[0] + math.prod(b) * sizes[1] + math.prod(rows) * columns * out  # type: ignore
    return flops, moved, any("float8" in dtype.lower() for dtype in dtypes)


def streamed(name: str, args: dict[str, Any]) -> int | None:
    """Bytes of the tensors that a kernel of torch.compile is given, each read or written once; None for others."""
    if not name.startswith("triton_"):
        return None
    dims: Sequence[Any] = args.get("Input Dims") or []
    types: Sequence[str] = args.get("Input type") or []
    sizes = [(math.prod(shape), itemsize(dtype)) for shape, dtype in zip(dims, types) if shape]
    if not sizes or not all(size for _, size in sizes):
        return None
    return sum(count * size for count, size in sizes if size)


# Bytes on the wire over bytes of the message, for n ranks in a ring: what makes collectives comparable with a link.
def bus_bytes(args: dict[str, Any]) -> float | None:
    """(n−1)/n or 2(n−1)/n of a collective's message, from its event; None without the sizes."""
    name = str(args.get("Collective name", "")).replace("_", "").lower()
    size, ranks = itemsize(str(args.get("dtype", ""))), args.get("Group size")
    counts = [args.get(key) for key in ("In msg nelems", "Out msg nelems")]
    whole = [count for count in counts if isinstance(count, int)]
    if not name or not size or not isinstance(ranks, int) or len(whole) < 2:
        return None
    message = max(whole) * size  # an all-gather's output, a reduce-scatter's input
    if name.startswith("allreduce"):
        return 2 * (ranks - 1) / ranks * message
    if name.startswith(("allgather", "reducescatter", "alltoall")):
        return (ranks - 1) / ranks * message
    return float(message)
