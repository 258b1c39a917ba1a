"""A card's sensors through a fake of NVIDIA's library: all there, some missing, none, and a card that is lost."""

import re
import sys
import threading
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
                "nvmlDeviceGetTemperatureV": 41,
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
    called = set(re.findall(r"\b(nvml[A-Z]\w+)", Path(nvml.__file__).read_text()))
    assert "nvmlDeviceGetHandleByUUID" in called and all(hasattr(pynvml, name) for name in called)


def test_no_library_and_no_driver_are_one_sentence(plug):
    plug(None)  # so that importing it fails
    assert snapshot() == dict(unavailable="clocks and power are not known: pip install nvidia-ml-py")
    plug(Card(dict(nvmlInit=NO_DRIVER)))
    assert "NVML says 'Driver Not Loaded' for GPU 0" in snapshot()["unavailable"]


class Undecodable(Card):
    """WSL2: the name's bytes are no UTF-8, which the library's own decorator finds out."""

    def __getattr__(self, name):
        if name == "nvmlDeviceGetName":
            return lambda handle: b"\xff\xfeRTX".decode()
        return super().__getattr__(name)


class Renamed(Card):
    """A library of another year: what it has no name for is an AttributeError."""

    def __init__(self, *gone):
        super().__init__()
        self.gone = gone

    def __getattr__(self, name):
        if name in ("gone", *self.__dict__.get("gone", ())):
            raise AttributeError(f"module 'pynvml' has no attribute {name!r}")
        if name == "nvmlDeviceGetCurrentClocksEventReasons":
            return lambda handle: 0x4
        return super().__getattr__(name)


def test_a_name_that_does_not_decode_takes_no_other_sensor_with_it(plug):
    plug(Undecodable())
    row = snapshot()
    assert row["name"] is None and row["power_w"] == 351.0 and row["throttle"] == []
    with Sampler(interval=0.001) as sampler:
        while len(sampler.rows) < 3:
            time.sleep(0.001)
    assert sampler.summary()["samples"] >= 3 and sampler.summary()["name"] is None
    card = plug(Card())
    card.nvmlDeviceGetName = lambda handle: b"\xffRTX"
    assert snapshot()["name"] == "\ufffdRTX"


FUNCTIONS = re.findall(r'sensor\(\s*"([^"]+)"', Path(nvml.__file__).read_text())


@pytest.mark.parametrize("names", FUNCTIONS)
def test_functions_that_the_library_no_longer_has(plug, names):
    first, *others = names.split()
    plug(Card())
    whole = snapshot()
    plug(Renamed(first))
    missing = {key for key, value in snapshot().items() if value is None and whole[key] is not None}
    assert len(missing) <= 2 if not others else not missing, missing  # the clocks are read by one function


@pytest.mark.parametrize("answer", [None, "N/A", b"?", [], object()])
def test_answers_that_are_not_numbers_are_no_sensor(plug, answer):
    card = plug(Card())
    for name in ("nvmlDeviceGetPowerUsage", "nvmlDeviceGetClockInfo", "nvmlDeviceGetMemoryInfo"):
        setattr(card, name, lambda *arguments: answer)
    row = snapshot()
    assert row["power_w"] is row["sm_clock_mhz"] is row["memory_used_bytes"] is None
    assert row["temperature_c"] == 41


@pytest.mark.parametrize(
    "module, said",
    [
        (SimpleNamespace(), "is not NVIDIA's (AttributeError: "),
        (SimpleNamespace(nvmlInit=print, nvmlDeviceGetHandleByIndex=print), "is not NVIDIA's (AttributeError: "),
        (SimpleNamespace(nvmlInit=lambda: 1 / 0, nvmlDeviceGetHandleByIndex=print, NVMLError=OSError), "by zero"),
    ],
)
def test_a_foreign_pynvml_is_one_sentence(plug, module, said):
    plug(module)
    assert said in snapshot()["unavailable"] and "\n" not in snapshot()["unavailable"]
    with Sampler() as sampler:
        pass
    assert said in sampler.summary()["unavailable"]


def test_a_pynvml_that_cannot_be_imported_is_one_sentence(monkeypatch, tmp_path):
    (tmp_path / "pynvml.py").write_text("print 'Python 2'\n")
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert "is not NVIDIA's (SyntaxError: " in snapshot()["unavailable"]


@pytest.mark.parametrize(
    "program", ["raise SystemExit(2)", "import argparse; argparse.ArgumentParser().parse_args(['x'])"]
)
def test_nor_one_that_is_a_program(monkeypatch, tmp_path, program):
    (tmp_path / "pynvml.py").write_text(program)
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with Sampler() as sampler:
        pass
    assert "is not NVIDIA's (SystemExit: 2)" in sampler.summary()["unavailable"]


@pytest.mark.parametrize("name", ["RTX\udce9", b"RTX\xff\xfe", 4090])
def test_a_name_can_be_written_to_a_file(plug, name):
    card = plug(Card())
    card.nvmlDeviceGetName = lambda handle: name
    snapshot()["name"].encode()


def test_a_driver_that_never_answers_holds_nobody_up(plug, monkeypatch):
    card, released = plug(Card()), threading.Event()
    card.nvmlDeviceGetPowerUsage = lambda handle: released.wait(60)
    monkeypatch.setattr(nvml, "PATIENCE", 0.05)
    began = time.monotonic()
    with Sampler():
        pass
    assert time.monotonic() - began < 30
    released.set()


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
    assert summary([{}, dict(t=1.0, power_w=3)])["power_w"]["max"] == 3  # of a trace that another version wrote
