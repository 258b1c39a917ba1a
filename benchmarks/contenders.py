"""Who is measured, by op: CONTENDERS["rms_norm"]["liger"] and so on.

Every op has `triton` (our kernels), `eager` (our reference as it stands) and `compiled` (the reference under
torch.compile). PEERS adds what others offer for the same: torch's own, Liger-Kernel, FlashAttention. A peer takes the
op's inputs; what it wants laid out otherwise is made once by `extra`, outside the clock. A package that is missing, or
a call that a contender cannot take, is a reason to skip it, never an error.

`eager` of rms_norm is F.rms_norm itself, and of full causal attention F.scaled_dot_product_attention.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import OPS, tuned
from kernels.attention import backends
from kernels.registry import Op
from kernels.rms_norm import default_eps
from nanochat.hardware import can_compile

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Contender:
    """`call` takes the op's inputs and what `extra` makes of them; `refuses` says why it cannot take some ("": can).

    setting: of kernels.use, in force during its forward and its backward.
    overwrites: it changes its inputs, so it gets copies of its own. early: its forward computes the gradients already,
    so that only forward and backward together can be compared. plain: the same in plain PyTorch, by whose errors it is
    judged, for one that gives a 16-bit result where our reference keeps float32.
    """

    call: Callable[..., Any]
    extra: Callable[[Inputs], Inputs] = lambda inputs: {}
    refuses: Callable[[Inputs, torch.device], str] = lambda inputs, device: ""
    needs: str = ""  # a package
    setting: str = "torch"
    overwrites: bool = False
    early: bool = False
    plain: Callable[..., Any] | None = None


def obstacle(contender: Contender, inputs: Inputs, device: torch.device) -> str:
    """Why a contender cannot run here; "" when it can."""
    if contender.needs and importlib.util.find_spec(contender.needs) is None:
        return f"{contender.needs} is not installed"
    if contender.needs and device.type != "cuda":
        return f"{contender.needs} needs a CUDA device"
    return contender.refuses(inputs, device)


# ---- ours


def triton(op: Op) -> Contender:
    def refuses(inputs: Inputs, device: torch.device) -> str:
        if op.name not in tuned.ops():
            return "there is no Triton kernel for it"
        return "" if device.type == "cuda" else "our kernels need a CUDA device: interpreted, they have no speed"

    return Contender(op.fn, refuses=refuses, setting=f"torch,{op.name}=triton", early=op.name in EARLY)


@functools.cache
def compiles(device: torch.device) -> str:
    """Why torch.compile does not work here; "" when it does."""
    return can_compile(device)[1]


def compiled(op: Op) -> Contender:
    made = functools.cache(lambda: torch.compile(op.reference, dynamic=False))
    return Contender(
        lambda **inputs: made()(**inputs), refuses=lambda inputs, device: compiles(device), early=op.name in EARLY
    )


# ---- others


def liger(name: str) -> Callable[..., Any]:
    """A function of liger_kernel.transformers.functional, imported when it is called first."""
    return lambda *args, **more: getattr(importlib.import_module("liger_kernel.transformers.functional"), name)(
        *args, **more
    )


def liger_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, scale: float, wide: tuple, ones: Tensor) -> Any:
    """Rotary, then a norm for q and one for k; their layout is (B, H, T, D), and they turn the other way."""
    turned = liger("liger_rope")(q.transpose(1, 2), k.transpose(1, 2), *wide)
    return tuple(liger("liger_rms_norm")(x.transpose(1, 2), ones, default_eps(x.dtype), in_place=False) for x in turned)


def wide_angles(inputs: Inputs) -> Inputs:
    cos, sin = inputs["cos"], inputs["sin"]
    wide = torch.cat((cos, cos), -1)[None], -torch.cat((sin, sin), -1)[None]
    return dict(wide=wide, ones=torch.full((2 * cos.size(-1),), inputs["scale"], dtype=cos.dtype, device=cos.device))


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits.float() if softcap is None else softcap * torch.tanh(logits.float() / softcap)


def no_softcap(inputs: Inputs, device: torch.device) -> str:
    return "" if inputs["softcap"] is None else "it has no softcap"


def plain_head(x: Tensor, weight: Tensor, targets: Tensor, softcap: None) -> Tensor:
    return F.cross_entropy(F.linear(x, weight), targets, ignore_index=-1)


def torch_chunked(x: Tensor, weight: Tensor, targets: Tensor, softcap: None) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(x, weight, targets, ignore_index=-1, options=options)


def lacks(name: str) -> Callable[[Inputs, torch.device], str]:
    def refuses(inputs: Inputs, device: torch.device) -> str:
        return no_softcap(inputs, device) if hasattr(torch.nn, name) else f"this torch has no {name}"

    return refuses


def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, visible: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    gqa = q.size(1) != k.size(1)
    return F.scaled_dot_product_attention(q, k, v, visible, enable_gqa=gqa).transpose(1, 2)


def window_mask(inputs: Inputs) -> Inputs:
    """What the last T of S positions see, (T, S)."""
    T, S, window = inputs["q"].size(1), inputs["k"].size(1), inputs["window"]
    i, j = (torch.arange(n, device=inputs["q"].device) for n in (T, S))
    i = i[:, None] + S - T
    return dict(visible=(j <= i) & (j >= i - (S if window is None else window)))


def no_mask_needed(inputs: Inputs, device: torch.device) -> str:
    q, k = inputs["q"], inputs["k"]
    if inputs["window"] is None and q.size(1) == k.size(1):
        return "without a window, eager is this"
    return "it may give NaN for a query that sees no key" if q.size(1) > k.size(1) else ""


def flash(name: str) -> Contender:
    """FlashAttention 2, 3 or 4, as kernels/attention/backends.py calls it."""

    def refuses(inputs: Inputs, device: torch.device) -> str:
        q = inputs["q"]
        return backends.obstacle(backends.BACKENDS[name], q.dtype, q.size(3), device)

    return Contender(OPS["flash_attention"].fn, refuses=refuses, setting=f"torch,flash_attention={name}")


def fused_adamw(inputs: Inputs) -> Inputs:
    """torch.optim.AdamW on the same memory."""
    parameter = torch.nn.Parameter(inputs["param"])
    optimizer = torch.optim.AdamW(
        [parameter], lr=inputs["lr"], betas=(inputs["beta1"], inputs["beta2"]), eps=inputs["eps"],
        weight_decay=inputs["weight_decay"], fused=True,
    )  # fmt: skip
    step = torch.tensor(inputs["step"] - 1.0, device=parameter.device)
    optimizer.state[parameter] = dict(step=step, exp_avg=inputs["exp_avg"], exp_avg_sq=inputs["exp_avg_sq"])
    parameter.grad = inputs["grad"]
    return dict(optimizer=optimizer)


def relu2(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(x, w1)).square(), w2)


LIGER_NORM = Contender(
    lambda x, weight: liger("liger_rms_norm")(x, weight, default_eps(x.dtype), in_place=False), needs="liger_kernel"
)
LIGER_ADD_NORM = Contender(
    lambda x, delta, ones: liger("liger_fused_add_rms_norm")(x, delta, ones, default_eps(x.dtype), in_place=False)[
        ::-1
    ],
    extra=lambda inputs: dict(ones=torch.ones_like(inputs["x"][0])),
    needs="liger_kernel",
)
LIGER_LOSS = Contender(
    lambda logits, targets, softcap: liger("liger_cross_entropy")(logits, targets, ignore_index=-1, softcap=softcap),
    needs="liger_kernel", overwrites=True, early=True,
)  # fmt: skip
LIGER_HEAD = Contender(
    lambda x, weight, targets, softcap: liger("liger_fused_linear_cross_entropy")(
        x, weight, targets, ignore_index=-1, softcap=softcap
    ),
    needs="liger_kernel", early=True,
)  # fmt: skip
LIGER_RELU2 = Contender(
    lambda x, weight: liger("liger_relu_squared")(F.linear(x, weight)),
    needs="liger_kernel",
)
LIGER_MLP = Contender(
    lambda x, w1, w2: F.linear(liger("liger_relu_squared")(F.linear(x, w1)), w2),
    needs="liger_kernel",
)
TORCH_LOSS = Contender(
    lambda logits, targets, softcap: F.cross_entropy(capped(logits, softcap), targets, ignore_index=-1)
)
TORCH_HEAD = Contender(
    lambda x, weight, targets, softcap: F.linear_cross_entropy(x, weight, targets, ignore_index=-1),
    refuses=lacks("LinearCrossEntropyOptions"), plain=plain_head,
)  # fmt: skip

EARLY = ("linear_cross_entropy",)  # ours compute the gradients in forward: see its file
PEERS: dict[str, dict[str, Contender]] = {
    "rms_norm": dict(liger=LIGER_NORM),
    "add_rms_norm": dict(liger=LIGER_ADD_NORM),
    "qk_norm_rotary": dict(liger=Contender(liger_rotary, wide_angles, needs="liger_kernel", overwrites=True)),
    "cross_entropy": dict(torch=TORCH_LOSS, liger=LIGER_LOSS),
    "linear_cross_entropy": {
        "torch": TORCH_HEAD,
        "torch, chunked": Contender(
            torch_chunked, refuses=lacks("LinearCrossEntropyOptions"), early=True, plain=plain_head
        ),
        "liger": LIGER_HEAD,
    },
    "linear_relu2": dict(liger=LIGER_RELU2),
    "mlp_relu2": dict(liger=LIGER_MLP),
    "flash_attention": {
        "torch, masked": Contender(sdpa, window_mask, no_mask_needed),
        **{name: flash(name) for name in backends.BACKENDS},
    },
    "adamw_": dict(torch=Contender(lambda optimizer, **inputs: optimizer.step(), fused_adamw)),
    "fp8_linear": {"not fp8": Contender(F.linear)},
    "fp8_mlp_relu2": {"not fp8": Contender(relu2)},
}  # fmt: skip

CONTENDERS: dict[str, dict[str, Contender]] = {
    name: dict(
        triton=triton(op), eager=Contender(op.reference, early=name in EARLY), compiled=compiled(op),
        **PEERS.get(name, {}),
    )
    for name, op in OPS.items()
}  # fmt: skip
