"""What a kernel or an operator is by its name, and what it computes and moves by the shapes in its event.

The table is read from the top, the first match counts. FLOPs are known of matrix products (a multiply and an add are
two), bytes of products and of torch.compile's Triton kernels (whose every pointer is among the inputs); both of most
operators of ours (custom_ops.py); of everything else neither is guessed. Shapes and types are whatever a file holds: of
those that cannot be, the cost is not known.
"""

import math
import re
from itertools import zip_longest
from typing import Any, NamedTuple

from profiling.recorded import custom_ops

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
        r"gemm|cutlass|cublas|nvjet|xmma|wgmma|cijk|splitk|_product_kernel|_symmetric_kernel|triton_tem_|"
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


Tensor = tuple[list[int], str]  # sizes, dtype
MOST = 1 << 62  # elements: no tensor has more


def inputs(args: dict[str, Any]) -> list[Tensor | None]:
    """An event's inputs by their "Input Dims" and "Input type"; None where one is no tensor, or is damaged."""
    dims, types = args.get("Input Dims"), args.get("Input type")
    if not isinstance(dims, list):
        return []
    dtypes = types if isinstance(types, list) else []
    return [_tensor(shape, dtype) for shape, dtype in zip_longest(dims, dtypes[: len(dims)])]


def _tensor(shape: Any, dtype: Any) -> Tensor | None:
    if not isinstance(shape, list) or not all(map(_is_count, shape)):
        return None
    return (shape, dtype if isinstance(dtype, str) else "") if math.prod(shape) < MOST else None


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < MOST


# Which two inputs an operator multiplies.
_FACTORS = {"aten::mm": (0, 1), "aten::bmm": (0, 1), "aten::_scaled_mm": (0, 1), "aten::addmm": (1, 2),
            "aten::baddbmm": (1, 2), "mkldnn::_linear_pointwise": (0, 1), "linear_relu2": (0, 1),
            "relu2_backward": (0, 1)}  # fmt: skip
_TURNED = ("mkldnn::_linear_pointwise", "linear_relu2")  # by a Linear's weight, which is (out, in)


class Product(NamedTuple):
    """A matrix product: FLOPs; the least bytes that must move, None where types are not known; fp8 or half: of what."""

    flops: int
    bytes: int | None
    fp8: bool
    half: bool  # both factors have 16 bits: what peaks are stated for


def product(name: str, args: dict[str, Any]) -> Product | None:
    """What an operator multiplies, if it is a matrix product with known shapes."""
    name = custom_ops.short_name(name) or name
    if name not in _FACTORS:
        return None
    given = dict(enumerate(inputs(args)))
    a, b = (given.get(i) for i in _FACTORS[name])
    if not a or not b or len(a[0]) < 2 or len(b[0]) < 2:
        return None
    *rows, inner = a[0]
    columns = b[0][0] if name in _TURNED else b[0][-1]
    if inner not in b[0][-2:]:
        return None
    flops = 2 * math.prod(rows) * inner * columns
    moved = None
    of_a, of_b = itemsize(a[1]), itemsize(b[1])
    if of_a and of_b:
        out = max(2, of_a, of_b)  # fp8 products write bfloat16 or wider
        moved = math.prod(a[0]) * of_a + math.prod(b[0]) * of_b + math.prod(rows) * columns * out
    small = ["float8" in dtype.lower() for _, dtype in (a, b)]
    return Product(flops, moved, any(small), of_a == of_b == 2 and "int" not in a[1] + b[1])


# Kernels of torch.compile that do nothing but stream: pointwise, reductions, lists; no templates of products.
STREAMS = re.compile(r"triton_(poi|per|red|for)_")


def streamed(name: str, args: dict[str, Any]) -> int | None:
    """Bytes of the tensors that a kernel of torch.compile is given, each read or written once; None for others, and
    for its templates, which multiply.
    """
    if not name.startswith("triton_") or name.startswith("triton_tem_"):
        return None
    moved = 0
    for given in inputs(args):
        shape, dtype = given or (None, "")
        if shape == []:  # a scalar
            continue
        size = itemsize(dtype)
        if not shape or not size:
            return None
        moved += math.prod(shape) * size
    return moved or None


# Bytes on the wire over bytes of the message, for n ranks in a ring: what makes collectives comparable with a link.
def bus_bytes(args: dict[str, Any]) -> float | None:
    """(n−1)/n or 2(n−1)/n of a collective's message, from its event; None without the sizes."""
    name = str(args.get("Collective name", "")).replace("_", "").lower()
    size = itemsize(str(args.get("dtype", "")))
    said: list[Any] = [args.get(key) for key in ("Group size", "In msg nelems", "Out msg nelems")]
    if not name or not size or not all(map(_is_count, said)) or not said[0]:
        return None
    ranks, message = said[0], max(said[1:]) * size  # an all-gather's output, a reduce-scatter's input
    if name.startswith("allreduce"):
        return 2 * (ranks - 1) / ranks * message
    if name.startswith(("allgather", "reducescatter", "alltoall")):
        return (ranks - 1) / ranks * message
    return float(message)
