"""Cards as torch reports them, for the null device: what a driver says, the data sheet only where nobody said."""

from dataclasses import dataclass
from types import SimpleNamespace

GIB = 1 << 30
MIB = 1 << 20


@dataclass(frozen=True)
class NullCard:
    """What `torch.cuda.get_device_properties` says; memory as reported, not as sold. hip: "" for NVIDIA's cards."""

    name: str
    capability: tuple[int, int]
    memory: int  # bytes
    sms: int
    l2: int  # bytes
    shared: int  # bytes of shared memory that a block may ask for
    shared_sm: int  # bytes of shared memory of a multiprocessor
    threads_sm: int = 2048
    warp: int = 32
    bus: int = 384  # bits
    arch: str = ""  # gfx942, …: on ROCm only

    @property
    def target(self) -> str:
        """What kernels are compiled to: sm_90, gfx942."""
        return self.arch.split(":")[0] or f"sm_{self.capability[0]}{self.capability[1]}"

    def properties(self, index: int) -> SimpleNamespace:
        """torch's _CudaDeviceProperties of the card at this index."""
        return SimpleNamespace(
            name=self.name,
            major=self.capability[0],
            minor=self.capability[1],
            total_memory=self.memory,
            multi_processor_count=self.sms,
            warp_size=self.warp,
            max_threads_per_multi_processor=self.threads_sm,
            max_threads_per_block=1024,
            regs_per_multiprocessor=65536,
            shared_memory_per_block=48 << 10,
            shared_memory_per_block_optin=self.shared,
            shared_memory_per_multiprocessor=self.shared_sm,
            L2_cache_size=self.l2,
            gcnArchName=self.arch or self.name,
            uuid=f"00000000-0000-0000-0000-{index:012d}",
            clock_rate=1_500_000,
            memory_clock_rate=2_000_000,
            memory_bus_width=self.bus,
            is_integrated=0,
            is_multi_gpu_board=0,
            pci_bus_id=index + 1,
            pci_device_id=0,
            pci_domain_id=0,
        )


def _gib(value: float) -> int:
    return int(value * GIB)


KB = 1 << 10
CARDS = {
    card.name: card
    for card in (
        NullCard("NVIDIA H100 80GB HBM3", (9, 0), _gib(79.11), 132, 50 * MIB, 227 * KB, 228 * KB, bus=5120),
        NullCard("NVIDIA H200", (9, 0), _gib(139.81), 132, 60 * MIB, 227 * KB, 228 * KB, bus=6144),
        NullCard("NVIDIA B200", (10, 0), _gib(178.35), 148, 126 * MIB, 227 * KB, 228 * KB, bus=8192),
        NullCard("NVIDIA A100-SXM4-80GB", (8, 0), _gib(79.15), 108, 40 * MIB, 163 * KB, 164 * KB, bus=5120),
        NullCard("NVIDIA A100-SXM4-40GB", (8, 0), _gib(39.49), 108, 40 * MIB, 163 * KB, 164 * KB, bus=5120),
        NullCard("NVIDIA L40S", (8, 9), _gib(44.39), 142, 96 * MIB, 99 * KB, 100 * KB, 1536),
        NullCard("NVIDIA L4", (8, 9), _gib(22.03), 58, 48 * MIB, 99 * KB, 100 * KB, 1536, bus=192),
        NullCard("NVIDIA A10G", (8, 6), _gib(21.99), 80, 6 * MIB, 99 * KB, 100 * KB, 1536),
        NullCard("NVIDIA GeForce RTX 3090", (8, 6), _gib(23.69), 82, 6 * MIB, 99 * KB, 100 * KB, 1536),
        NullCard("NVIDIA GeForce RTX 4090", (8, 9), _gib(23.64), 128, 72 * MIB, 99 * KB, 100 * KB, 1536),
        NullCard("NVIDIA GeForce RTX 5090", (12, 0), _gib(31.36), 170, 96 * MIB, 99 * KB, 100 * KB, 1536, bus=512),
        NullCard("Tesla T4", (7, 5), _gib(14.56), 40, 4 * MIB, 64 * KB, 64 * KB, 1024, bus=256),
        NullCard("Tesla V100-SXM2-16GB", (7, 0), _gib(15.77), 80, 6 * MIB, 96 * KB, 96 * KB, bus=4096),
        NullCard(
            "AMD Instinct MI300X",
            (9, 4),
            _gib(191.98),
            304,
            4 * MIB,
            64 * KB,
            64 * KB,
            warp=64,
            bus=8192,
            arch="gfx942:sramecc+:xnack-",
        ),
        NullCard("NVIDIA Example 9000", (9, 0), _gib(47.5), 96, 64 * MIB, 227 * KB, 228 * KB),  # nobody knows it
    )
}
SHORT = {
    "h100": "NVIDIA H100 80GB HBM3",
    "h200": "NVIDIA H200",
    "b200": "NVIDIA B200",
    "a100": "NVIDIA A100-SXM4-80GB",
    "a100-40": "NVIDIA A100-SXM4-40GB",
    "l40s": "NVIDIA L40S",
    "l4": "NVIDIA L4",
    "a10g": "NVIDIA A10G",
    "3090": "NVIDIA GeForce RTX 3090",
    "4090": "NVIDIA GeForce RTX 4090",
    "5090": "NVIDIA GeForce RTX 5090",
    "t4": "Tesla T4",
    "v100": "Tesla V100-SXM2-16GB",
    "mi300x": "AMD Instinct MI300X",
    "unknown": "NVIDIA Example 9000",
}


def card(name: str) -> NullCard:
    """A card by its name or its short name. Raises ValueError for one that is not in the table."""
    full = SHORT.get(name.lower().removeprefix("rtx "), name)
    if full not in CARDS:
        raise ValueError(
            f"the null device has no card {name!r}; it has {', '.join(SHORT)}, or by full name one of these"
        )
    return CARDS[full]


@dataclass
class Machine:
    """What the null device is at the moment. library: where null_cuda.cpp's is, "" until it is looked for."""

    card: NullCard
    gpus: int = 1
    compute: bool = False
    library: str = ""

    @classmethod
    def of(cls, setting: str) -> "Machine":
        """From "card name;number of GPUs;hooks or compute;library"; what is left out is an H100, one, hooks."""
        name, gpus, mode, library = (setting or ";;;").split(";")
        return cls(card(name or "h100"), int(gpus or 1), mode == "compute", library)

    @property
    def setting(self) -> str:
        return f"{self.card.name};{self.gpus};{'compute' if self.compute else 'hooks'};{self.library}"
