"""pytest-benchmark's JSON says where it was made (benchmarks/environment.py)."""

from typing import Any

from benchmarks.environment import environment


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info["nanochat_kernels"] = environment()
