import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import standins
import torch

from nanochat import hardware, locks
from nanochat.errors import UserError

ROOT = Path(__file__).parent.parent


COMPILER = """
import pathlib, sys
sys.path.insert(0, sys.argv[1])
from nanochat.hardware import mark_compiling
marker = mark_compiling(pathlib.Path(sys.argv[2]))
print(marker.path.name, flush=True)
sys.stdin.readline()
marker.release()
print("released", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def compiler(tmp_path):
    """compiler(): another process that compiles into tmp_path, and its marker."""
    started = []

    def start():
        process = subprocess.Popen(
            [sys.executable, "-c", COMPILER, ROOT, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        return process, tmp_path / process.stdout.readline().strip()

    yield start
    for process in started:
        process.kill()
        process.communicate()


def library(folder, seconds, name):
    """One that was written so many seconds after a time long ago."""
    path = folder / name / f"{name}.so"
    path.parent.mkdir(exist_ok=True)
    return at(path, seconds)


def at(path, seconds):
    path.touch()
    os.utime(path, (1e9 + seconds, 1e9 + seconds))
    return path


def test_libraries_that_a_killed_compiler_left_are_forgotten(tmp_path, compiler):
    process, marker = compiler()
    at(marker, 10)
    before, during = library(tmp_path, 0, "before"), library(tmp_path, 20, "during")
    hardware.heal_compile_cache(tmp_path)
    assert during.exists() and marker.exists()  # its process may still be writing
    process.kill()
    process.wait()
    hardware.heal_compile_cache(tmp_path)
    assert before.exists() and not during.exists() and not marker.exists()
    hardware.heal_compile_cache(tmp_path / "none")


def test_a_dead_compiler_whose_pid_is_another_process_now_is_found_out(tmp_path, compiler):
    """In a container the first process is 1 each time."""
    process, marker = compiler()
    process.kill()
    process.wait()
    at(marker.rename(tmp_path / f".compiling.{os.getpid()}.0"), 10)
    during = library(tmp_path, 20, "during")
    hardware.heal_compile_cache(tmp_path)
    assert not during.exists() and not list(tmp_path.glob(".comp*"))


def test_without_locks_a_compiler_is_known_by_boot_pid_and_start(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "fcntl", None)
    marker = hardware.mark_compiling(tmp_path)
    at(marker.path, 10)
    during = library(tmp_path, 20, "during")
    hardware.heal_compile_cache(tmp_path)
    assert during.exists() and marker.path.exists()
    words = marker.path.read_text().split(" ")
    for word in range(len(words)):
        at(marker.path, 10).write_text(" ".join([*words[:word], words[word] + "1", *words[word + 1 :]]))
        at(marker.path, 10)
        library(tmp_path, 20, "during")
        hardware.heal_compile_cache(tmp_path)
        assert not during.exists() and not marker.path.exists()
    assert len(words) > 2


@pytest.mark.slow
def test_what_another_compiler_may_have_written_stays_until_that_is_done(tmp_path, compiler):
    (dead, first), (living, second) = compiler(), compiler()
    dead.kill()
    dead.wait()
    at(first, 10), at(second, 30)
    alone, both = library(tmp_path, 20, "alone"), library(tmp_path, 40, "both")
    hardware.heal_compile_cache(tmp_path)
    assert not alone.exists() and both.exists() and first.exists() and second.exists()
    living.stdin.write("\n"), living.stdin.flush()
    assert living.stdout.readline() == "released\n"
    hardware.heal_compile_cache(tmp_path)
    assert not both.exists() and not list(tmp_path.glob(".comp*"))


def test_a_process_that_compiles_twice_has_two_markers(tmp_path):
    one, two = hardware.mark_compiling(tmp_path), hardware.mark_compiling(tmp_path)
    one.release()
    assert not one.path.exists() and locks.held(two.path)
    two.release()


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


def test_a_cards_rates_are_of_16_bits(monkeypatch):
    standins.gpus(monkeypatch, "H100")
    name, peak = "NVIDIA H100 80GB HBM3", hardware.PEAKS["NVIDIA H100 80GB HBM3"]
    assert hardware.limits(name, torch.bfloat16) == (peak.bf16 * 1e12, peak.bandwidth * 1e12)
    assert hardware.limits(name, torch.float32) is hardware.limits("NVIDIA Z9000", torch.bfloat16) is None


@pytest.mark.parametrize("dtype, known", [("", True), ("float16", True), ("float32", False)])
def test_no_peak_of_16_bits_is_held_against_float32(monkeypatch, dtype, known):
    """A plan by it would take twice its time; without one a few steps are measured."""
    standins.gpus(monkeypatch, "H100")
    monkeypatch.setenv("NANOCHAT_DTYPE", dtype)
    for name in hardware.ALLOCATOR:
        monkeypatch.setenv(name, "")  # as it was before, after the test
    assert (hardware.setup().peak is not None) == known


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
        set_here = hardware.set_allocator()
        assert set_here == (os.environ.get("PYTORCH_ALLOC_CONF") == "expandable_segments:True")
        return {name: os.environ[name] for name in hardware.ALLOCATOR if name in os.environ}

    return after


def test_segments_expand_where_they_can_and_nobody_set_it_otherwise(allocator):
    wanted = dict(PYTORCH_ALLOC_CONF="expandable_segments:True")
    assert allocator() == wanted
    assert allocator(kernel="5.15.167.4-microsoft-standard-WSL2") == allocator(hip="7.14.60850") == {}
    assert allocator(platform="win32") == {}
    for name in hardware.ALLOCATOR:
        assert allocator(**{name: "max_split_size_mb:64"}) == {name: "max_split_size_mb:64"}


def test_windows_gpu_is_known_under_another_kernels_name(allocator, monkeypatch, tmp_path):
    monkeypatch.setattr(hardware, "DXG", tmp_path)
    assert allocator(kernel="6.6.87-custom") == {}


@pytest.fixture
def first(monkeypatch):
    """first(error): what a machine with a T4, whose first allocation fails so, says and sets."""
    try_allocator = hardware.try_allocator

    def after(error, **given):
        standins.gpus(monkeypatch, "T4")
        monkeypatch.setattr(hardware, "try_allocator", try_allocator)
        for name in hardware.ALLOCATOR:
            monkeypatch.setenv(name, "")  # for it to be as before after the test
            monkeypatch.delenv(name)
        for name, value in given.items():
            monkeypatch.setenv(name, value)

        def fail(*_, **__):
            raise error

        told = []
        monkeypatch.setattr(torch, "empty", fail)
        monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", told.append)
        hardware.setup()
        return told

    return after


def test_a_gpu_that_maps_no_memory_has_it_in_fixed_segments(first, capsys):
    unmapped = RuntimeError("CUDA driver error: operation not supported\nException raised from map")
    assert first(unmapped) == ["expandable_segments:False"] == [os.environ["PYTORCH_ALLOC_CONF"]]
    said = capsys.readouterr().out
    assert "cannot map memory (CUDA driver error: operation not supported)" in said and said.count("\n") == 1
    assert first(unmapped, PYTORCH_ALLOC_CONF="expandable_segments:True") == []  # the user's own
    assert first(NotImplementedError("Could not run 'aten::empty' with arguments from the 'CUDA' backend")) == []
    with pytest.raises(torch.OutOfMemoryError):
        first(torch.OutOfMemoryError("CUDA out of memory"))


def test_the_allocator_reads_these_variables():
    """By the headers that torch brings: CUDA's allocator asks for its own two names, and then for the common one."""
    header = Path(torch.__file__).parent / "include" / "c10" / "cuda" / "CUDAAllocatorConfig.h"
    if not header.exists():
        pytest.skip("this torch brings no headers")
    assert set(re.findall(r'get_env\("(\w+)"\)', header.read_text())) == set(hardware.ALLOCATOR)


@pytest.mark.parametrize("turn", [1, 2])
def test_what_a_cpu_is_set_to_ends_with_the_test(turn):
    """A later test in this process may be one on a GPU, whose products would be refused (tests/conftest.py)."""
    assert not torch.are_deterministic_algorithms_enabled() and torch.get_float32_matmul_precision() == "highest"
    hardware.setup("cpu")
    torch.set_float32_matmul_precision("high")  # as setup("cuda") does
    assert torch.are_deterministic_algorithms_enabled()
