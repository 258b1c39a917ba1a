import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import standins
import torch

from nanochat import hardware
from nanochat.errors import UserError


def test_libraries_that_a_killed_compiler_left_are_forgotten(tmp_path):
    old, new = tmp_path / "a" / "old.so", tmp_path / "b" / "new.so"
    for library in (old, new):
        library.parent.mkdir()
        library.touch()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    marker = tmp_path / f".compiling.{dead.pid}"
    marker.touch()
    new.touch()
    os.utime(old, (0, 0))
    alive = hardware.mark_compiling(tmp_path)
    hardware.heal_compile_cache(tmp_path)
    assert old.exists() and not new.exists() and not marker.exists() and alive.exists()
    new.touch()
    hardware.heal_compile_cache(tmp_path)
    assert new.exists()  # its process is alive and may still be writing
    hardware.heal_compile_cache(tmp_path / "none")


def test_the_dtype_can_be_asked_for(monkeypatch):
    monkeypatch.setenv("NANOCHAT_DTYPE", "float16")
    assert hardware.compute_dtype(torch.device("cpu"))[0] == torch.float16
    monkeypatch.setenv("NANOCHAT_DTYPE", "int8")
    with pytest.raises(UserError, match="NANOCHAT_DTYPE is 'int8'"):
        hardware.compute_dtype(torch.device("cpu"))


@pytest.mark.parametrize(
    "card, dtype, reason",
    [
        ("T4", torch.float16, "capability 7.5 has float16 matrix units and no bfloat16"),
        ("V100", torch.float16, "capability 7.0 has float16"),
        ("GTX 1050", torch.float32, "capability 6.1 has no matrix units"),
        ("3090", torch.bfloat16, "bfloat16 matrix units"),
        ("MI300X", torch.bfloat16, "bfloat16 matrix units"),
    ],
)
def test_what_a_gpu_computes_in(monkeypatch, card, dtype, reason):
    monkeypatch.delenv("NANOCHAT_DTYPE", raising=False)
    standins.gpus(monkeypatch, card)
    found, why = hardware.compute_dtype(torch.device("cuda:0"))
    assert found == dtype and reason in why
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    assert hardware.compute_dtype(torch.device("cuda:0")) == (torch.float32, "NANOCHAT_DTYPE")


def test_the_gpus_of_a_run_are_alike(monkeypatch):
    for cards, alike in ((["4090"], 1), (["H100"] * 8, 8), (["4090", "4090", "3090"], 2), (["5090", "GTX 1050"], 1)):
        standins.gpus(monkeypatch, *cards)
        assert hardware.gpus_alike() == alike


def test_a_machine_with_a_gpu(monkeypatch):
    standins.gpus(monkeypatch, "T4")
    machine = hardware.setup()
    assert (machine.device, machine.name, machine.dtype) == (torch.device("cuda:0"), "Tesla T4", torch.float16)
    assert machine.peak == hardware.Peak(65, None, 0.32, "float16")
    standins.gpus(monkeypatch, "unknown")
    assert hardware.setup().peak is None and hardware.setup("cuda").name == "NVIDIA Z9000"


@pytest.fixture
def allocator(monkeypatch):
    """What is left of the allocator's variables after set_allocator on such a platform."""

    def after(platform="linux", kernel="6.8.0-generic", hip=None, **given):
        for name in hardware.ALLOCATOR:
            monkeypatch.delenv(name, raising=False)
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(hardware.sys, "platform", platform)
        monkeypatch.setattr(os, "uname", lambda: types.SimpleNamespace(release=kernel))
        monkeypatch.setattr(torch.version, "hip", hip)
        hardware.set_allocator()
        return {name: os.environ[name] for name in hardware.ALLOCATOR if name in os.environ}

    return after


def test_segments_expand_where_they_can_and_nobody_set_it_otherwise(allocator):
    wanted = dict(PYTORCH_ALLOC_CONF="expandable_segments:True")
    assert allocator() == allocator(hip="7.2.26015") == wanted
    assert allocator(kernel="5.15.167.4-microsoft-standard-WSL2") == allocator(hip="6.4.1") == {}
    assert allocator(platform="win32") == {}
    for name in hardware.ALLOCATOR:
        assert allocator(**{name: "max_split_size_mb:64"}) == {name: "max_split_size_mb:64"}


def test_the_allocator_reads_these_variables():
    """By the headers that torch brings: CUDA's allocator asks for its own two names, and then for the common one."""
    header = Path(torch.__file__).parent / "include" / "c10" / "cuda" / "CUDAAllocatorConfig.h"
    if not header.exists():
        pytest.skip("this torch brings no headers")
    assert set(re.findall(r'get_env\("(\w+)"\)', header.read_text())) == set(hardware.ALLOCATOR)
