"""Which attention runs: FlashAttention 4, 3 or 2 where a build fits, else our Triton kernel, else PyTorch.

All are called with (B, T, H, D) tensors and mean the same by a window: w keys before the query's own, the last query at
the last key. They differ in how they say it:

    FA4  flash_attn.cute             compute capability 9–12 with gradients (8–12 without); (w, 0), unlimited is None;
                                     no operator of PyTorch, so fa4.py makes one
    FA3  flash_attn_interface        9.x; (w, 0), unlimited is −1; out, or (out, lse) in some builds
    FA2  flash_attn                  8.0 and newer; (w, 0), unlimited is −1; returns out

All three take float16 and bfloat16 and head dims up to 256 (FA4: 128). A package that is there proves nothing: each is
tried once on the card with a small forward and backward, and what fails is said, once, and passed over. FA2 before 2.7
and early builds of FA3 are no operators of PyTorch: they work, but break a compiled model's graph in every layer.

Source: github.com/Dao-AILab/flash-attention.
"""

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import dispatch, probing
from ..constant import constant
from ..registry import OPS
from ..triton_utils import specialized
from . import fa4


@dataclass(frozen=True)
class Backend:
    """A FlashAttention package: where it lives, what it takes, and how it writes an unlimited window."""

    name: str
    module: str
    capabilities: tuple[int, int]  # (first, last) major compute capability
    largest_head: int
    unlimited: int | None
    namespace: str = ""  # of its PyTorch operators

    def call(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, scale: float) -> Tensor:
        """Attention by the package's flash_attn_func."""
        sides = (self.unlimited, self.unlimited) if window is None else (window, 0)
        out = _FUNCTIONS[self.name](q, k, v, softmax_scale=scale, causal=causal, window_size=sides)
        return out[0] if isinstance(out, tuple) else out


BACKENDS = {
    "fa4": Backend("fa4", "flash_attn.cute", (9, 12), 128, None),
    "fa3": Backend("fa3", "flash_attn_interface", (9, 9), 256, -1, "flash_attn_3"),
    "fa2": Backend("fa2", "flash_attn", (8, 12), 256, -1, "flash_attn"),
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {}  # of the packages there are; torch.compile does not import
# (backend, dtype, head dim, device) → "" when it works, else why not
_TRIED: dict[tuple[str, torch.dtype, int, str], str] = {}


def capability(device: torch.device) -> int:
    """Major compute capability of a CUDA device; 0 for others and for ROCm."""
    if device.type != "cuda" or torch.version.hip:
        return 0
    return torch.cuda.get_device_capability(device)[0]


def obstacle(backend: Backend, dtype: torch.dtype, head: int, device: torch.device) -> str:
    """Why a backend cannot take such a call here; "" when it can."""
    first, last = backend.capabilities
    major = capability(device)
    if not first <= major <= last:
        return f"{backend.name} needs compute capability {first} to {last}, this device has {major or 'none'}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"{backend.name} takes float16 and bfloat16, not {dtype}"
    if head > backend.largest_head:
        return f"{backend.name} takes head dims up to {backend.largest_head}, not {head}"
    return tried(backend, dtype, head, device)


def tried(backend: Backend, dtype: torch.dtype, head: int, device: torch.device) -> str:
    """Why a backend does not work on a device, found out once by a small forward and backward; "" when it does."""
    key = backend.name, dtype, head, str(device)
    if key not in _TRIED:
        with dispatch.PROBING:
            if key not in _TRIED:
                reason = _outcome(backend, dtype, head, device)
                if reason.startswith(dispatch.FULL):  # of the moment
                    return reason
                _TRIED[key] = reason
    return _TRIED[key]


def _outcome(backend: Backend, dtype: torch.dtype, head: int, device: torch.device) -> str:
    try:
        package = importlib.import_module(backend.module)
        _FUNCTIONS[backend.name] = fa4.flash_attn_func if backend.name == "fa4" else package.flash_attn_func
        dispatch.with_memory(lambda: _try(backend, dtype, head, device))
    except ModuleNotFoundError as problem:
        return f"{problem.name} is not installed"
    except Exception as problem:  # a broken build, a missing symbol, no kernel for this card
        reason = f"{type(problem).__name__}: {problem}".split("\n")[0]
        what = f"{backend.name} is installed but does not work here ({str(dtype)[6:]}, heads of {head})"
        dispatch.check_alive(f"flash_attention: {what}", dispatch.without("flash_attention"), device.index)
        warnings.warn(f"flash_attention: {what}: {reason}", stacklevel=2)
        return reason
    if backend.name != "fa4" and not hasattr(getattr(torch.ops, backend.namespace), "_flash_attn_forward"):
        what = f"this build of {backend.name} is no PyTorch operator: a compiled model breaks in every layer"
        warnings.warn(f"flash_attention: {what}; a newer one is faster", stacklevel=2)
    return ""


def _try(backend: Backend, dtype: torch.dtype, head: int, device: torch.device) -> None:
    """Raises when the backend's answer or gradients, with and without a window, are not the reference's."""
    op = OPS["flash_attention"]

    def call(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None) -> Tensor:
        return backend.call(q, k, v, causal, window, q.size(3) ** -0.5)

    with probing.training(device):
        for case in op.probe(head):
            problem = probing.disagreement(op, call, op.inputs(case, dtype, str(device)), dtype)
            if problem:
                raise RuntimeError(f"{problem} (window {case['W']})")


@constant
def pick(dtype: torch.dtype, head: int, device: torch.device, mode: str) -> str:
    """The backend for such a call, or "" for ours and PyTorch. Raises Refused when `mode` names one that cannot."""
    for backend in BACKENDS.values():
        if mode in ("auto", backend.name):
            reason = obstacle(backend, dtype, head, device)
            if not reason:
                return backend.name
            if mode == backend.name:
                raise dispatch.Refused(
                    f"flash_attention: {mode} is asked for (NANOCHAT_KERNELS or use()), but {reason}"
                )
    return ""


def flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, scale: float | None) -> Tensor | None:
    """Attention by a FlashAttention package, or None where ours or PyTorch's is to run."""
    mode = dispatch.mode("flash_attention")
    if mode in ("torch", "triton") or (mode == "auto" and not q.is_cuda):
        return None
    name = pick(q.dtype, specialized(q.size(3)), q.device, mode)
    if not name:
        return None
    return BACKENDS[name].call(q, k, v, causal, window, q.size(3) ** -0.5 if scale is None else scale)


def describe() -> list[tuple[str, str]]:
    """(backend, "works" or why not) on this machine, for bfloat16 and heads of 128."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return [(b.name, obstacle(b, torch.bfloat16, 128, device) or "works") for b in BACKENDS.values()]
