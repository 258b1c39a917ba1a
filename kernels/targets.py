"""Kernels as machine code for cards that are not here: ahead-of-time compilation, and reading what came out.

`launches(op, case, dtype)` runs an op, forward and backward, on meta tensors (shapes without memory) and records what
it would have launched: kernel, types, constants, block sizes. `build` compiles one such launch for a target as the
launcher would have at run time (pointers 16-byte aligned, integers divisible by 16 marked so, ones folded), and reads
the machine code (machine_code.py): registers, spills, how wide memory is accessed, instructions by class; `occupancy`
says how many of its warps fit on a multiprocessor; `faults` what breaks a promise. No driver, no card. A whole report
is child_compile.py's, the architectures and their limits are architectures.py's.
"""

import math
import re
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from . import tuned
from .architectures import ALL_TARGETS, Target, refused
from .dispatch import use
from .machine_code import disassemble, read_amd, read_cuda
from .registry import Case, Op, tensors
from .triton_utils import INTERPRETED, Launch, capture, triton

# (kernel, target) → up to how many spilled bytes are accepted, and why.
ACCEPTED_SPILLS: dict[tuple[str, str], tuple[int, str]] = {
    ("_rms_norm_bwd_kernel", "sm_80"): (8, "at C = 768, ptxas stops at 64 registers so that half the warps fit"),
    ("_rms_norm_bwd_kernel", "sm_120"): (16, "with Triton 3.7.1 (not 3.9.0), ptxas stops at 48 registers"),
    ("_embedding_bwd_kernel", "gfx1100"): (64, "with Triton 3.7.1 (not 3.9.0); smaller tiles read more"),
}

POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64", torch.int32: "*i32",
    torch.float64: "*fp64", torch.float8_e4m3fn: "*fp8e4nv", torch.float8_e5m2: "*fp8e5", torch.bool: "*i1",
}  # fmt: skip


def launches(op: Op, case: Case, dtype: torch.dtype, target: str = "") -> list[Launch]:
    """What a call of the op and its backward launch in Triton on a target, each distinct launch once."""
    forward, backward = all_launches(op, case, dtype, target)
    return list({repr(source(launch)): launch for launch in forward + backward}.values())


def all_launches(op: Op, case: Case, dtype: torch.dtype, target: str = "") -> tuple[list[Launch], list[Launch]]:
    """(forward, backward): every launch in order."""
    with capture() as recorded, tuned.assume(target), use(f"torch,{op.name}=triton"), torch.enable_grad():
        inputs = op.inputs(case, dtype, "meta")
        for name in op.differentiable:
            inputs[name].requires_grad_()
        result = op.fn(**inputs)
        forward = len(recorded)
        if op.differentiable:
            torch.stack([output.float().sum() for output in tensors(result) if output.requires_grad]).sum().backward()
    return recorded[:forward], recorded[forward:]


