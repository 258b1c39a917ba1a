"""What this machine is: device, dtype to compute in, ranks, peak speed, whether compiling works.

Everything that depends on the machine is decided here once, in `setup()`, and handed on as one `Hardware`.
"""

import itertools
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from kernels.dispatch import check_setting
from nanochat import drivers, host_memory, locks, toolchain
from nanochat.cards import PEAKS, Peak
from nanochat.errors import UserError
from nanochat.locks import Lock
from nanochat.processes import identity
from nanochat.world import meet, place

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def fastest(call: Callable[[], object], repeats: int = 10) -> float:
    """Seconds of the shortest of some runs."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)


def limits(machine: str, dtype: torch.dtype) -> tuple[float, float] | None:
    """(FLOP/s, bytes/s) of a card by its name, or of this CPU as measured now; None for a card that is not known, and
    for one in float32: data sheets' rates are of 16 bits.
    """
    if (peak := PEAKS.get(machine)) and dtype.itemsize == 2:
        return peak.bf16 * 1e12, peak.bandwidth * 1e12
    if has_gpu():
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
    peak: Peak | None = None  # the data sheet's, of a known card in a 16-bit dtype

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
    """Looks at the machine, joins the process group when a launcher started us, and picks the compute dtype.

    device_type: "cuda", "cpu", "mps", or "" for the best there is. Raises UserError for one that is not there or cannot
    be used, and rather than pass over a GPU of 8 GB or more in silence.
    """
    rank, local_rank, world = place()
    expands = set_allocator()
    device_type = pick(device_type, local_rank)
    try:
        check_setting()
    except ValueError as problem:  # NANOCHAT_KERNELS
        raise UserError(str(problem)) from None
    device = torch.device(f"cuda:{local_rank}" if device_type == "cuda" else device_type)
    if device_type == "cuda":
        torch.cuda.set_device(device)
        if expands:
            try_allocator(device, rank)
        torch.set_float32_matmul_precision("high")
    if device_type == "cpu":
        repeat_bitwise()
        host_memory.keep()
    if world > 1 and not dist.is_initialized():
        backend, own = ("nccl", device) if device_type == "cuda" else ("gloo", None)
        meet(backend, own, rank, world)
    name = device_name(device)
    dtype, reason = compute_dtype(device)
    peak = PEAKS.get(name) if dtype.itemsize == 2 else None
    return Hardware(device, name, dtype, reason, memory(device), rank, local_rank, world, peak)


def pick(asked: str, index: int) -> str:
    """ "cuda", "mps" or "cpu": what was asked for, or with "" the best that can be used. index: the rank's GPU."""
    if asked not in ("", "cuda", "cpu", "mps"):
        raise UserError(f"--device-type is {asked!r}, wanted cuda, cpu or mps")
    if asked == "mps" and not has_mps():
        raise UserError("--device-type is mps, but torch sees no Apple GPU here; leave it out to use what there is")
    if asked in ("cpu", "mps"):
        return asked
    if torch.cuda.is_available():
        if index >= torch.cuda.device_count():
            raise UserError(f"rank {index} wants a GPU of its own, and torch sees {torch.cuda.device_count()}")
        problem, large = drivers.unsupported(index)
        if not problem:
            return "cuda"
    elif not asked and has_mps():
        return "mps"
    else:
        problem, large = drivers.unusable()
    if asked:
        plain = "torch sees no CUDA device here; leave it out to use what there is"
        raise UserError(f"--device-type is cuda, but {problem or plain}")
    if large:
        raise UserError(problem)
    if problem and os.environ.get("RANK", "0") == "0":
        print(f"note: {problem}; going on with the CPU", flush=True)
    return "cpu"


ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
DXG = Path("/dev/dxg")  # Windows's GPU in its Linux, whatever the kernel's name


def set_allocator() -> bool:
    """Lets the caching allocator grow its segments, so that less memory is lost between them; before CUDA starts.

    Not where the user set it otherwise, nor on Windows or its Linux, where mapping memory fails, nor on AMD's cards,
    where copies have been seen to hang with it (pytorch/pytorch issue 192259). Returns whether it was set here.
    """
    linux = sys.platform == "linux" and "microsoft" not in os.uname().release.lower() and not DXG.exists()
    wanted = linux and not torch.version.hip and not any(name in os.environ for name in ALLOCATOR)
    if wanted:
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    return wanted


