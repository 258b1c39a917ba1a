"""What the computing null device does for CUDA's build in Python: operators, NCCL, the profiler, Inductor.

Operators that only CUDA has come with the conditions that CUDA sets. torch is not imported when this module is.
"""

import ctypes
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_kept: list[Any] = []  # a registration lasts as long as its library object


def _wanted(condition: bool, sentence: str) -> None:
    if not condition:
        raise RuntimeError(f"{sentence} (a condition of CUDA's, on the null device)")


def addmm_out_dtype(
    total: "Tensor", a: "Tensor", b: "Tensor", out_dtype: Any, *, beta: float = 1, alpha: float = 1, out: "Tensor"
) -> "Tensor":
    """addmm of 16-bit factors added to a float32 total."""
    import torch

    sixteen = a.dtype in (torch.float16, torch.bfloat16)
    _wanted(a.dtype == b.dtype, "addmm: both factors must have the same dtype")
    allowed = out_dtype == a.dtype or (sixteen and out_dtype == torch.float32)
    _wanted(allowed, "addmm: out_dtype must be the factors', or float32 where they have 16 bits")
    _wanted(out_dtype == out.dtype, "addmm: out must have out_dtype")
    _wanted(total.dtype in (out_dtype, a.dtype), "addmm: what is added to must have out_dtype, or the factors' dtype")
    return out.copy_(beta * total.float() + alpha * (a.float() @ b.float()))


def scaled_mm(
    a: "Tensor",
    b: "Tensor",
    scale_a: "Tensor",
    scale_b: "Tensor",
    bias: "Tensor | None" = None,
    scale_result: "Tensor | None" = None,
    out_dtype: Any = None,
    use_fast_accum: bool = False,
) -> "Tensor":
    """fp8 a (M, K) times fp8 b (K, N), with one scale a tensor, or one a row of a and a column of b."""
    import torch

    fp8 = (torch.float8_e4m3fn, torch.float8_e5m2)
    _wanted(torch.cuda.get_device_capability(a.device) >= (8, 9), "_scaled_mm needs compute capability 8.9")
    _wanted(a.dtype in fp8 and b.dtype in fp8, f"_scaled_mm: factors are {a.dtype} and {b.dtype}, wanted fp8")
    _wanted(a.dtype != fp8[1] or b.dtype != fp8[1], "_scaled_mm: two e5m2 factors are not supported")
    _wanted(a.stride(1) == 1 and b.stride(0) == 1, "_scaled_mm: a must be row-major and b column-major")
    _wanted(a.size(1) % 16 == 0 and b.size(1) % 16 == 0, f"_scaled_mm: {(*a.shape, b.size(1))}: K, N must be 16·n")
    whole = scale_a.numel() == scale_b.numel() == 1
    rows = scale_a.shape == (a.size(0), 1) and scale_b.shape == (1, b.size(1))
    _wanted(whole or rows, f"_scaled_mm: scales are {tuple(scale_a.shape)} and {tuple(scale_b.shape)}")
    _wanted(scale_a.dtype == scale_b.dtype == torch.float32, "_scaled_mm: scales must be float32")
    sums = (a.float() @ b.float()) * scale_a * scale_b
    return (sums if bias is None else sums + bias).to(out_dtype or a.dtype)


def register(torch: Any, library: ctypes.CDLL) -> None:
    """Real tensors on the device, once torch is imported; torch.compile stops at AOTAutograd's graphs."""
    library.null_compute()
    aten = torch.library.Library("aten", "IMPL")
    aten.impl("addmm.dtype_out", addmm_out_dtype, "CUDA")
    aten.impl("_scaled_mm", scaled_mm, "CUDA")
    _kept.append(aten)
    plain = torch.compile

    def without_inductor(
        model: Any = None,
        *,
        fullgraph: bool = False,
        dynamic: bool | None = None,
        backend: Any = "inductor",
        **_: Any,
    ) -> Any:
        backend = "aot_eager" if backend == "inductor" else backend
        return plain(model, fullgraph=fullgraph, dynamic=dynamic, backend=backend)

    torch.compile = without_inductor


def gloo_for_nccl(c10d: Any, library: ctypes.CDLL) -> None:
    """NCCL's place is taken by gloo, on the memory that the tensors have."""
    library.null_collectives()
    plain = c10d.init_process_group

    def init_process_group(backend: str | None = None, *args: Any, **more: Any) -> None:
        plain("cpu:gloo,cuda:gloo" if backend == "nccl" else backend, *args, **more)

    c10d.init_process_group = init_process_group


def profile_the_host(profiler: Any) -> None:
    """A trace has the host's half: asked for a GPU's events, the CPU wheel's profiler would wait for ever."""
    plain = profiler.profile.__init__

    def without_gpu(self: Any, *, activities: Any = None, **more: Any) -> None:
        plain(self, activities=[profiler.ProfilerActivity.CPU] if activities else None, **more)

    profiler.profile.__init__ = without_gpu


def interpret_in_one_thread(interpreter: Any) -> None:
    """Triton's interpreter changes triton.language while it runs a kernel: one thread at a time."""
    lock, plain = threading.RLock(), interpreter.GridExecutor.__call__

    def one_at_a_time(self: Any, *args: Any, **more: Any) -> Any:
        with lock:
            return plain(self, *args, **more)

    interpreter.GridExecutor.__call__ = one_at_a_time
