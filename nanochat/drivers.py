"""What the drivers of this machine see, asked where torch cannot use a GPU, and which build of torch would.

An old driver, a torch for CPUs or a card that the build left out makes torch.cuda.is_available() False or the first
kernel fail; training would then run on the CPU beside idle GPUs. `unusable` and `unsupported` say so in one sentence.
NVIDIA's cards are asked for through nvidia-smi, or /proc where there is none; AMD's through the kernel's KFD tree.
"""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from nanochat.cards import PEAKS

LARGE = 7.5 * 2**30  # bytes: an "8 GB" card, less what its driver keeps
ANSWER_SECONDS = 10.0  # for nvidia-smi; with a driver in trouble it may hang


@dataclass(frozen=True)
class Card:
    name: str
    memory: int | None  # bytes; None where it is not reported
    capability: tuple[int, int] | None = None  # of NVIDIA's

    @property
    def large(self) -> bool:
        """Whether it is worth training on: 8 GB or more. Without its memory, a card that cards.py knows is."""
        return self.name in PEAKS if self.memory is None else self.memory >= LARGE


@dataclass(frozen=True)
class Seen:
    """What one vendor's driver says. `remark`: what stands in the way beside the build of torch."""

    vendor: str
    driver: str  # version, "" where it is not reported
    cards: tuple[Card, ...]
    remark: str = ""

    @property
    def large(self) -> bool:
        return any(card.large for card in self.cards)


@dataclass(frozen=True)
class Build:
    """A build of torch on PyTorch's wheel index: its folder there, the least driver, and the capabilities it covers."""

    tag: str
    driver: int
    lowest: tuple[int, int]
    highest: tuple[int, int]


# By torch's version. Which builds there are and for what: "Release Compatibility Matrix" and "CUDA Support Matrix" in
# PyTorch's RELEASE.md, as it was for each (pytorch/pytorch 175253: 2.11; 182849: 2.12; 2.13 has those of 2.12): 12.6
# ends with Hopper, 12.8 and 13.x begin with Turing. Of 13.0 and 13.2, which want the same driver, the first.
# Least drivers: "Minor Version Compatibility" in NVIDIA's CUDA Compatibility guide.
DRIVERS = {13: 580, 12: 525, 11: 450}  # CUDA's major version: the driver's
CU130, CU128 = Build("cu130", DRIVERS[13], (7, 5), (99, 9)), Build("cu128", DRIVERS[12], (7, 5), (12, 9))
CU126 = Build("cu126", DRIVERS[12], (5, 0), (9, 0))
BUILDS = {"2.11": (CU130, CU128, CU126), "2.12": (CU130, CU126), "2.13": (CU130, CU126)}
ROCM_BUILDS = {"2.12": "rocm7.2", "2.13": "rocm7.2"}
INDEX = "https://download.pytorch.org/whl/"
INSIST = (
    "insist on the CPU with --device-type cpu (speedrun.sh and scripts.plan: --device cpu; benchmarks: --profile smoke)"
)


def unusable(root: Path = Path("/")) -> tuple[str, bool]:
    """(why torch cannot use the cards that a driver sees, whether one of them is large); ("", False) without a driver.

    Cards that an environment variable hides are not seen.
    """
    found = [seen for seen in (nvidia(root), amd(root)) if seen]
    found.sort(key=lambda seen: (not seen.large, not seen.cards))
    return (_sentence(found[0]), found[0].large) if found else ("", False)


def unsupported(index: int) -> tuple[str, bool]:
    """(why this build of torch has no code for the GPU it sees, whether that is large); ("", False) where it has."""
    archs = torch.cuda.get_arch_list()
    if torch.version.hip or not archs or runs_on(torch.cuda.get_device_capability(index), archs):
        return "", False
    memory = torch.cuda.get_device_properties(index).total_memory
    card = Card(torch.cuda.get_device_name(index), memory, torch.cuda.get_device_capability(index))
    driver = (nvidia() or Seen("NVIDIA", "", ())).driver
    return _sentence(Seen("NVIDIA", driver, (card,)), archs), card.large


def runs_on(capability: tuple[int, int], archs: list[str]) -> bool:
    """Whether code built for these architectures, such as sm_80, sm_90a or compute_120, runs on a card.

    A binary runs on later minor versions of its major one, PTX (compute_…) on everything later; with an "a" behind it,
    both on that version only. A name that cannot be read is taken to run.
    """
    for arch in archs:
        named = re.fullmatch(r"(sm|compute)_(\d+)([af]?)", arch)
        if not named:
            return True
        kind, number, suffix = named.groups()
        built = divmod(int(number), 10)
        if suffix == "a":
            fits = capability == built
        else:
            fits = capability >= built and (kind == "compute" and not suffix or capability[0] == built[0])
        if fits:
            return True
    return False


