"""What a launch does, from its operator and its tensors: the bytes that go to and from memory once, and its FLOPs.

Tensors count whole, but where an operator by its nature touches a part: rows that are looked up or written into a
cache, the keys that a query sees. Which rows of a table a gradient has is not known: it counts whole.
"""

import ast
import re
from collections.abc import Iterable, Sequence
from math import isqrt, prod
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from kernels.triton_utils import Launch

FILLS = re.compile(r"new_|(zeros|ones|full)_like")  # write what they return, and read nothing of what it is like
GATHERS = re.compile(r"(embedding|index|index_select|gather)$")  # read as much as they return, of a table
WRITERS = re.compile(r"(_foreach_)?(zero|fill|copy)_$")  # change what they do not read
# Of kernels: arguments that the operator changes and the kernel only writes.
WRITTEN = {("_momentum_kernel", "out_ptr")}
# Of an attention backward's 5 products per pair of query and key, as papers count them: in which kernel, in sevenths,
# since two of the seven that really run are made twice.
SEVENTHS = {"_delta_kernel": 0, "_attention_dq_kernel": 3, "_attention_dkdv_kernel": 4}


def size(tensor: Tensor) -> int:
    """Bytes that it has in memory: an expanded dimension is there once."""
    if not tensor.numel():
        return 0
    return tensor.itemsize * prod(n for n, stride in zip(tensor.shape, tensor.stride()) if stride)


def storage(tensor: Tensor) -> int:
    """What tensors that share memory have in common."""
    return tensor.untyped_storage()._cdata


def tensors_of(value: Any) -> list[Tensor]:
    return [x for x in tree_leaves(value) if isinstance(x, Tensor)]


def changed(func: Any, args: Sequence[Any]) -> list[Tensor]:
    """The arguments that an operator changes in place."""
    written = (value for argument, value in zip(func._schema.arguments, args) if argument.is_write)
    return tensors_of(list(written))


def aten_bytes(func: Any, args: Sequence[Any], out: Any) -> int:
    """Of an operator of ATen's: what it reads, and what it writes."""
    name = func._schema.name.split("::")[1]
    read, made, mutated = tensors_of(args), tensors_of(out), changed(func, args)
    if FILLS.match(name):
        read = []
    elif GATHERS.match(name):
        read = [*read[1:], *made]
    elif name == "index_put_":  # (table, indices, values)
        read, made, mutated = read[1:], [], [read[-1]]
    elif WRITERS.match(name):
        read = read[len(mutated) :]
    known = {storage(x) for x in mutated}
    return sum(map(size, [*read, *mutated, *(x for x in made if storage(x) not in known)]))


def added_to(source: str, args: Sequence[Any]) -> list[Tensor]:
    """The arguments of a kernel of Inductor's to which it adds by atomic operations: they are read as well."""
    names = [word.strip() for word in source.partition("def triton_")[2].partition("(")[2].partition(")")[0].split(",")]
    added = set(re.findall(r"tl\.atomic_add\((\w+)", source))
    return [x for name, x in zip(names, args) if name in added]


def only_moves(source: str) -> bool:
    """Whether a kernel of Inductor's computes nothing: what it stores are constants, or loaded, cast at most, and
    chosen by where it lies.
    """
    if "tl.atomic_add" in source:
        return False
    made: dict[str, list[ast.expr]] = {}
    stored: list[ast.expr] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign):
            for name in (part.id for part in ast.walk(node.targets[0]) if isinstance(part, ast.Name)):
                made.setdefault(name, []).append(node.value)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.store":
            stored.append(node.args[1])
    seen: set[str] = set()

    def loaded(value: ast.expr, known: set[str]) -> bool:
        """Whether what is loaded decides it; known: names that were followed."""
        names = {node.id for node in ast.walk(value) if isinstance(node, ast.Name)} - known
        known |= names
        return "tl.load" in ast.unparse(value) or any(loaded(of, known) for name in names for of in made.get(name, []))

    def moved(value: ast.expr) -> bool:
        if isinstance(value, ast.Name):
            first = value.id not in seen
            seen.add(value.id)
            return not first or (value.id in made and all(map(moved, made[value.id])))
        if not isinstance(value, ast.Call):
            return isinstance(value, ast.Constant)
        function = ast.unparse(value.func)
        if function in ("tl.load", "tl.full"):
            return True
        if function == "tl.where":
            return not loaded(value.args[0], set()) and moved(value.args[1]) and moved(value.args[2])
        if function == "tl.broadcast_to":
            return moved(value.args[0])
        return isinstance(value.func, ast.Attribute) and value.func.attr == "to" and moved(value.func.value)

    return bool(stored) and all(map(moved, stored))


