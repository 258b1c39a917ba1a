"""Which implementation of an op runs: the only place that decides between Triton and the reference. A leaf.

The setting is NANOCHAT_KERNELS, or `use(...)` around a block of code: `auto`, `torch` or `triton`, and exceptions by
op, as in "auto,cross_entropy=torch". `auto` takes Triton on a GPU where small real launches of the op, in the dtype and
size at hand, gave the right answer (probing.py) and it pays: as measured on such a card, else, in compiled code, by the
counts of the compiled step (tuned.verdict). Everywhere else the reference, which `torch.compile` then traces and fuses.
`triton` means it: what cannot run is an error, never another implementation.
"""

import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import probing, tuned
from .architectures import refused
from .constant import constant
from .registry import OPS, Case
from .triton_utils import INSTALLED, INTERPRETED, capturing, specialized

MODES = ("auto", "torch", "triton")
# Further modes of single ops: see attention/backends.py, inductor_template.py.
FURTHER = {"flash_attention": ("fa4", "fa3", "fa2"), "mlp_relu2": ("inductor",)}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEAST = (8, 0)  # compute capability; below it our kernels run where a measurement says that they pay
# (op, dtype, size, GPU, whether torch.compile traces) → why `auto` leaves such calls to PyTorch, "" where Triton runs
_DECIDED: dict[tuple[str, torch.dtype, int, int, bool], str] = {}
_TRIED: dict[tuple[str, torch.dtype, int, int], str] = {}  # the same of what a machine can run
FULL = "OutOfMemoryError"  # a reason that begins so is asked for again
PROBING = threading.RLock()  # one probe at a time, whichever thread's


class Refused(ValueError):
    """A setting, NANOCHAT_KERNELS or use(), asks for what cannot run this call here."""


class Lost(BaseException):
    """A kernel has failed so that this process can use its GPU no more. No `except Exception` is to go on from it."""


