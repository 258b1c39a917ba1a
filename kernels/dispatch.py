"""Which implementation of an op runs: the only place that decides between Triton and the reference. A leaf.

The setting is NANOCHAT_KERNELS, or `use(...)` around a piece of code: `auto`, `torch` or `triton`, and exceptions by
op, as in "auto,cross_entropy=torch". `auto` takes Triton on a GPU where a tiny real launch of the op gave the right
answer and no measured table shows the compiled reference faster; everywhere else the reference, which `torch.compile`
then traces and fuses. `triton` means it: what cannot run is an error, never another implementation.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from kernels import tuned
from kernels.registry import OPS, tensors
from kernels.triton_utils import INSTALLED, INTERPRETED, capturing

MODES = ("auto", "torch", "triton")
FLASH = ("fa4", "fa3", "fa2")  # further modes of flash_attention: see attention/backends.py
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PROBED: dict[tuple[str, int], str] = {}  # (op, GPU) → "" when the probe passed, else why not


def parse(setting: str) -> dict[str, str]:
    """From "auto,rotary=torch" to {"*": "auto", "rotary": "torch"}. Raises ValueError for what it cannot read."""
    modes = {"*": "auto"}
    for part in setting.split(","):
        name, found, mode = part.strip().rpartition("=")
        known = mode in MODES or (name == "flash_attention" and mode in FLASH)
        if not known or (found and OPS and name not in OPS):
            raise ValueError(
                f"NANOCHAT_KERNELS: {part!r} in {setting!r} is not understood; wanted auto, torch, triton, or OP=MODE "
                f"with OP one of {', '.join(OPS)}; flash_attention also takes {', '.join(FLASH)}"
            )
        if found and mode == "triton" and name not in tuned.ops():
            raise ValueError(
                f"NANOCHAT_KERNELS: {name} has no Triton kernel; those that have are {', '.join(tuned.ops())}"
            )
        modes[name if found else "*"] = mode
    return modes


_modes = {"*": "auto"}
_misread = ""  # what is wrong with NANOCHAT_KERNELS: an error for the first call, not for the import


def read_environment() -> None:
    """Takes the setting from NANOCHAT_KERNELS; called once all ops are registered."""
    global _modes, _misread
    try:
        _modes = parse(os.environ.get("NANOCHAT_KERNELS") or "auto")
    except ValueError as problem:
        _misread = str(problem)


@contextmanager
def use(setting: str) -> Iterator[None]:
    """Within it, the setting is this one, e.g. use("torch") or use("auto,rms_norm=triton")."""
    global _modes
    before, _modes = _modes, parse(setting)
    try:
        yield
    finally:
        _modes = before


def mode(op: str) -> str:
    """The setting in force for an op. Raises ValueError when NANOCHAT_KERNELS cannot be understood."""
    if _misread:
        raise ValueError(_misread)
    return _modes.get(op, _modes["*"])


def triton_runs(op: str, x: Tensor, size: int, limit: int = 1 << 62) -> bool:
    """Whether `op` on x goes to Triton. `size` is what its tuned table is keyed by, at most `limit`.

    Raises ValueError when Triton is forced and cannot run this call.
    """
    wanted = mode(op)
    if wanted == "torch":
        return False
    if wanted == "triton":
        reason = _obstacle(x, size, limit)
        if reason:
            raise ValueError(f"{op}: Triton is asked for (NANOCHAT_KERNELS or use()), but {reason}")
        return True
    if not x.is_cuda or x.dtype not in DTYPES or size > limit:
        return False
    return probe(op, x.device.index or 0) == "" and not tuned.reference_is_faster(op, x.dtype, int(size), x.device)


def _obstacle(x: Tensor, size: int, limit: int) -> str:
    """Why a call cannot run in Triton here; "" when it can."""
    if not INSTALLED:
        return "Triton is not installed (pip install triton)"
    if x.dtype not in DTYPES:
        return f"its first argument is {x.dtype}, wanted float32, bfloat16 or float16"
    if size > limit:
        return f"a row has {size} elements, wanted at most {limit}"
    if x.is_cuda or (x.is_meta and capturing()):
        return ""
    if x.device.type != "cpu" or not INTERPRETED:
        return f"its first argument is on {x.device.type}, wanted cuda, or TRITON_INTERPRET=1 set before Python starts"
    return ""


@torch.compiler.assume_constant_result
def probe(op: str, index: int) -> str:
    """Runs an op's smallest case, forward and backward, in Triton on a GPU, once; "" if right, else what went wrong.

    A GPU's presence proves nothing: driver, compiler and card must fit together. A failure is warned about, once.
    """
    if (op, index) not in _PROBED:
        _PROBED[op, index] = reason = "" if INSTALLED else "Triton is not installed"
        if INSTALLED:
            try:
                _check(op, torch.device("cuda", index))
            except Exception as problem:  # whatever a driver or compiler throws
                reason = _PROBED[op, index] = f"{type(problem).__name__}: {problem}".split("\n")[0]
                warnings.warn(f"kernels: {op} runs on PyTorch, its Triton kernel failed here: {reason}", stacklevel=2)
    return _PROBED[op, index]


@contextmanager
def training(device: torch.device) -> Iterator[None]:
    """Gradients are recorded and nothing is cast within, whatever the caller's mode is: for a probe."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        yield


def _check(name: str, device: torch.device) -> None:
    """Raises when an op's smallest case in Triton differs from the reference's answer or gradients."""
    op = OPS[name]
    case = min(op.cases.values(), key=lambda case: op.bytes(case, torch.float32))
    dtype = torch.bfloat16 if torch.bfloat16 in op.tolerance else torch.float16
    answers = []
    for setting in ("triton", "torch"):
        with use(f"torch,{name}={setting}"), training(device):
            inputs = op.inputs(case, dtype, str(device))
            for key in op.differentiable:
                inputs[key].requires_grad_()
            result = op.fn(**inputs)
            outputs = tensors(result)
            if op.differentiable:
                learnt = [(output.float() ** 2).sum() for output in outputs if output.requires_grad]
                torch.stack(learnt).sum().backward()
            outputs += [inputs[key] for key in op.mutates] + [inputs[key].grad for key in op.differentiable]
            answers.append([output.detach().float() for output in outputs])
    torch.cuda.synchronize(device)
    for a, b in zip(*answers):
        error = ((a - b).norm() / b.norm().clamp_min(1e-6)).item()
        if not error < max(0.1, 2 * op.tolerance.get(dtype, 0.0)):
            raise RuntimeError(f"its answer is off by {error:.2g}")


def describe() -> list[tuple[str, str, str]]:
    """(op, implementation, why) on this machine, for a call in bfloat16 on its best device."""
    rows = []
    for op in OPS:
        wanted = mode(op)
        if wanted == "torch":
            rows.append((op, "torch", "asked for"))
        elif op not in tuned.ops():
            rows.append((op, "torch", "has no Triton kernel yet"))
        elif wanted == "triton":
            reason = _obstacle(torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu"), 0, 1)
            rows.append((op, "error" if reason else "triton", reason or "asked for"))
        elif not torch.cuda.is_available():
            rows.append((op, "torch", "no CUDA device" + ("" if INSTALLED else ", and Triton is not installed")))
        else:
            reason = probe(op, torch.cuda.current_device())
            rows.append((op, "torch" if reason else "triton", reason or "the probe launch gave the right answer"))
    return rows
