"""Where a measurement was made: machine, driver, libraries, the code's commit, clocks and power as it began."""

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from kernels.triton_utils import INSTALLED, triton
from nanochat.hardware import device_name
from profiling import nvml


def commit() -> str | None:
    """The code's commit, "+" behind it where tracked files were changed; None outside a git checkout."""
    run = lambda *words: subprocess.run(
        ["git", *words], cwd=Path(__file__).parent.parent, capture_output=True, text=True, errors="replace"
    )
    try:
        found = run("rev-parse", "--short", "HEAD")
        changed = run("status", "--porcelain", "--untracked-files=no").stdout.strip()
    except OSError:
        return None
    return None if found.returncode else found.stdout.strip() + ("+" if changed else "")


def environment() -> dict[str, Any]:
    """JSON-ready. `machine` is what two results must share to be compared."""
    on_gpu = torch.cuda.is_available()
    sensors = nvml.snapshot(torch.cuda.current_device() if on_gpu else 0)
    return dict(
        machine=device_name(torch.device("cuda" if on_gpu else "cpu")),
        cpu=device_name(torch.device("cpu")),
        gpus=torch.cuda.device_count(),
        driver=sensors.get("driver"),
        cuda=torch.version.cuda or torch.version.hip,
        torch=torch.__version__,
        triton=triton.__version__ if INSTALLED else None,
        python=platform.python_version(),
        system=platform.platform(),
        threads=torch.get_num_threads(),
        commit=commit(),
        sensors=sensors,
    )