def nvidia(root: Path = Path("/")) -> Seen | None:
    """NVIDIA's cards as nvidia-smi lists them, or /proc/driver/nvidia; None where there is neither."""
    if _hidden("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES"):
        return None
    smi = shutil.which("nvidia-smi") or shutil.which(root / "usr/lib/wsl/lib/nvidia-smi")  # WSL's may not be on PATH
    remark = ""
    for more in (",compute_cap,mig.mode.current", "") if smi else ():  # old ones do not know these two
        said = _ask([smi, f"--query-gpu=name,memory.total,driver_version{more}", "--format=csv,noheader,nounits"])
        rows = [[word.strip() for word in line.split(",")] for line in said.splitlines()]
        rows = [row for row in rows if len(row) == (5 if more else 3) and re.match(r"\d+\.", row[2])]
        if rows:
            if all(row[4:] == ["Enabled"] for row in rows):
                remark = "MIG mode is on without an instance: make one (nvidia-smi mig -cgi … -C), or switch it off"
            return Seen("NVIDIA", rows[0][2], tuple(_card(*row) for row in rows), remark)
        if not said.strip():
            remark = "nvidia-smi does not answer"
            break
        mismatch = " (a reboot loads the new driver)" if "version mismatch" in said else ""
        remark = f"nvidia-smi says {said.strip().splitlines()[0]!r}{mismatch}"
    proc = root / "proc/driver/nvidia"
    names = [re.search(r"^Model:\s*(.+)$", text, re.M) for text in _texts(proc / "gpus", "*/information")]
    version = re.search(r"Kernel Module(?: for \S+)?\s+(\d[\d.]*)", "".join(_texts(proc, "version")))
    if not names and not remark:
        return None
    if names and not remark and not any((root / "dev").glob("nvidia[0-9]*")):
        remark = "this process has no /dev/nvidia0 (a container is started with --gpus all)"
    cards = tuple(Card(name[1].strip() if name else "an NVIDIA card", None) for name in names)
    return Seen("NVIDIA", version[1] if version else "", cards, remark)


def _card(name: str, memory: str, driver: str, capability: str = "", mig: str = "") -> Card:
    known = re.fullmatch(r"(\d+)\.(\d+)", capability)
    size = int(memory) << 20 if memory.isdigit() else None
    return Card(name, size, (int(known[1]), int(known[2])) if known else None)


def amd(root: Path = Path("/")) -> Seen | None:
    """AMD's cards by KFD, the kernel's interface that ROCm uses; None without one. Names are those of architectures."""
    if _hidden("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"):
        return None
    cards = []
    for node in sorted((root / "sys/class/kfd/kfd/topology/nodes").glob("*")):
        facts = dict(re.findall(r"^(\w+) (\d+)$", "".join(_texts(node, "properties")), re.M))
        if not int(facts.get("simd_count", 0)):
            continue  # a CPU
        version = int(facts.get("gfx_target_version", 0))
        banks = [dict(re.findall(r"^(\w+) (\d+)$", text, re.M)) for text in _texts(node / "mem_banks", "*/properties")]
        memory = sum(int(bank.get("size_in_bytes", 0)) for bank in banks if bank.get("heap_type") in ("1", "2"))  # VRAM
        cards.append(Card(f"AMD gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}", memory))
    kfd, remark = root / "dev/kfd", ""
    if cards and not os.access(kfd, os.R_OK | os.W_OK):
        remark = "this user may not open /dev/kfd: join the groups render and video"
        if not kfd.exists():
            remark = "this process has no /dev/kfd (a container is started with --device=/dev/kfd --device=/dev/dri)"
    driver = "".join(_texts(root / "sys/module/amdgpu", "version")).strip()
    return Seen("AMD", driver, tuple(cards), remark) if cards else None


def _hidden(*names: str) -> bool:
    """Whether one of these variables hides all cards. What is no index and no id ends the list, so "-1" hides all."""
    values = [os.environ[name].split(",")[0].strip() for name in names if name in os.environ]
    return any(not re.fullmatch(r"\d+|all|(GPU|MIG)-.*", value) for value in values)


def _texts(folder: Path, pattern: str) -> list[str]:
    try:
        return [path.read_text(errors="replace") for path in sorted(folder.glob(pattern))]
    except OSError:
        return []


