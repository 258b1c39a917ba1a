"""Stand-ins of GPUs: what torch.cuda says of cards that are not here, for code that decides and computes nothing."""

from types import SimpleNamespace

import torch

from nanochat import hardware

# By what they report: name, compute capability, GiB.
CARDS = {
    "H100": ("NVIDIA H100 80GB HBM3", (9, 0), 79.1),
    "H200": ("NVIDIA H200", (9, 0), 139.8),
    "L40S": ("NVIDIA L40S", (8, 9), 44.4),
    "A100-40": ("NVIDIA A100-SXM4-40GB", (8, 0), 39.5),
    "5090": ("NVIDIA GeForce RTX 5090", (12, 0), 31.4),
    "4090": ("NVIDIA GeForce RTX 4090", (8, 9), 23.5),
    "3090": ("NVIDIA GeForce RTX 3090", (8, 6), 23.7),
    "L4": ("NVIDIA L4", (8, 9), 22.0),
    "T4": ("Tesla T4", (7, 5), 14.6),
    "MI300X": ("AMD Instinct MI300X", (9, 4), 191.5),
    "V100": ("Tesla V100-SXM2-16GB", (7, 0), 15.8),
    "GTX 1050": ("NVIDIA GeForce GTX 1050", (6, 1), 1.9),
    "unknown": ("NVIDIA Z9000", (15, 0), 47.0),
}
CU130 = [
    "sm_75",
    "sm_80",
    "sm_86",
    "sm_90",
    "sm_100",
    "sm_120",
    "compute_120",
]  # what torch 2.13 for CUDA 13.0 is built for


def gpus(monkeypatch, *cards, archs=CU130):
    """torch sees these cards of CARDS, in this order. AMD's make it a build for ROCm."""
    seen = [CARDS[card] for card in cards]
    amd = seen[0][0].startswith("AMD")
    monkeypatch.setattr(torch.version, "cuda", None if amd else "13.0")
    monkeypatch.setattr(torch.version, "hip", "7.2.26015" if amd else None)

    def index(device=None):
        return 0 if device is None else device if isinstance(device, int) else torch.device(device).index or 0

    stubs = dict(
        is_available=lambda: True,
        device_count=lambda: len(seen),
        set_device=lambda device: None,
        synchronize=lambda device=None: None,
        get_device_name=lambda device=None: seen[index(device)][0],
        get_device_capability=lambda device=None: seen[index(device)][1],
        get_device_properties=lambda device=None: SimpleNamespace(
            name=seen[index(device)][0], total_memory=int(seen[index(device)][2] * 2**30)
        ),
        get_arch_list=lambda: ["gfx90a", "gfx942"] if amd else archs,
    )
    for name, stub in stubs.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    monkeypatch.setattr(hardware, "try_allocator", lambda device, rank: None)


def lost(monkeypatch):
    """A GPU on which a kernel has read what is not its own: every later call raises the same."""

    def call(*_):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, call)
