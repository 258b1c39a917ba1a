import os
import subprocess
import sys

import pytest
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