def _ask(command: list[str | None]) -> str:
    """What a command prints, both streams; "" when it does not answer or cannot be started."""
    try:
        process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    except OSError:
        return ""
    try:
        return process.communicate(timeout=ANSWER_SECONDS)[0]
    except subprocess.TimeoutExpired:
        process.kill()  # and not waited for: one that the driver holds does not end
        return ""


def _sentence(seen: Seen, archs: list[str] | None = None) -> str:
    """What was found, why torch cannot use it, and what to do. archs: what torch has code for, where that is why."""
    if not seen.cards:
        return f"no {seen.vendor} card is seen: {seen.remark}"
    card = max(seen.cards, key=lambda card: card.memory or 0)
    count = f"{len(seen.cards)} x " if len(seen.cards) > 1 else ""
    driver = f" (driver {seen.driver})" if seen.driver else ""
    reason, steps = _amd_build() if seen.vendor == "AMD" else _nvidia_build(seen, card, archs)
    why = "; ".join(filter(None, (reason, seen.remark))) or _torch_says()
    what = ", or ".join([*(steps or ["Mend that"]), *[INSIST] * seen.large])
    return f"torch {torch.__version__} cannot use the {count}{card.name}{driver} of this machine: {why}. {what}"


def _amd_build() -> tuple[str, list[str]]:
    """(what is wrong with this build of torch for AMD's cards, what to do); ("", []) when nothing is."""
    if torch.version.hip:
        return "", []
    return f"it is built for {_built()}", [_install(ROCM_BUILDS.get(_minor()), "ROCm")]


def _nvidia_build(seen: Seen, card: Card, archs: list[str] | None) -> tuple[str, list[str]]:
    """(what is wrong with this build of torch for this driver and card, what to do); ("", []) when nothing is."""
    driver = int(seen.driver.split(".")[0]) if seen.driver else 0  # 0: not reported
    cuda = int(torch.version.cuda.split(".")[0]) if torch.version.cuda else 0
    if archs:
        reason = f"it is built for {_built()} with code for {', '.join(archs)}, and the card is sm_{_digits(card)}"
    elif not cuda:
        reason = f"it is built for {_built()}"
    elif 0 < driver < DRIVERS.get(cuda, 0):
        reason = f"it is built for {_built()}, which wants driver {DRIVERS[cuda]} or newer"
    else:
        return "", []
    if _minor() not in BUILDS:
        runs = max((major for major, least in DRIVERS.items() if driver >= least), default=0)
        what = f"CUDA {runs} or older, which this driver runs" if runs and not archs else "this driver and card"
        old = cuda and not archs  # the driver, not the build
        return reason, [_install(None, what), *([f"update the driver to {DRIVERS[cuda]} or newer"] if old else [])]
    builds = [b for b in BUILDS[_minor()] if card.capability is None or b.lowest <= card.capability <= b.highest]
    if not builds:
        return reason, [f"No build of torch {_minor()} has code for that card: take another one"]
    fitting = next((build for build in builds if driver >= build.driver or not driver), None)
    newer = f"update the driver to {builds[0].driver} or newer"
    enough = not archs and DRIVERS.get(cuda) == builds[0].driver  # the build that is here wants no more
    if fitting:
        also = [newer] if enough and fitting is not builds[0] else []
        return reason, [_install(fitting.tag, "this driver and card"), *also]
    return reason, [newer.capitalize() + ("" if enough else f" and install the build for it: {_pip(builds[0].tag)}")]


def _minor() -> str:
    return ".".join(torch.__version__.split(".")[:2])


def _built() -> str:
    if torch.version.hip:
        return f"ROCm {torch.version.hip.split('-')[0]}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs only"


def _digits(card: Card) -> str:
    return "".join(map(str, card.capability or ()))


def _install(tag: str | None, what: str) -> str:
    if tag is None:
        return f"Install a build of torch for {what} (pytorch.org, Get Started, has the commands, of older ones too)"
    return f"Install the build for {what}: {_pip(tag)}"


def _pip(tag: str) -> str:
    """The command; with the build in the version, or pip would be content with the build that is there."""
    python = Path(sys.executable)
    here = python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python
    return f"{here} -m pip install torch=={torch.__version__.split('+')[0]}+{tag} --index-url {INDEX}{tag}"


def _torch_says() -> str:
    try:
        torch.cuda.init()
    except Exception as problem:  # whatever the driver throws; an AssertionError from a build without CUDA
        words = " ".join(str(problem).split())
        hint = " (is nvidia-fabricmanager running?)" if "Error 802" in words else ""
        return f"it says {words[:200]!r}{hint}"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return f"it sees no device with CUDA_VISIBLE_DEVICES={visible}" if visible else "it sees no device"
