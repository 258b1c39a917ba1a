"""Kernels as machine code for cards that are not here: ahead-of-time compilation, and reading what came out.

`launches(op, case, dtype)` runs an op, forward and backward, on meta tensors (shapes without memory) and records what
it would have launched: kernel, types, constants, block sizes. `build` compiles one such launch for a target as the
launcher would have at run time (pointers 16-byte aligned, integers divisible by 16 marked so, ones folded), and reads
the SASS or the AMD assembly: registers, spills, how wide memory is accessed, tensor-core and float64 instructions. No
driver, no card.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels import tuned
from kernels.dispatch import use
from kernels.registry import OPS, Case, Op, tensors
from kernels.triton_utils import INTERPRETED, Launch, capture, triton


@dataclass(frozen=True)
class Target:
    """An architecture and the limits that decide how many warps fit on a multiprocessor (AMD: a compute unit)."""

    backend: str
    arch: int | str
    warp: int  # threads
    registers: int  # per multiprocessor
    warps: int
    shared: int  # bytes


# From the vendors' tuning guides: CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability";
# AMD CDNA3 ISA. On gfx942 four SIMDs share a compute unit, 512 registers of 64 lanes each.
TARGETS = {
    "sm_80": Target("cuda", 80, 32, 65536, 64, 164 << 10),  # A100
    "sm_90": Target("cuda", 90, 32, 65536, 64, 228 << 10),  # H100
    "sm_100": Target("cuda", 100, 32, 65536, 64, 228 << 10),  # B200
    "sm_120": Target("cuda", 120, 32, 65536, 48, 100 << 10),  # RTX 50
    "gfx942": Target("hip", "gfx942", 64, 4 * 512 * 64, 32, 64 << 10),  # MI300
}

# (kernel, target) → up to how many spilled bytes are accepted, and why.
ACCEPTED_SPILLS: dict[tuple[str, str], tuple[int, str]] = {
    ("_rms_norm_bwd_kernel", "sm_80"): (8, "at C = 768, ptxas stops at 64 registers so that half the warps fit"),
    ("_rms_norm_bwd_kernel", "sm_120"): (16, "with Triton 3.7.1 (not 3.9.0), ptxas stops at 48 registers"),
}

# Cards on which fp8 ops run as PyTorch's emulation only, and why.
NO_FP8 = {"sm_80": "has no fp8 instructions", "gfx942": "has other fp8 formats (fnuz)"}

NO_FLOAT16 = ("linear_relu2", "mlp_relu2", "fp8_linear", "fp8_mlp_relu2")  # they refuse it: see their files

POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64", torch.int32: "*i32",
    torch.float64: "*fp64", torch.float8_e4m3fn: "*fp8e4nv", torch.float8_e5m2: "*fp8e5", torch.bool: "*i1",
}  # fmt: skip


def launches(op: Op, case: Case, dtype: torch.dtype, target: str = "") -> list[Launch]:
    """What a call of the op and its backward launch in Triton on a target, each distinct launch once."""
    with capture() as recorded, tuned.assume(target), use(f"torch,{op.name}=triton"), torch.enable_grad():
        inputs = op.inputs(case, dtype, "meta")
        for name in op.differentiable:
            inputs[name].requires_grad_()
        result = op.fn(**inputs)
        if op.differentiable:
            torch.stack([output.float().sum() for output in tensors(result) if output.requires_grad]).sum().backward()
    return list({repr(source(launch)): launch for launch in recorded}.values())


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
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(i,)] = value
            continue
        if isinstance(value, Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            aligned = value.storage_offset() * value.itemsize % 16 == 0
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            aligned = value % 16 == 0
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
    machine = TARGETS[target]
    options = {key: value for key, value in launch.constants.items() if key not in launch.kernel.arg_names}
    made = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(made, target=GPUTarget(machine.backend, machine.arch, machine.warp), options=options)


def build(op: str, shape: str, launch: Launch, target: str) -> dict[str, Any]:
    """One row of the report: what became of a launch on a target. `error` says why where it did not compile."""
    name = launch.kernel.fn.__name__
    row: dict[str, Any] = dict(op=op, kernel=name, target=target, shape=shape)
    empty = dict.fromkeys(
        ("registers", "spill_bytes", "shared_bytes", "occupancy", "access_bytes", "load_bytes", "float64_instructions"),
        None,
    )
    try:
        made = compiled(launch, target)
        read = read_cuda if TARGETS[target].backend == "cuda" else read_amd
        figures = read(made)
        most, why = ACCEPTED_SPILLS.get((name, target), (0, ""))
        reason = why if 0 < figures["spill_bytes"] <= most else ""
        machine, warps = TARGETS[target], made.metadata.num_warps
        figures["occupancy"] = occupancy(machine, figures["registers"], made.metadata.shared, warps)
        return {**row, **figures, "spill_reason": reason, "dot_rows": dot_rows(made.asm["ttir"]), "error": ""}
    except Exception as problem:  # whatever the compiler throws: the report says it
        lines = [line.strip() for line in str(problem).split("\n") if line.strip()] or [""]
        text = f"{type(problem).__name__}: {lines[-1]}"  # Triton quotes the source first and says what is wrong last
        return {**row, **empty, "tensor_core": "", "tf32": False, "spill_reason": "", "dot_rows": 0, "error": text}


def occupancy(target: Target, registers: int, shared: int, warps: int) -> float:
    """Warps resident on a multiprocessor, of the most it can hold, as registers and shared memory allow."""
    of_warp = -(-registers * target.warp // 256) * 256  # registers are given out in units of 256
    blocks = min(target.registers // max(of_warp * warps, 1), target.warps // warps)
    if shared:
        own = 1024 if target.backend == "cuda" else 0  # what the system takes for each block
        blocks = min(blocks, target.shared // (shared + own))
    return blocks * warps / target.warps


def dot_rows(ttir: str) -> int:
    """Rows of the smallest product among a kernel's dots (a warp group's instruction takes 64); 0 without any."""
    return min((int(rows) for rows in re.findall(r"tt\.dot .*-> tensor<(\d+)x", ttir)), default=0)


def tool(name: str) -> str:
    """Path of a CUDA binary tool out of Triton's wheel."""
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def sass(cubin: bytes) -> tuple[str, str]:
    """(disassembly, resource usage) of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = lambda *words: subprocess.run(words, capture_output=True, text=True, check=True).stdout
        return run(tool("nvdisasm"), "-c", file.name), run(tool("cuobjdump"), "--dump-resource-usage", file.name)


WIDTHS = {"128": 16, "256": 32, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


def read_cuda(made: Any) -> dict[str, Any]:
    """Figures of a compiled CUDA kernel."""
    text, usage = sass(made.asm["cubin"])
    resources = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    moved: dict[str, Counter[int]] = dict(load=Counter(), store=Counter())
    for word, modifiers in re.findall(r"\b(LDGSTS|LDG|STG)\b((?:\.\w+)*)", text):
        width = next((WIDTHS[part] for part in modifiers.split(".") if part in WIDTHS), 4)
        moved["store" if word == "STG" else "load"][width] += width
    units = re.findall(r"\b(HGMMA|HMMA|UTCHMMA|UTCQMMA|QGMMA|QMMA)\b", text)
    return dict(
        registers=resources["REG"],
        spill_bytes=resources["STACK"] + resources.get("LOCAL", 0),
        shared_bytes=made.metadata.shared,
        access_bytes=usual_width(moved),
        load_bytes=moved["load"].total(),  # by one thread, as written: a loop counts once
        tensor_core=units[0] if units else "",
        tf32=".TF32" in text,
        float64_instructions=len(re.findall(r"\bD(?:ADD|MUL|FMA|SETP|MMA)\b|\.F64\b|\bMUFU\.\w*64\w*", text)),
    )


AMD_WIDTHS = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "b128": 16, "b64": 8, "b32": 4}


def read_amd(made: Any) -> dict[str, Any]:
    """Figures of a compiled AMD kernel, from its assembly text."""
    text = made.asm["amdgcn"]
    number = lambda key: int(m[1]) if (m := re.search(rf"\.{key}:\s+(\d+)", text)) else 0
    moved: dict[str, Counter[int]] = dict(load=Counter(), store=Counter())
    for way, kind in re.findall(r"\b(?:global|buffer)_(load|store)_(\w+)", text):
        width = next((w for part, w in AMD_WIDTHS.items() if kind.startswith(part)), 2 if "short" in kind else 1)
        moved[way][width] += width
    units = re.findall(r"\bv_(mfma_\w+)", text)
    return dict(
        registers=number("vgpr_count"),
        spill_bytes=4 * (number("vgpr_spill_count") + number("sgpr_spill_count"))
        or number("private_segment_fixed_size"),
        shared_bytes=made.metadata.shared,
        access_bytes=usual_width(moved),
        load_bytes=moved["load"].total(),  # by one thread, as written: a loop counts once
        tensor_core="MFMA" if units else "",
        tf32=any("xf32" in unit for unit in units),
        float64_instructions=len(re.findall(r"\bv_\w+_f64\b", text)),
    )


def usual_width(moved: dict[str, Counter[int]]) -> int:
    """Bytes of the access through which most data flows, loads or stores, whichever is narrower.

    Fewer than four narrow accesses of a width are no stream but scalars, or a sum per row: a tile that is accessed in
    narrow pieces takes many.
    """
    streams = [{w: total for w, total in count.items() if w >= 16 or total >= 4 * w} for count in moved.values()]
    return min((max(stream, key=lambda width: stream[width]) for stream in streams if stream), default=0)


# Kernels whose speed is that of memory: they must touch it in pieces of 16 bytes.
STREAMING = re.compile(r"norm|rotary|cross_entropy|adamw|momentum|scale_rows|squares|step|amax|quantize")


def faults(row: dict[str, Any], dtype: torch.dtype) -> list[str]:
    """What is wrong with a row of the report; empty when all promises are kept."""
    if row["error"]:
        return [row["error"]]
    found = []
    if row["spill_bytes"] and not row["spill_reason"]:
        found.append(f"spills {row['spill_bytes']} bytes")
    if row["float64_instructions"]:
        found.append(f"{row['float64_instructions']} float64 instructions")
    if STREAMING.search(row["kernel"]) and row["access_bytes"] < 16:
        found.append(f"memory is accessed {row['access_bytes']} bytes at a time")
    if row["dot_rows"] and dtype != torch.float32:
        wanted = {"gfx942": "MFMA", "sm_90": "HGMMA" if row["dot_rows"] >= 64 else "HMMA"}.get(row["target"], "MMA")
        if wanted not in row["tensor_core"]:
            found.append(f"tensor cores: {row['tensor_core'] or 'none'}, wanted {wanted}")
    if row["tf32"]:
        found.append("multiplies in TF32 where IEEE was promised")
    return found


def report(ops: list[str], targets: list[str], shape: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Rows for every launch of these ops at the named case (or an op's largest), on these targets."""
    rows = []
    for name in ops:
        op = OPS[name]
        case = shape if shape in op.cases else max(op.cases, key=lambda c: op.bytes(op.cases[c], dtype))
        for target in targets:
            if (name.startswith("fp8_") and target in NO_FP8) or (dtype == torch.float16 and name in NO_FLOAT16):
                continue
            rows += [build(name, case, launch, target) for launch in launches(op, op.cases[case], dtype, target)]
    for row in rows:
        row["faults"] = faults(row, dtype)
    return rows