def parse(setting: str) -> dict[str, str]:
    """From "auto,rotary=torch" to {"*": "auto", "rotary": "torch"}. Raises ValueError for what it cannot read."""
    modes = {"*": "auto"}
    for part in setting.split(","):
        name, found, mode = part.strip().rpartition("=")
        known = mode in MODES or mode in FURTHER.get(name, ())
        if not known or (found and OPS and name not in OPS):
            raise ValueError(
                f"NANOCHAT_KERNELS: {part!r} in {setting!r} is not understood; wanted auto, torch, triton, or OP=MODE "
                f"with OP one of {', '.join(OPS)}; "
                + "; ".join(f"{op} also takes {', '.join(more)}" for op, more in FURTHER.items())
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


def is_default() -> bool:
    """Whether nothing was asked for: neither by NANOCHAT_KERNELS nor by use()."""
    return _modes == {"*": "auto"}


def mode(op: str) -> str:
    """The setting in force for an op. Raises ValueError when NANOCHAT_KERNELS cannot be understood."""
    if _misread:
        raise ValueError(_misread)
    return _modes.get(op, _modes["*"])


def check_setting() -> None:
    """Raises ValueError when NANOCHAT_KERNELS cannot be understood. Launches nothing and touches no GPU."""
    mode("*")


def triton_runs(op: str, x: Tensor, size: int, limit: int = 1 << 62) -> bool:
    """Whether `op` on x goes to Triton. `size` is what its tuned table is keyed by, at most `limit`.

    Raises Refused when Triton is forced and cannot run this call.
    """
    wanted = mode(op)
    if wanted == "torch":
        return False
    if wanted == "triton":
        reason = _obstacle(x, size, limit)
        if reason:
            raise Refused(f"{op}: Triton is asked for (NANOCHAT_KERNELS or use()), but {reason}")
        return True
    if not x.is_cuda or x.dtype not in DTYPES or size > limit:
        return False
    compiled = torch.compiler.is_compiling()
    return refusal(op, x.dtype, specialized(size), x.device.index or 0, compiled) == ""


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


@constant
def refusal(op: str, dtype: torch.dtype, size: int, index: int, compiled: bool = False) -> str:
    """Why `auto` leaves calls of this dtype and size on a GPU to PyTorch; "" where Triton runs them. Found out once.

    compiled: of calls in code that torch.compile traces.
    """
    key = op, dtype, size, index, compiled
    if key not in _DECIDED:
        with PROBING:
            if key not in _DECIDED:
                pays, rule = tuned.verdict(op, dtype, size, torch.device("cuda", index), compiled)
                reason = _tried(*key[:-1]) if pays else rule
                if reason.startswith(FULL):  # of the moment, not of the kernel
                    return reason
                _DECIDED[key] = reason
    return _DECIDED[key]


def _tried(*key: Any) -> str:
    """Why an op's kernels do not run on a GPU, found out once; "" where they do."""
    if key not in _TRIED:
        reason = unfit(*key) or probe(*key)
        if reason.startswith(FULL):
            return reason
        _TRIED[key] = reason
    return _TRIED[key]


def obstacle(op: str, dtype: torch.dtype, case: Case, index: int) -> str:
    """Why an op that `auto` leaves until it is measured cannot be tried on a GPU; "" where its kernels are right."""
    with PROBING:
        return unfit(op, dtype, OPS[op].size(case), index) or probe(op, dtype, OPS[op].size(case), index)


def unfit(op: str, dtype: torch.dtype, size: int, index: int) -> str:
    """Why `auto` does not try an op's kernels on this machine, or ""."""
    if not INSTALLED:
        return "Triton is not installed (pip install triton)"
    if why := uncompilable(op, dtype, size, index):
        return why
    found = torch.cuda.get_device_capability(index)
    if not torch.version.hip and found < LEAST and not tuned.measured(op, dtype, size, torch.device("cuda", index)):
        return f"compute capability {found[0]}.{found[1]}: our kernels are for 8.0 and newer, or where measured"
    return ""


def uncompilable(op: str, dtype: torch.dtype, size: int, index: int) -> str:
    """Why an op's kernels cannot, or must not, be compiled in this process for a GPU of this machine, or ""."""
    if why := OPS[op].refuses(dtype):
        return why
    arch = tuned.architecture(index)
    if torch.version.hip:  # where the compiler may end the process that calls it
        from .child_compile import compiles_in_child  # imports the ops, which import this

        return compiles_in_child(op, OPS[op].size(OPS[op].probe(size)[0]), dtype, arch)
    return refused(op, arch, dtype)


def probe(op: str, dtype: torch.dtype, size: int, index: int) -> str:
    """Runs small cases of an op, forward and backward, in Triton on a GPU; "" if right, else what went wrong.

    A GPU's presence proves nothing: driver, compiler and card must fit together, and a configuration may ask for more
    registers or shared memory than the card has. A failure is warned about. Raises Lost where it leaves no GPU.
    """
    try:
        with_memory(lambda: probing.check(op, dtype, size, torch.device("cuda", index)))
    except Exception as problem:  # whatever a driver or compiler throws
        reason = f"{type(problem).__name__}: {problem}".split("\n")[0]
        what = f"{op} ({str(dtype)[6:]}, size {size})"
        check_alive(what, without(op), index)
        warnings.warn(f"kernels: {what} runs on PyTorch, its Triton kernel failed here: {reason}", stacklevel=2)
        return reason
    return ""


def check_alive(what: str, remedy: str, index: int | None = None) -> None:
    """Raises Lost where a GPU is of no more use after `what` has failed there; nothing where there is none.

    After an illegal memory access, say, every later call in this process raises the same again.
    """
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize(index)
    except RuntimeError as problem:
        error = str(problem).split("\n")[0]
        if "captur" not in error:  # what must not be called while a graph is captured says nothing
            raise Lost(f"{what}: {error}; this process can use its GPU no more: start again with {remedy}") from None


def without(*ops: str) -> str:
    """The setting that leaves ops to PyTorch, in words for the user."""
    setting = os.environ.get("NANOCHAT_KERNELS") or "auto"
    return "NANOCHAT_KERNELS=" + ",".join([setting, *(f"{op}=torch" for op in ops)])


def with_memory(call: Callable[[], None]) -> None:
    """Calls it, and once more with the caching allocator emptied where the card's memory is full."""
    try:
        call()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        call()


def forget() -> None:
    """What `auto` decided is found out again: after a table has changed."""
    _DECIDED.clear()
    _TRIED.clear()


def describe() -> list[tuple[str, str, str]]:
    """(op, implementation, why) on this machine, for a call at the sizes of d24 on its best device.

    In bfloat16, or in float16 on a GPU that has no bfloat16, in compiled code: `why` says which rule decided. Probes
    what was not probed yet.
    """
    cuda = torch.cuda.is_available()
    rows = []
    for name, op in OPS.items():
        wanted = mode(name)
        if wanted == "torch":
            rows.append((name, "torch", "asked for"))
        elif wanted == "inductor":
            rows.append((name, wanted if cuda else "error", "asked for" if cuda else "asked for: wanted a CUDA device"))
        elif op.triton is None:
            rows.append((name, "torch", "has no Triton kernel yet"))
        elif wanted == "triton":
            reason = _obstacle(torch.empty(0, device="cuda" if cuda else "cpu"), 0, 1)
            rows.append((name, "error" if reason else "triton", reason or "asked for"))
        elif not cuda:
            rows.append((name, "torch", "no CUDA device" + ("" if INSTALLED else ", and Triton is not installed")))
        else:
            index = torch.cuda.current_device()
            new = torch.version.hip or torch.cuda.get_device_capability(index) >= LEAST
            size = op.size(op.cases.get("d24") or max(op.cases.values(), key=lambda c: op.bytes(c, torch.bfloat16)))
            dtype = torch.bfloat16 if new else torch.float16
            reason = refusal(name, dtype, size, index, compiled=True)
            _, rule = tuned.verdict(name, dtype, size, torch.device("cuda", index), compiled=True)
            if reason == rule and not refusal(name, dtype, size, index):
                reason += "; uncompiled calls run Triton"
            why = reason or f"{rule}; the probe launches gave the right answers"
            rows.append((name, "torch" if reason else "triton", why))
    return rows
