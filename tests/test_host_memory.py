"""Memory that was freed is not asked of the kernel again, unless the user has set how malloc is to work."""

import ctypes
import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
from test_training import ROOT

from nanochat import hardware, host_memory

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is not glibc's here")

PAGES = 10 << 12  # of 10 blocks of 16 MB: larger than what glibc keeps of its own accord
FAULTS = """
import resource
from nanochat import host_memory
host_memory.keep()
def some():
    blocks = [bytearray(1 << 24) for _ in range(10)]
    for block in blocks:
        block[::4096] = bytes(1 << 12)
for _ in range(5):
    some()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
some()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(**environment) -> int:
    ours = {name: value for name, value in os.environ.items() if name not in host_memory.VARIABLES}
    where = {**ours, "GLIBC_TUNABLES": "", "PYTHONPATH": str(ROOT), **environment}
    ran = subprocess.run([sys.executable, "-c", FAULTS], env=where, capture_output=True, text=True, check=True)
    return int(ran.stdout.splitlines()[-1])


def test_a_step_has_the_pages_of_the_step_before(monkeypatch):
    called = []
    monkeypatch.setattr(host_memory, "keep", lambda: called.append(1))
    hardware.setup("cpu")
    assert called
    assert faults() < 0.01 * PAGES


@pytest.mark.parametrize(
    "name, value",
    [("MALLOC_TRIM_THRESHOLD_", "131072"), ("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=131072")],
)
def test_what_the_user_has_set_stays(name, value):
    assert faults(**{name: value}) > 0.5 * PAGES


@pytest.mark.parametrize("most, taken", [(1 << 30, 1 << 30), (32 << 20, 32 << 20), (0, None)])
def test_of_old_glibc_the_most_that_it_takes(monkeypatch, most, taken):
    """With only its trimming set, it would no longer adapt, and map every block of 128 kB afresh."""
    for name in (*host_memory.VARIABLES, "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    made = {}

    def mallopt(name, value):
        if name == host_memory.M_MMAP_THRESHOLD and value > most:
            return 0
        made[name] = value
        return 1

    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=mallopt))
    host_memory.keep()
    assert made == ({host_memory.M_MMAP_THRESHOLD: taken, host_memory.M_TRIM_THRESHOLD: -1} if taken else {})
