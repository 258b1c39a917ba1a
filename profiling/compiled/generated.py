"""Machine code of the kernels in a compiled step, Inductor's and ours, for the null device's card: what each one takes.

Every source is compiled once and remembered, as profiling/static does; Inductor's in the first of its configurations,
from which it would tune on the card.
"""

import hashlib
import json
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from kernels import machine_code, targets
from kernels.architectures import ALL_TARGETS
from kernels.triton_utils import triton
from nanochat.files import write_atomically
from profiling.compiled.launches import Recorded
from profiling.static import launches as static_launches


def compile_generated(name: str, text: str, target: str) -> dict[str, Any]:
    """Keys as targets.UNREAD's, and `error`; in a process whose null device is of the target."""
    from torch._inductor.codecache import PyCodeCache
    from torch._inductor.runtime import triton_helpers
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    triton_helpers.set_driver_to_gpu = lambda: None  # the null device's driver is there; CUDA's cannot be built
    try:
        tuner = getattr(PyCodeCache.load(text), name)
        meta = tuner._create_compile_meta(tuner.configs[0])
        options = tuner._create_compile_options(tuner.configs[0], meta)
        machine = ALL_TARGETS[target]
        made = triton.compile(
            ASTSource(tuner.fn, meta["signature"], meta["constants"], meta["configs"][0]),
            target=GPUTarget(machine.backend, machine.arch, machine.warp),
            options=options,
        )
        return targets.resources(name, made, target)
    except Exception as problem:  # whatever the compiler throws: the report says it
        return {**targets.UNREAD, "error": targets.last_line(problem)}


def key(text: str, target: str) -> str:
    """Name of the cache's file: changes with the source, the versions and the code that reads."""
    reading = Path(machine_code.__file__).read_bytes() + Path(targets.__file__).read_bytes()
    said = f"{text}{target}{triton.__version__}{torch.__version__}".encode()
    return hashlib.sha256(said + reading).hexdigest()[:32]


def collect(found: Recorded, target: str, folder: Path, jobs: int) -> dict[str, dict[str, Any]]:
    """Launch.kernel → what became of that kernel on the target."""
    rows: dict[str, dict[str, Any]] = {}
    missing: dict[str, Path] = {}
    for name, text in found.generated.items():
        path = folder / f"{key(text, target)}.json"
        if row := static_launches.load(path):
            rows[name] = row
        else:
            missing[name] = path
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures = {
            pool.submit(compile_generated, name.partition(":")[0], found.generated[name], target): name
            for name in missing
        }
        for name, launch in found.ours.items():
            path = folder / f"{static_launches.key(launch, target)}.json"
            row = static_launches.load(path) or targets.build("", "", launch, target)
            rows[name] = row
            remember(row, path)
        for count, future in enumerate(as_completed(futures), 1):
            name = futures[future]
            rows[name] = dict(kernel=name, **future.result())
            remember(rows[name], missing[name])
            if count % 20 == 0 or count == len(futures):
                print(f"compiled {count} of {len(futures)}", file=sys.stderr, flush=True)
    return rows


def remember(row: dict[str, Any], path: Path) -> None:
    if not row["error"] and not path.exists():
        write_atomically(path, json.dumps(row).encode())
