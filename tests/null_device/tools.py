"""Run on a card of the computing null device, NANOCHAT_BASE_DIR set: the tools that measure, at tiny shapes.

What they measure is the host's time and means nothing; that they run from end to end does.
"""

import json
import os
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent.parent)]

from test_nvml import Card  # noqa: E402

import benchmarks.profiles  # noqa: E402
import benchmarks.timer  # noqa: E402
from kernels import OPS, tuning  # noqa: E402

tuning.clock = lambda device="cuda": lambda call: call() and 1.0 or 1.0  # a stand-in: the host's time means nothing
HOME = Path(os.environ["NANOCHAT_BASE_DIR"])
sys.modules["pynvml"] = Card()  # a fake of NVIDIA's library


def run(module: str, *words: str) -> int:
    """`python -m module words` in this process; its exit code."""
    sys.argv = [module, *words]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return 0


# Which implementation runs, and why: our attention, where no other is installed.
os.environ["NANOCHAT_KERNELS"] = "auto"
rms_norm = OPS["rms_norm"]
OPS["rms_norm"] = replace(rms_norm, cases=dict(odd=rms_norm.cases["odd"], d0=dict(N=2, C=32)))

# Tuning: it writes what it found into the base folder, and nothing into the checkout.
assert run("kernels", "tune", "--op", "rms_norm") == 0
found = [path for path in HOME.rglob("*.json") if "rms_norm" in path.read_text()]
assert found, list(HOME.rglob("*"))

# Benchmarks: eager, compiled and ours, with the time as a graph beside.
benchmarks.timer.REPLAYS = 2
benchmarks.profiles.PROFILES["quick"] = benchmarks.profiles.Profile(("odd",), 1e8, 0.5, 2, "rms_norm", 0.0)
out = HOME / "bench.json"
assert run("benchmarks", "run", "--profile=quick", "--op=rms_norm", f"--out={out}") == 0
result = json.loads(out.read_text())
bad = [row for row in result["rows"] if row["status"] == "failed"]
assert not bad, bad
assert {row["contender"] for row in result["rows"]} >= {"triton", "eager", "compiled"}
assert [row["graph_ms"] > 0 for row in result["rows"] if row["contender"] == "triton" and "graph_ms" in row]
assert result["sensors"]["throttle"] == [] and torch.cuda.get_device_name() in result["environment"]["machine"]
print("tools: as wanted")