def kernel_bytes(launch: Launch, mutated: Iterable[Tensor], seen: dict[int, int]) -> int:
    """Of a kernel of ours: each of its tensors once, or twice where its operator changes it.

    seen: id of a tensor of which a part is touched → bytes of that.
    """
    twice = {storage(x) for x in mutated}
    found = {}
    for name, x in zip(launch.kernel.arg_names, launch.args):
        if isinstance(x, Tensor):
            times = 1 + (storage(x) in twice and (launch.kernel.fn.__name__, name) not in WRITTEN)
            found[id(x)] = times * seen.get(id(x), size(x))
    return sum(found.values())


def seen_of_caches(op: str, args: Sequence[Any]) -> dict[int, int]:
    """Bytes of the keys and values that an operator reads, by id of their tensors; empty where that is all of them.

    Rows are taken to be full: the last query stands at the last key.
    """
    if op != "flash_attention_decode":
        return {}
    q, k, v, _, window = args[:5]
    S = k.size(1)  # k, v (B, S, K, D)
    keys = S if window is None else min(S, window + q.size(1))
    return {id(x): size(x) * keys // S for x in (k, v)}


def product_flops(tensors: Sequence[Tensor]) -> int:
    """2·M·N·K of a product (.., M, K) × (K, N) or (.., K, N), the last two of these factors and results: a, b, out."""
    a, b = tensors[0], tensors[1]
    return 2 * a.numel() * b.shape[-1]


def template_flops(tensors: Sequence[Tensor]) -> int:
    """2·M·N·K of a template of Inductor's: two factors, what its epilogue reads and the result, each as it lies in
    memory, turned or not; all that are of the result's size.
    """
    return 2 * isqrt(tensors[0].numel() * tensors[1].numel() * tensors[-1].numel())


def our_flops(op: str, args: Sequence[Any]) -> int:
    """Of an operator of ours, by its arguments; 0 where bytes are the limit anyway."""
    if op in ("linear_relu2", "relu2_backward"):  # x (N, C) · weight (4·C, C)ᵀ; dout (N, C) · w2 (C, 4·C)
        return 2 * args[0].numel() * args[1].shape[0 if op == "linear_relu2" else 1]
    if op == "symmetric_product":  # x (.., M, K) · xᵀ, or turned xᵀ·x, half of it
        return args[0].numel() * args[0].shape[-1 if args[4] else -2]
    return attention_flops(op, args)


def kernel_flops(launch: Launch, first: bool, flops: int) -> int:
    """What one kernel of an operator takes of the operator's FLOPs: all if it is the first, but where SEVENTHS says."""
    sevenths = SEVENTHS.get(launch.kernel.fn.__name__, 7 * first)
    return flops * sevenths // 7


def attention_flops(op: str, args: Sequence[Any]) -> int:
    """Of causal attention over the pairs that a window leaves: ours of q (B, T, H, D), PyTorch's of (B, H, T, D).

    The last query stands at the last key. PyTorch's with a mask, or fewer queries than keys, multiplies all pairs.
    """
    tensors = [x for x in args if isinstance(x, Tensor) and x.dim() == 4]
    if "attention" not in op or len(tensors) < 2:
        return 0
    q, k = tensors[0], tensors[2 if "backward" in op else 1]
    ours = op.startswith("flash")
    T, S = q.size(1 if ours else 2), k.size(1 if ours else 2)
    windows = [x for x in args if type(x) is int and 0 <= x < S]
    W = windows[0] + 1 if windows and ours else S
    pairs = sum(min(i, W) for i in range(S - T + 1, S + 1)) if ours or (T == S and "efficient" not in op) else T * S
    return (10 if "backward" in op else 4) * q.numel() // T * pairs
