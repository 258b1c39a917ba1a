"""Where a measurement was made: machine, driver, libraries, the code's commit, clocks and power as it began."""

import platform
from pathlib import Path
from typing import Any

import torch

from kernels.triton_utils import INSTALLED, triton
from nanochat import processes
from nanochat.hardware import device_name, has_gpu
from profiling import nvml


def commit() -> str | None:
    """The code's commit, "+" behind it where tracked files were changed; None outside a git checkout."""
    here = Path(__file__).parent
    head = processes.git(here, "rev-parse", "--short", "HEAD")
    changed = processes.git(here, "status", "--porcelain", "--untracked-files=no")
    return head + ("+" if changed else "") if head else None


def environment() -> dict[str, Any]:
    """JSON-ready. `machine` is what two results must share to be compared."""
    on_gpu = has_gpu()
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
