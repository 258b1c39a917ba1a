"""A matrix product that torch.compile writes as Inductor's own Triton template, with what follows it in its epilogue.

Without a search (`max_autotune_gemm`, minutes on a card, for all products of a model) Inductor calls the vendor's
library, and a pointwise op after it is a pass of its own. This product is lowered to the template at once, in block
sizes that are given: nothing is searched, no other product changes, and it can be lowered where there is no card.
Outside of torch.compile it is an ordinary product.

Source: torch/_inductor/kernel/mm.py, whose `mm_template` this is.
"""

from typing import Any

import torch
from torch import Tensor

from . import tuned
from .constant import constant
from .triton_utils import operator


@operator()
def _template_product(x: Tensor, w: Tensor, blocks: list[int]) -> Tensor:
    """x·w for x (M, R), w (R, N), summed in float32; blocks: BLOCK_M, BLOCK_N, BLOCK_R, GROUP_M, warps, stages."""
    return x @ w


def template_product(x: Tensor, w: Tensor, blocks: list[int]) -> Tensor:
    """x·w for x (M, R) and w (R, N) by the template, within torch.compile. blocks: of `template_blocks`."""
    return _template_product(x, w, blocks)


@constant
def template_blocks(op: str, dtype: torch.dtype, size: int, device: torch.device) -> tuple[int, ...]:
    """An op's block sizes, in the order that the product takes them; and Inductor learns how to lower it."""
    from torch._inductor.lowering import lowerings, register_lowering

    name = _template_product._opoverload
    if name not in lowerings:
        register_lowering(name, type_promotion_kind=None)(_lowered)
    config = tuned.config(op, dtype, size, device)
    return tuple(config[key] for key in ("BLOCK_M", "BLOCK_N", "BLOCK_R", "GROUP_M", "num_warps", "num_stages"))


def _lowered(x: Any, w: Any, blocks: list[int]) -> Any:
    """Inductor's buffer for the product of two of its buffers."""
    from torch._inductor.kernel.mm import mm_template
    from torch._inductor.kernel.mm_common import mm_args

    _, _, r, layout, x, w = mm_args(x, w)
    m, n, BLOCK_K, GROUP_M, num_warps, num_stages = blocks
    made = mm_template.generate(
        input_nodes=(x, w), layout=layout, num_stages=num_stages, num_warps=num_warps, BLOCK_M=m, BLOCK_N=n,
        BLOCK_K=BLOCK_K, GROUP_M=GROUP_M, EVEN_K=r % BLOCK_K == 0, ALLOW_TF32=False, ACC_TYPE="tl.float32",
        USE_FAST_ACCUM=False,
    )  # fmt: skip
    return made.output_node()
