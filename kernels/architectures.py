"""The architectures that kernels are compiled for, as data: their limits, and what they cannot do. A leaf.

Tests compile every op for all of TARGETS and, by name (`--full`), of OTHER_TARGETS. On ROCm, where a compiler's crash
would end the process, our kernels run, are tuned and benchmarked on these only (`untried`).
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Target:
    """An architecture and the limits that decide how many blocks fit on a multiprocessor.

    On AMD cards that is a compute unit, and on RDNA two of them together (a work-group processor), as HIP counts them.
    """

    backend: str
    arch: int | str
    warp: int  # threads
    registers: int  # per multiprocessor, in four equal partitions
    warps: int
    blocks: int
    shared: int  # bytes
    block_shared: int  # bytes, of one block at most
    reserved: int = 0  # bytes of each block's shared memory that belong to the system
    shared_unit: int = 512  # bytes: shared memory is handed out in multiples of it
    register_unit: int = 8  # of a thread, likewise


def _cuda(arch: int, warps: int, blocks: int, kilobytes: int) -> Target:
    return Target(
        "cuda", arch, 32, 65536, warps, blocks, kilobytes << 10, (kilobytes - 1) << 10, reserved=1024, shared_unit=128
    )


def _cdna(arch: str, kilobytes: int, unit: int) -> Target:
    """Four SIMDs of 512 registers a lane; the limit of 16 workgroups of several waves is that of its 32 waves."""
    return Target("hip", arch, 64, 4 * 512 * 64, 32, 32, kilobytes << 10, kilobytes << 10, shared_unit=unit)


def _rdna(arch: str) -> Target:
    """Two compute units of two SIMDs, with 1,536 registers of 32 lanes and 16 waves each; LDS of two times 64 KB."""
    return Target("hip", arch, 32, 4 * 1536 * 32, 64, 64, 128 << 10, 64 << 10, register_unit=24)


# From the vendors' guides: CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability"; AMD
# CDNA3, CDNA4, RDNA3 and RDNA4 ISA, and LLVM's AMDGPU backend for the units in which AMD's registers are handed out.
TARGETS = {
    "sm_75": Target("cuda", 75, 32, 65536, 32, 16, 64 << 10, 64 << 10, shared_unit=256),  # T4, RTX 20
    "sm_80": _cuda(80, 64, 32, 164),  # A100
    "sm_90": _cuda(90, 64, 32, 228),  # H100
    "sm_100": _cuda(100, 64, 32, 228),  # B200
    "sm_120": _cuda(120, 48, 24, 100),  # RTX 50
    "gfx942": _cdna("gfx942", 64, 512),  # MI300
    "gfx1100": _rdna("gfx1100"),  # RX 7900
}
# Compiled for when asked for by name: what TARGETS says of their neighbours holds for them but for the limits.
OTHER_TARGETS = {
    "sm_86": _cuda(86, 48, 16, 100),  # RTX 30
    "sm_89": _cuda(89, 48, 24, 100),  # RTX 40, L40S
    "sm_121": _cuda(121, 48, 24, 100),  # DGX Spark
    "gfx950": _cdna("gfx950", 160, 1280),  # MI350
    "gfx1151": _rdna("gfx1151"),  # Ryzen AI Max
    "gfx1201": _rdna("gfx1201"),  # RX 9070
}
ALL_TARGETS = {**TARGETS, **OTHER_TARGETS}

# Whose rows of block sizes another one takes where it has none of its own: the same instructions; the blocks fit.
LIKE = {
    "sm_86": "sm_80",
    "sm_89": "sm_80",
    "sm_121": "sm_120",
    "gfx950": "gfx942",
    "gfx1151": "gfx1100",
    "gfx1201": "gfx1100",
}

_NO_MATRIX_UNITS = "Triton does not use its tensor cores, and products on the ordinary units spill kilobytes"
_FEW_REGISTERS = (
    "at D = 128, backward needs more than the 256 registers that a thread has: it spills, or its warps do the same work"
)
# (op, architecture) → why its kernels are not for it.
REFUSED = {
    **{
        (op, "sm_75"): _NO_MATRIX_UNITS
        for op in (
            "polar_express", "newton_schulz", "flash_attention", "flash_attention_decode", "linear_relu2", "mlp_relu2",
            "embedding",
        )
    },
    **{("flash_attention", arch): _FEW_REGISTERS for arch in ("gfx1100", "gfx1151", "gfx1201")},
}  # fmt: skip

# Cards on which fp8 ops run as PyTorch's emulation only, and why.
NO_FP8 = {
    "sm_75": "has no fp8 instructions",
    "sm_80": "has no fp8 instructions",
    "sm_86": "has no fp8 instructions",
    "gfx942": "has other fp8 formats (fnuz)",
    "gfx1100": "has no fp8 instructions",
    "gfx1151": "has no fp8 instructions",
}

NO_FLOAT16 = ("linear_relu2", "mlp_relu2", "fp8_linear", "fp8_mlp_relu2")  # they refuse it: see their files


def refused(op: str, arch: str, dtype: torch.dtype) -> str:
    """Why an op's kernels are not for this architecture and dtype; "" where they are, or nothing is known against."""
    if (op, arch) in REFUSED:
        return f"on {arch}, {REFUSED[op, arch]}"
    if op.startswith("fp8_") and arch in NO_FP8:
        return f"{arch} {NO_FP8[arch]}"
    if op in NO_FLOAT16 and dtype == torch.float16:
        return "float16 is refused: see its file"
    return ""


def untried(arch: str) -> str:
    """Why an AMD architecture is left to PyTorch: no test compiles for it; "" where one does, and on NVIDIA's."""
    if not arch.startswith("gfx") or arch in ALL_TARGETS:
        return ""
    tried = ", ".join(name for name in ALL_TARGETS if name.startswith("gfx"))
    return f"{arch} is none of the AMD architectures that tests compile for ({tried})"
