"""What an operator of kernels/ moves and computes, by the shapes in its event.

Every launcher there is its own shape function, so it is asked: called with tensors of those shapes that hold no memory,
it says what comes out and how many kernels it would launch. An operator that launches one kernel, which touches each of
its tensors once, moves its inputs and outputs, and once more what it changes in place.
"""

import ast
import json
import re
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import OPS
from kernels.registry import tensors
from kernels.triton_utils import NAMESPACE, capture

# In a trace the operator, and inside of it autograd's copy where gradients are wanted, which is who launches then.
_NAME = re.compile(r"(?:nanochat_)?kernels::(\w+)$|GeneratedBackwardFor_(?:nanochat_)?kernels_(\w+)_default$")
DTYPES = {"double": torch.float64, "float": torch.float32, "c10::BFloat16": torch.bfloat16, "c10::Half": torch.float16,
          "long int": torch.int64, "int": torch.int32, "bool": torch.bool, "c10::Float8_e4m3fn": torch.float8_e4m3fn,
          "c10::Float8_e5m2": torch.float8_e5m2}  # fmt: skip
# These touch only a part of their tensors, which one depends on what stands in them; or products count for them.
_UNKNOWN = ("embedding_backward", "flash_attention_decode", "symmetric_product", "linear_relu2", "relu2_backward")


class Cost(NamedTuple):
    bytes: int
    flops: int  # 0 where bytes are the limit anyway
    half: bool  # multiplied in 16 bits: what peaks are stated for


def short_name(name: str) -> str:
    """Of an operator of ours as it stands in a trace, without the namespace; "" for any other."""
    found = _NAME.match(name)
    return (found[1] or found[2]) if found else ""


def cost(name: str, args: dict[str, Any]) -> Cost | None:
    """None for operators that are not ours, for those above, and where shapes were not recorded or cannot be."""
    op = short_name(name)
    if not op or op in _UNKNOWN:
        return None
    try:
        return _cost(op, json.dumps([args["Input Dims"], args["Input type"], args["Concrete Inputs"]]))
    except Exception:  # a trace is a file: whatever torch makes of its shapes, the cost is not known
        return None


@lru_cache(maxsize=4096)
def _cost(op: str, recorded: str) -> Cost | None:
    overload = getattr(getattr(torch.ops, NAMESPACE), op).default
    schema = overload._schema.arguments
    given = [_argument(*said) for said in zip(*json.loads(recorded), strict=True)]
    if len(given) != len(schema):
        return None
    with capture() as launches:
        results = tensors(overload(*given))
    if len(launches) != 1:
        return None
    changed = [value for value, said in zip(given, schema) if said.alias_info and said.alias_info.is_write]
    touched = [value for value in [*given, *results, *changed] if isinstance(value, Tensor)]
    flops = 0
    if op == "flash_attention":
        q, k, _, _, window, _ = given
        (B, T, H, D), (S, K) = q.shape, k.shape[1:3]
        flops = OPS[op].flops(dict(B=B, T=T, S=S, H=H, K=K, D=D, W=-1 if window is None else window))
    return Cost(sum(value.nbytes for value in touched), flops, given[0].dtype.itemsize == 2)


def _argument(dims: Any, dtype: str, value: str) -> Any:
    if dtype in DTYPES:
        return torch.empty(dims, dtype=DTYPES[dtype], device="meta")
    if dtype == "TensorList":  # of scalars, whose dtypes are not recorded
        return [torch.empty(each, dtype=torch.float64, device="meta") for each in dims]
    return ast.literal_eval(value) if value else None
