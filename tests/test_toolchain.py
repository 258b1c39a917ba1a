"""What Triton needs to launch kernels: a C compiler and Python's headers."""

import sysconfig

import pytest
import torch

from nanochat import hardware, toolchain


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A PATH without compilers and a folder with a Python.h."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: dict(include=str(tmp_path)))
    return tmp_path


def compiler(path, code=0, said=""):
    path.write_text(f"#!/bin/sh\necho '{said}' >&2\nexit {code}\n")
    path.chmod(0o755)


def test_no_compiler_and_then_no_headers(place):
    assert "apt install gcc" in toolchain.obstacle() and "dnf install gcc" in toolchain.obstacle()
    compiler(place / "clang")
    assert toolchain.obstacle() == ""
    (place / "Python.h").unlink()
    assert "apt install python3-dev" in toolchain.obstacle() and "python3-devel" in toolchain.obstacle()


def test_a_compiler_that_fails_is_quoted(place, monkeypatch):
    compiler(place / "gcc", 1, "cannot find crt1.o")
    assert toolchain.obstacle().endswith("gcc, which fails: cannot find crt1.o")
    monkeypatch.setenv("CC", "/none/cc")
    assert "/none/cc, which cannot be started" in toolchain.obstacle()


def test_without_it_a_gpu_is_not_compiled_for(place):
    works, why = hardware.can_compile(torch.device("cuda"))
    assert not works and "apt install gcc" in why


@pytest.mark.parametrize(
    "variables, wanted",
    [
        ({}, True),
        (dict(NANOCHAT_KERNELS="torch"), True),
        (dict(NANOCHAT_KERNELS="torch", TORCH_COMPILE_DISABLE="1"), False),
    ],
)
def test_who_launches_nothing_needs_nothing(monkeypatch, variables, wanted):
    for name in ("NANOCHAT_KERNELS", "TORCH_COMPILE_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert toolchain.wanted() == wanted