def try_allocator(device: torch.device, rank: int) -> None:
    """Allocates for the first time, and without such segments from then on where that fails: some virtual GPUs have no
    virtual memory management, and nothing else tells."""
    try:
        torch.empty(1, device=device)
    except RuntimeError as problem:
        why = str(problem).split("\n")[0]
        if isinstance(problem, NotImplementedError):  # the null device, which has no memory (profiling/compiled)
            return
        if "driver error" not in why:
            raise
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:False"  # for processes that this one starts
        torch._C._accelerator_setAllocatorSettings(os.environ["PYTORCH_ALLOC_CONF"])
        if rank == 0:
            print(f"note: this GPU cannot map memory ({why}): its memory is allocated in fixed segments", flush=True)


def repeat_bitwise() -> None:
    """Makes CPU training repeat to the bit, so that a resumed run ends like one that was never stopped.

    Otherwise compiled code adds embedding gradients from several threads in whatever order they come. It costs nothing
    measurable here; on GPUs it would.
    """
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def has_gpu() -> bool:
    """Whether torch sees a GPU that it has code for."""
    return torch.cuda.is_available() and not drivers.unsupported(0)[0]


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
    """Bytes of memory of the device (for CPU and MPS the machine's; 0 where that is not reported)."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def gpus_alike() -> int:
    """How many GPUs, counted from the first, are of its name and memory: a run uses only those."""
    seen = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    kinds = [(card.name, card.total_memory >> 30) for card in seen]
    return next((index for index, kind in enumerate(kinds) if kind != kinds[0]), len(kinds))


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
        if major >= 7:
            return torch.float16, f"compute capability {major}.{minor} has float16 matrix units and no bfloat16"
        return torch.float32, f"compute capability {major}.{minor} has no matrix units"
    if device.type == "cpu" and cpu_has_bf16():
        return torch.bfloat16, "the CPU has bfloat16 instructions"
    return torch.float32, "no fast bfloat16 here"


def cpu_has_bf16() -> bool:
    """True for CPUs with AVX-512 BF16 or AMX, where torch's bfloat16 products are 3 to 8 times faster than float32."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


def can_compile(device: torch.device) -> tuple[bool, str]:
    """Whether torch.compile works here, found out by compiling something tiny, and if not, why.

    On a CPU it needs a C++ compiler, on a GPU a C compiler and Python's headers; MPS is run eagerly.
    """
    if device.type == "mps":
        return False, "MPS runs eagerly"
    if os.environ.get("TORCH_COMPILE_DISABLE") == "1":
        return False, "TORCH_COMPILE_DISABLE=1"
    if device.type == "cuda" and (missing := toolchain.obstacle()):
        return False, missing
    heal_compile_cache(compile_cache())
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device))
    except Exception as error:  # any failure of the tool chain means the same: run eagerly
        if device.type == "cpu" and "compiler" in str(error).lower():
            return False, "no working C++ compiler was found (install g++ or clang to compile)"
        return False, f"torch.compile failed: {type(error).__name__}: {error}".strip().splitlines()[0][:140]
    return True, ""


# A process killed while the compiler writes a library leaves half of it in torch's cache, and torch would load that
# half for ever after. So whoever compiles keeps a locked marker there until its first step is done; the marker of a
# dead process means that no library written since then can be trusted.


def compile_cache() -> Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir())


def mark_compiling(cache: Path) -> Lock:
    """Notes that this process compiles; release it when everything is compiled."""
    cache.mkdir(parents=True, exist_ok=True)
    own = os.getpid()
    return locks.take(cache / f".compiling.{own}.{next(MARKERS)}", identity(own), wait=True)


MARKERS = itertools.count()


def heal_compile_cache(cache: Path) -> None:
    """Deletes the libraries written since a process that is dead now began to compile.

    But none written since a living one began: it may be its own. What that leaves is deleted by a later call.
    """
    dead, alive = {}, []
    for marker in cache.glob(".compiling.[0-9]*"):
        begun = _modified(marker)
        if begun is not None and _compiles(marker):
            alive.append(begun)
        elif begun is not None:
            dead[marker] = begun
    if not dead:
        return
    for library in cache.rglob("*.so"):
        written = _modified(library)
        if written is not None and min(dead.values()) <= written < min(alive, default=math.inf):
            library.unlink(missing_ok=True)
    for marker in dead if not alive else ():
        locks.remove_if_free(marker)


def _compiles(marker: Path) -> bool:
    """Whether the process that left a marker lives. Where nothing can be locked, it is known by its identity."""
    held = locks.held(marker)
    if held is not None:
        return held
    try:
        said = marker.read_text()
    except FileNotFoundError:
        return False
    return not said or identity(int(marker.name.split(".")[2])) == said  # empty: just being written


def _modified(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # another process removed it
        return None
