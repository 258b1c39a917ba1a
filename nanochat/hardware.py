"""What this machine is: device, dtype to compute in, ranks, peak speed by exact device name, whether compiling works.

Everything that depends on the machine is decided here once, in `setup()`, and handed on as one `Hardware`.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from kernels.dispatch import check_setting
from nanochat.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Peak:
    """Dense matrix rate in bfloat16 and fp8 (TFLOP/s; None where there is no fp8) and memory bandwidth (TB/s)."""

    bf16: float
    fp8: float | None
    bandwidth: float


# By the exact name the driver reports; an unknown card has an unknown peak. From the vendors' data sheets, without
# sparsity: A100 (Jan 2021), H100 (2023), H200 (2024), DGX B200 (2024), L40S (2023), Ada and Blackwell GeForce white
# papers (bf16 with float32 accumulation), GA102 white paper, CDNA 3 white paper.
PEAKS = {
    "NVIDIA A100-SXM4-40GB": Peak(312, None, 1.555),
    "NVIDIA A100-PCIE-40GB": Peak(312, None, 1.555),
    "NVIDIA A100-SXM4-80GB": Peak(312, None, 2.039),
    "NVIDIA A100 80GB PCIe": Peak(312, None, 1.935),
    "NVIDIA H100 80GB HBM3": Peak(989, 1979, 3.35),
    "NVIDIA H100 PCIe": Peak(756, 1513, 2.0),
    "NVIDIA H200": Peak(989, 1979, 4.8),
    "NVIDIA B200": Peak(2250, 4500, 8.0),
    "NVIDIA L40S": Peak(362, 733, 0.864),
    "NVIDIA GeForce RTX 3090": Peak(71, None, 0.936),
    "NVIDIA GeForce RTX 4070": Peak(58, 117, 0.504),
    "NVIDIA GeForce RTX 4090": Peak(165, 330, 1.008),
    "NVIDIA GeForce RTX 5090": Peak(209, 419, 1.792),
    "AMD Instinct MI300X": Peak(1307, 2615, 5.3),
}


def fastest(call: Callable[[], object], repeats: int = 10) -> float:
    """Seconds of the shortest of some runs."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)


def limits(machine: str, dtype: torch.dtype) -> tuple[float, float] | None:
    """(FLOP/s, bytes/s) of a card by its name, or of this CPU as measured now; None for a card that is not known."""
    if peak := PEAKS.get(machine):
        return peak.bf16 * 1e12, peak.bandwidth * 1e12
    if torch.cuda.is_available():
        return None
    a = torch.randn(1024, 1024, dtype=dtype)
    source, copy = torch.zeros(2, 1 << 27, dtype=torch.int8)
    return 2 * 1024**3 / fastest(lambda: a @ a), 2 * source.numel() / fastest(lambda: copy.copy_(source))


