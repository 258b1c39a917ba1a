"""A card's sensors through a fake of NVIDIA's library: all there, some missing, none, and a card that is lost."""

import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from profiling import nvml
from profiling.nvml import Sampler, snapshot, summary, throttle_reasons

NOT_SUPPORTED, GPU_IS_LOST, NO_DRIVER = 3, 15, 9


class NVMLError(Exception):
    def __init__(self, value, words="Not Supported"):
        super().__init__(words)
        self.value = value


class Card:
    """Stands in for the module pynvml; `broken` maps a function's name to the error code it ends with."""

    NVMLError = NVMLError
    NVML_ERROR_GPU_IS_LOST = GPU_IS_LOST
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(self, broken=None, mask=0):
        self.broken, self.mask, self.reads = broken or {}, mask, 0

    def __getattr__(self, name):
        def call(*arguments):
            if name in self.broken:
                raise NVMLError(self.broken[name], "Driver Not Loaded" if name == "nvmlInit" else "Not Supported")
            self.reads += name == "nvmlDeviceGetPowerUsage"
            return {
                "nvmlDeviceGetName": b"NVIDIA H100 80GB HBM3",  # bytes in old versions of the library
                "nvmlSystemGetDriverVersion": "570.1",
                "nvmlDeviceGetClockInfo": 1980 if arguments[1:] == (1,) else 2619,
                "nvmlDeviceGetPowerUsage": 350_000 + 1000 * self.reads,
                "nvmlDeviceGetEnforcedPowerLimit": 700_000,
                "nvmlDeviceGetTemperature": 41,
                "nvmlDeviceGetMemoryInfo": SimpleNamespace(used=5 << 30),
                "nvmlDeviceGetCurrentClocksThrottleReasons": self.mask,
            }.get(name)

        return call


@pytest.fixture
def plug(monkeypatch):
    """plug(card): makes it what `import pynvml` gives."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return lambda card: monkeypatch.setitem(sys.modules, "pynvml", card) or card


def test_all_sensors(plug):
    plug(Card(mask=0x4 | 0x40))
    assert snapshot() == dict(
        name="NVIDIA H100 80GB HBM3",
        driver="570.1",
        sm_clock_mhz=1980,
        memory_clock_mhz=2619,
        power_w=351.0,
        power_limit_w=700.0,
        temperature_c=41,
        memory_used_bytes=5 << 30,
        throttle=["software power cap", "hardware thermal slowdown"],
    )


def test_a_sensor_that_the_card_lacks_is_none_and_the_others_are_read(plug):
    names = ("nvmlDeviceGetPowerUsage", "nvmlDeviceGetMemoryInfo", "nvmlDeviceGetCurrentClocksThrottleReasons")
    plug(Card(dict.fromkeys(names, NOT_SUPPORTED)))
    row = snapshot()
    assert row["power_w"] is row["memory_used_bytes"] is row["throttle"] is None
    assert row["sm_clock_mhz"] == 1980 and "unavailable" not in row


def test_every_bit_has_its_name_and_an_unknown_one_is_not_lost():
    assert throttle_reasons(0) == []
    assert throttle_reasons(0x7FF) == list(nvml.THROTTLE.values())
    assert throttle_reasons(0x1008) == ["hardware slowdown", "unknown (0x1000)"]


def test_the_fake_is_like_the_real_library():
    import pynvml

    constants = [name for name in vars(Card) if name.startswith("NVML_")]
    assert {name: getattr(pynvml, name) for name in constants} == {name: getattr(Card, name) for name in constants}
    assert pynvml.nvmlClocksThrottleReasonSwPowerCap == 0x4 and nvml.THROTTLE[0x4] == "software power cap"
    assert pynvml.nvmlClocksThrottleReasonHwThermalSlowdown == 0x40
    called = set(re.findall(r"nvml\.(nvml\w+)", Path(nvml.__file__).read_text()))
    assert "nvmlDeviceGetHandleByUUID" in called and all(hasattr(pynvml, name) for name in called)


def test_no_library_and_no_driver_are_one_sentence(plug):
    plug(None)  # so that importing it fails
    assert snapshot() == dict(unavailable="clocks and power are not known: pip install nvidia-ml-py")
    plug(Card(dict(nvmlInit=NO_DRIVER)))
    assert "NVML says 'Driver Not Loaded' for GPU 0" in snapshot()["unavailable"]


def test_the_sampler_collects_and_sums_up(plug):
    plug(Card(mask=0x4))
    with Sampler(interval=0.001) as sampler:
        while len(sampler.rows) < 5:
            time.sleep(0.001)
    times = [row["t"] for row in sampler.rows]
    assert times == sorted(times) and len(times) >= 5
    said = sampler.summary()
    assert said["samples"] == len(times) and said["throttle"] == ["software power cap"]
    assert said["power_w"] == dict(median=351 + (len(times) - 1) / 2, min=351.0, max=350.0 + len(times))
    assert said["power_limit_w"] == 700.0


def test_a_card_that_is_lost_ends_the_sampling_and_what_was_read_before_stays(plug):
    card = plug(Card())
    with Sampler(interval=0.001) as sampler:
        while len(sampler.rows) < 3:
            time.sleep(0.001)
        card.broken["nvmlDeviceGetTemperature"] = GPU_IS_LOST
        sampler._thread.join(5)
        assert not sampler._thread.is_alive()
    said = sampler.summary()
    assert "the GPU was lost" in said["unavailable"]
    assert said["samples"] >= 3 and said["temperature_c"]["median"] == 41


def test_nothing_to_sample(plug):
    plug(None)
    with Sampler() as sampler:
        pass
    assert sampler.summary() == dict(samples=0, unavailable="clocks and power are not known: pip install nvidia-ml-py")
    assert summary([]) == dict(samples=0)