def source(launch: Launch) -> tuple[str, dict[str, str], dict[tuple[int, ...], Any], dict[tuple[int, ...], Any]]:
    """(kernel's name, signature, constants by argument index, attributes): what the compiler needs to know."""
    names = launch.kernel.arg_names
    values = dict(zip(names, launch.args))
    values.update({key: value for key, value in launch.constants.items() if key in names})
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for i, parameter in enumerate(launch.kernel.params):
        value = values[parameter.name]
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(i,)] = value
            continue
        if isinstance(value, Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            aligned = value.storage_offset() * value.itemsize % 16 == 0
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            aligned = special and value % 16 == 0
        else:
            signature[parameter.name], aligned = "fp32", False
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return launch.kernel.fn.__name__, signature, constants, attributes


def compiled(launch: Launch, target: str) -> Any:
    """Triton's compiled kernel for a target's name. Raises RuntimeError in a process that interprets."""
    if INTERPRETED:
        raise RuntimeError("kernels.targets: TRITON_INTERPRET is set; nothing can be compiled in this process")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    _, signature, constants, attributes = source(launch)
    machine = ALL_TARGETS[target]
    made = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(made, target=GPUTarget(machine.backend, machine.arch, machine.warp), options=options(launch))


def options(launch: Launch) -> dict[str, Any]:
    """The compiler's: warps, stages."""
    return {key: value for key, value in launch.constants.items() if key not in launch.kernel.arg_names}


UNREAD = dict.fromkeys(
    ("registers", "stack_bytes", "spill_bytes", "shared_bytes", "occupancy", "warps", "access_bytes", "load_bytes",
     "float64_instructions")
) | dict(tensor_core="", tf32=False, mix={}, looped=False, spill_reason="", dot_rows=0)  # fmt: skip


_READ: dict[str, dict[str, Any]] = {}  # by all that a compiled kernel follows from: ops and cases share many


def build(op: str, shape: str, launch: Launch, target: str) -> dict[str, Any]:
    """One row of the report: what became of a launch on a target. `error` says why where it did not compile."""
    name = launch.kernel.fn.__name__
    row: dict[str, Any] = dict(op=op, kernel=name, target=target, shape=shape)
    try:
        form = repr((launch.kernel.cache_key, source(launch), sorted(options(launch).items()), target))
        if form not in _READ:
            _READ[form] = resources(name, compiled(launch, target), target)
        return {**row, **_READ[form]}
    except Exception as problem:  # whatever the compiler throws: the report says it
        return {**row, **UNREAD, "error": last_line(problem)}


def disassemble_ahead(launches: Iterable[Launch], target: str) -> None:
    """Those that `build` will be asked for on a target, together, in a fraction of the time."""
    if ALL_TARGETS[target].backend != "cuda":
        return
    cubins = []
    for launch in launches:
        with suppress(Exception):  # build says why it does not compile
            cubins.append(compiled(launch, target).asm["cubin"])
    if cubins:
        disassemble(cubins)


def resources(name: str, made: Any, target: str) -> dict[str, Any]:
    """What a compiled kernel of this name takes on a target, read from its machine code; keys of UNREAD and `error`."""
    machine, warps, shared = ALL_TARGETS[target], made.metadata.num_warps, made.metadata.shared
    found = (read_cuda if machine.backend == "cuda" else read_amd)(made)
    most, why = ACCEPTED_SPILLS.get((name, target), (0, ""))
    found["spill_reason"] = why if 0 < found["spill_bytes"] <= most else ""
    found["shared_bytes"], found["warps"] = shared, warps
    found["occupancy"] = occupancy(machine, found["registers"], shared, warps)
    return {**found, "dot_rows": dot_rows(made.asm["ttir"]), "error": ""}


def last_line(problem: Exception) -> str:
    """What a compiler's error says: Triton quotes the source first and says what is wrong last."""
    lines = [line.strip() for line in str(problem).split("\n") if line.strip()] or [""]
    return f"{type(problem).__name__}: {lines[-1]}"


def occupancy(target: Target, registers: int, shared: int, warps: int) -> float:
    """Warps resident on a multiprocessor, of the most it can hold; registers of a thread, shared bytes and warps of a
    block."""
    return resident_blocks(target, registers, shared, warps) * warps / target.warps


def resident_blocks(target: Target, registers: int, shared: int, warps: int) -> int:
    """Blocks that a multiprocessor holds at a time; 0: not even one can run."""
    # Registers are handed out a warp at a time, from one of four partitions.
    unit = target.register_unit * target.warp
    of_warp = max(math.ceil(registers * target.warp / unit), 1) * unit
    fit = target.registers // 4 // of_warp * 4 // warps
    found = min(fit, target.warps // warps, target.blocks)
    # A CUDA launch is checked as if a block's warps took as much of every partition, and no thread has more than 256.
    if target.backend == "cuda" and (registers > 256 or of_warp * math.ceil(warps / 4) * 4 > target.registers):
        return 0
    if shared > target.block_shared or warps > 1024 // target.warp:
        return 0
    taken = math.ceil((shared + target.reserved) / target.shared_unit) * target.shared_unit
    return min(found, target.shared // taken) if taken else found


def dot_rows(ttir: str) -> int:
    """Rows of the smallest product among a kernel's dots (a warp group's instruction takes 64); 0 without any."""
    return min((int(rows) for rows in re.findall(r"tt\.dot .*-> tensor<(\d+)x", ttir)), default=0)


# Kernels whose speed is that of memory: they must access it 16 bytes at a time.
STREAMING = re.compile(r"norm|rotary|cross_entropy|adamw|momentum|scale_rows|squares|step|amax|quantize")


def faults(row: dict[str, Any], dtype: torch.dtype) -> list[str]:
    """What is wrong with a row of the report; empty when all promises are kept."""
    if row["error"]:
        return [row["error"]]
    found = []
    machine = ALL_TARGETS[row["target"]]
    if row["shared_bytes"] > machine.block_shared:
        found.append(f"needs {row['shared_bytes']:,} bytes of shared memory, a block has {machine.block_shared:,}")
    elif not row["occupancy"]:
        found.append(f"no block of {row['warps']} warps with {row['registers']} registers a thread fits")
    if row["spill_bytes"] and not row["spill_reason"]:
        found.append(f"spills {row['spill_bytes']} bytes")
    if row["float64_instructions"]:
        found.append(f"{row['float64_instructions']} float64 instructions")
    if STREAMING.search(row["kernel"]) and row["access_bytes"] < 16:
        found.append(f"memory is accessed {row['access_bytes']} bytes at a time")
    if row["dot_rows"] and dtype != torch.float32:
        wanted = matrix_unit(row["target"], row["dot_rows"])
        if wanted not in row["tensor_core"]:
            found.append(f"tensor cores: {row['tensor_core'] or 'none'}, wanted {wanted}")
    if row["tf32"]:
        found.append("multiplies in TF32 where IEEE was promised")
    return found


def matrix_unit(target: str, rows: int) -> str:
    """What the name of a target's matrix instruction has in it, for products of so many rows."""
    machine = ALL_TARGETS[target]
    if machine.backend == "hip":
        return "MFMA" if machine.warp == 64 else "WMMA"
    return {"sm_90": "HGMMA" if rows >= 64 else "HMMA"}.get(target, "MMA")


def case_of(op: Op, shape: str, dtype: torch.dtype) -> str:
    """The case of this name, or the op's largest where it has none."""
    return shape if shape in op.cases else max(op.cases, key=lambda case: op.bytes(op.cases[case], dtype))


def runs_on(name: str, target: str, dtype: torch.dtype) -> bool:
    """Whether an op's kernels are for this target and dtype."""
    return not refused(name, target, dtype)
