"""What the card says about itself while it works: clocks, power, temperature, and why it throttles.

`snapshot()` asks once; a `Sampler` asks again and again in a thread beside a measurement. A speed without its clock is
half a number: a card that runs at 1,400 instead of 1,980 MHz is not a slower kernel. NVIDIA's library is imported when
it is needed; where there is none, or no driver, or no card, the answer is one sentence and nothing breaks.
"""

import importlib
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

# NVML's bits for "why are the clocks not higher", by the names that nvidia-smi uses.
THROTTLE = {
    0x1: "idle",
    0x2: "applications clocks setting",
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
    0x100: "display clock setting",
    0x200: "board limit",
    0x400: "reliability",
}
PATIENCE = 10.0  # seconds: a driver whose card is gone may never answer, and the measurement is not to wait for it
NUMBERS = ("sm_clock_mhz", "memory_clock_mhz", "power_w", "temperature_c", "memory_used_bytes")


class Unavailable(Exception):
    """There is nothing to ask; the message is the sentence for the reader."""


def snapshot(index: int = 0) -> dict[str, Any]:
    """The sensors of GPU `index`, as torch counts them, now; {"unavailable": why} where they cannot be read.

    Keys: name, driver, power_limit_w, throttle (names) and those in NUMBERS. A sensor that the card lacks is None.
    """
    try:
        nvml, handle = _open(index)
        return _read(nvml, handle)
    except Unavailable as reason:
        return dict(unavailable=str(reason))


def throttle_reasons(mask: int) -> list[str]:
    """Names of the set bits; a bit that no name is known for is given in hex."""
    unknown = mask & ~sum(THROTTLE)
    return [name for bit, name in THROTTLE.items() if mask & bit] + ([f"unknown ({unknown:#x})"] if unknown else [])


def _open(index: int) -> tuple[Any, Any]:
    """(library, the card's handle). The library stays initialised until the process ends: that makes reading cheap."""
    unknown = "clocks and power are not known"
    try:
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit, nvml.nvmlDeviceGetHandleByIndex, nvml.NVMLError  # noqa: B018
    except ImportError:
        raise Unavailable(f"{unknown}: pip install nvidia-ml-py") from None
    except (Exception, SystemExit) as problem:  # some other module of that name, or a program
        said = f"the `pynvml` that Python finds is not NVIDIA's ({type(problem).__name__}: {problem})"
        raise Unavailable(f"{unknown}: {said}; pip install nvidia-ml-py") from None
    try:
        nvml.nvmlInit()
        if torch.cuda.is_available():  # torch's order and CUDA_VISIBLE_DEVICES are not NVML's
            return nvml, nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(index).uuid}")
        return nvml, nvml.nvmlDeviceGetHandleByIndex(index)
    except Exception as problem:  # NVML's own, or what a wrapper of another version makes of it
        raise Unavailable(f"{unknown}: NVML says {str(problem)!r} for GPU {index}") from None


def _read(nvml: Any, handle: Any) -> dict[str, Any]:
    def sensor(names: str, constant: str = "", of_card: bool = True, made: Callable[[Any], Any] = int) -> Any:
        """What the first of these functions says that the library has; None where none can be had.

        This card or user may lack the sensor, a version of the library the name, and the answer may be none that Python
        can decode (a name under WSL).
        """
        for name in names.split():
            try:
                arguments = [handle] * of_card + [getattr(nvml, constant)] * bool(constant)
                return made(getattr(nvml, name)(*arguments))
            except Exception as problem:
                if getattr(problem, "value", None) == getattr(nvml, "NVML_ERROR_GPU_IS_LOST", 15):
                    raise Unavailable("the GPU was lost while its sensors were read (see dmesg)") from None
        return None

    def thousandths(value: float) -> float:
        return value / 1000

    return dict(
        name=sensor("nvmlDeviceGetName", made=_text),
        driver=sensor("nvmlSystemGetDriverVersion", of_card=False, made=_text),
        sm_clock_mhz=sensor("nvmlDeviceGetClockInfo", "NVML_CLOCK_SM"),
        memory_clock_mhz=sensor("nvmlDeviceGetClockInfo", "NVML_CLOCK_MEM"),
        power_w=sensor("nvmlDeviceGetPowerUsage", made=thousandths),
        power_limit_w=sensor("nvmlDeviceGetEnforcedPowerLimit", made=thousandths),
        temperature_c=sensor("nvmlDeviceGetTemperature nvmlDeviceGetTemperatureV", "NVML_TEMPERATURE_GPU"),
        memory_used_bytes=sensor("nvmlDeviceGetMemoryInfo", made=lambda memory: int(memory.used)),
        throttle=sensor(
            "nvmlDeviceGetCurrentClocksEventReasons nvmlDeviceGetCurrentClocksThrottleReasons", made=throttle_reasons
        ),
    )


def _text(value: str | bytes) -> str:
    """What can be written to a file, whatever the driver's bytes and who has decoded them."""
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value).encode(errors="replace").decode()


class Sampler:
    """Within `with Sampler() as s:` a thread takes a snapshot every `interval` seconds into `s.rows`.

    A row is a snapshot and `t`, seconds since the start. Where nothing can be read there is one row, which says why;
    when the card is lost in mid-run, the last row does.
    """

    def __init__(self, index: int = 0, interval: float = 0.1):
        self.index, self.interval = index, interval
        self.rows: list[dict[str, Any]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True, name="nvml")

    def __enter__(self) -> "Sampler":
        self._started = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join(PATIENCE)

    def _work(self) -> None:
        while True:
            row = dict(t=time.perf_counter() - self._started, **snapshot(self.index))
            self.rows.append(row)
            if "unavailable" in row or self._stop.wait(self.interval):
                return

    def summary(self) -> dict[str, Any]:
        return summary(self.rows)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each number its median, min and max (None without a sensor); the union of the throttle reasons."""
    read = [row for row in rows if "unavailable" not in row]
    found: dict[str, Any] = dict(samples=len(read))
    found.update((key, row.get(key)) for row in read[:1] for key in ("name", "driver", "power_limit_w"))
    for key in NUMBERS if read else ():
        values = [row[key] for row in read if row.get(key) is not None]
        found[key] = dict(median=statistics.median(values), min=min(values), max=max(values)) if values else None
    if read:
        found["throttle"] = sorted({name for row in read for name in row.get("throttle") or ()})
    found.update((key, row[key]) for row in rows[-1:] for key in ("unavailable",) if key in row)
    return found