@dataclass(frozen=True)
class Hardware:
    """The machine as the training and inference code sees it."""

    device: torch.device
    name: str
    dtype: torch.dtype
    dtype_reason: str
    memory: int  # bytes: of one GPU, or the machine's
    rank: int = 0
    local_rank: int = 0
    world: int = 1
    peak: Peak | None = field(default=None)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def barrier(self) -> None:
        """Waits until all ranks are here."""
        if self.world > 1:
            dist.barrier()

    def peak_memory(self) -> int:
        """Most bytes in use so far: allocated on the GPU, or the process's resident set."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        try:
            import resource
        except ImportError:  # Windows
            return 0
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if os.uname().sysname == "Darwin" else peak * 1024


def setup(device_type: str = "") -> Hardware:
    """Looks at the machine, joins the process group when torchrun started us, and picks the compute dtype.

    device_type: "cuda", "cpu", "mps", or "" for the best there is. Raises UserError for one that is not there.
    """
    device_type = device_type or ("cuda" if torch.cuda.is_available() else "mps" if has_mps() else "cpu")
    if device_type not in ("cuda", "cpu", "mps"):
        raise UserError(f"--device-type is {device_type!r}, wanted cuda, cpu or mps")
    if device_type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device-type is cuda, but torch sees no CUDA device here; leave it out to use what there is")
    if device_type == "mps" and not has_mps():
        raise UserError("--device-type is mps, but torch sees no Apple GPU here; leave it out to use what there is")
    try:
        check_setting()
    except ValueError as problem:  # NANOCHAT_KERNELS
        raise UserError(str(problem)) from None
    rank, local_rank, world = (int(os.environ.get(k, d)) for k, d in RANK_VARIABLES)
    device = torch.device(f"cuda:{local_rank}" if device_type == "cuda" else device_type)
    if device_type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if device_type == "cpu":
        repeat_bitwise()
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device_type == "cuda" else "gloo")
    name = device_name(device)
    dtype, reason = compute_dtype(device)
    return Hardware(device, name, dtype, reason, memory(device), rank, local_rank, world, PEAKS.get(name))


def repeat_bitwise() -> None:
    """Makes CPU training repeat to the bit, so that a resumed run ends like one that was never stopped.

    Otherwise compiled code adds embedding gradients from several threads in whatever order they come. It costs nothing
    measurable here; on GPUs it would.
    """
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


RANK_VARIABLES = (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"))


def has_mps() -> bool:
    return torch.backends.mps.is_available()


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return "Apple GPU"
    try:
        with open("/proc/cpuinfo") as f:
            names = [line.split(":", 1)[1].strip() for line in f if line.startswith("model name")]
        return f"{names[0]}, {torch.get_num_threads()} threads"
    except (OSError, IndexError):
        import platform

        return platform.processor() or platform.machine()


def memory(device: torch.device) -> int:
    """Bytes of memory of the device (for CPU and MPS the machine's; 0 where that is not told)."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def compute_dtype(device: torch.device) -> tuple[torch.dtype, str]:
    """(dtype of the activations, why). NANOCHAT_DTYPE=float32|bfloat16|float16 overrides."""
    asked = os.environ.get("NANOCHAT_DTYPE")
    if asked:
        if asked not in DTYPES:
            raise UserError(f"NANOCHAT_DTYPE is {asked!r}, wanted one of {', '.join(DTYPES)}")
        return DTYPES[asked], "NANOCHAT_DTYPE"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major >= 8 or torch.version.hip:
            return torch.bfloat16, "the GPU has bfloat16 matrix units"
        return (
            torch.float32,
            f"compute capability {major}.{minor} has no bfloat16 (NANOCHAT_DTYPE=float16 may be faster)",
        )
    if device.type == "cpu" and cpu_has_bf16():
        return torch.bfloat16, "the CPU has bfloat16 instructions"
    return torch.float32, "no fast bfloat16 here"


def cpu_has_bf16() -> bool:
    """True for CPUs with AVX-512 BF16 or AMX, where torch's bfloat16 products are 3 to 8 times faster than float32."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


def can_compile(device: torch.device) -> tuple[bool, str]:
    """Whether torch.compile works here, found out by compiling something tiny, and if not, why.

    On a CPU it needs a C++ compiler; MPS is run eagerly.
    """
    if device.type == "mps":
        return False, "MPS runs eagerly"
    if os.environ.get("TORCH_COMPILE_DISABLE") == "1":
        return False, "TORCH_COMPILE_DISABLE=1"
    heal_compile_cache(compile_cache())
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device))
    except Exception as error:  # any failure of the tool chain means the same: run eagerly
        if device.type == "cpu" and "compiler" in str(error).lower():
            return False, "no working C++ compiler was found (install g++ or clang to compile)"
        return False, f"torch.compile failed: {type(error).__name__}: {error}".strip().splitlines()[0][:140]
    return True, ""


# A process killed while the compiler writes a library leaves half of it in torch's cache, and torch would load that
# half for ever after. So whoever compiles leaves a marker until its first step is done; a marker of a dead process
# means that no library written since then can be trusted.


def compile_cache() -> Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir())


def mark_compiling(cache: Path) -> Path:
    """Notes that this process compiles; remove the file when everything is compiled."""
    cache.mkdir(parents=True, exist_ok=True)
    marker = cache / f".compiling.{os.getpid()}"
    marker.touch()
    return marker


def heal_compile_cache(cache: Path) -> None:
    """Deletes the libraries written since a process that is dead now began to compile."""
    for marker in cache.glob(".compiling.*"):
        try:
            os.kill(int(marker.suffix[1:]), 0)
        except ProcessLookupError:
            begun = marker.stat().st_mtime
            for library in cache.rglob("*.so"):
                if library.stat().st_mtime >= begun:
                    library.unlink(missing_ok=True)
            marker.unlink(missing_ok=True)
        except OSError:  # alive, and somebody else's
            continue
