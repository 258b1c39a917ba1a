"""The rows of the static report: every launch of every op at named cases, compiled for every target, read, remembered.

A row is what kernels/targets.py's `build` says, and which pass it belongs to, how often it is launched and with how
many programs. Rows are kept in a folder under a hash of all that they follow from: the kernel's source with everything
it calls, its launch signature and options, the target, Triton's version, the code that reads. A file that cannot be
read is made again; a kernel that does not compile is a row with its error, and is tried again next time.
"""

import hashlib
import json
import math
import os
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from kernels import OPS, architectures, machine_code, targets
from kernels.triton_utils import Launch, triton
from nanochat.files import json_of, write_atomically

DTYPE = torch.bfloat16
OURS, LIGER = "ours", "liger"


@dataclass(frozen=True)
class Task:
    """One distinct launch: `index` counts them within an op's call, forward then backward."""

    whose: str
    op: str
    shape: str
    target: str
    index: int


def launches(whose: str, op: str, shape: str, target: str) -> list[tuple[Launch, str, int]]:
    """(launch, "forward" or "backward", how many like it) of a call and its backward, each distinct one once."""
    if whose == LIGER:
        return [(launch, "", 1) for launch in peers()[op]]
    found: list[tuple[Launch, str, int]] = []
    passes = targets.all_launches(OPS[op], OPS[op].cases[shape], DTYPE, target)
    for way, made in zip(("forward", "backward"), passes):
        signatures = [repr(targets.source(launch)) for launch in made]
        counts = Counter(signatures)
        found += [(launch, way, counts[text]) for text, launch in dict(zip(signatures, made)).items()]
    return found


def key(launch: Launch, target: str) -> str:
    """Name of the cache's file: changes with anything that the row follows from."""
    options = {name: value for name, value in launch.constants.items() if name not in launch.kernel.arg_names}
    reading = [Path(module.__file__ or "").read_bytes() for module in (machine_code, targets, architectures)]
    parts = [launch.kernel.cache_key, targets.source(launch), sorted(options.items()), target, triton.__version__]
    return hashlib.sha256(repr(parts).encode() + b"".join(reading)).hexdigest()[:32]


def compile_task(task: Task) -> dict[str, Any]:
    """The row of a task, in a process of the pool."""
    launch = launches(task.whose, task.op, task.shape, task.target)[task.index][0]
    return targets.build(task.op, task.shape, launch, task.target)


def collect(
    ops: list[str], shapes: list[str], chosen: list[str], folder: Path, jobs: int, beside: bool = False
) -> tuple[list[dict[str, Any]], int]:
    """(rows, how many of them were compiled now and not read from the folder)."""
    tasks: dict[Task, tuple[str, dict[str, Any]]] = {}  # → (key, what a row has beside what was read)
    for op in ops:
        cases = dict.fromkeys(targets.case_of(OPS[op], shape, DTYPE) for shape in shapes)
        wanted = [(OURS, case) for case in cases] + ([(LIGER, "d24")] if beside and op in peers() else [])
        for target in chosen:
            for whose, case in wanted if targets.runs_on(op, target, DTYPE) else ():
                for index, (launch, way, times) in enumerate(launches(whose, op, case, target)):
                    extra = dict(whose=whose, way=way, times=times, programs=math.prod(launch.grid))
                    tasks[Task(whose, op, case, target, index)] = key(launch, target), extra
    read = {name: found for name in {name for name, _ in tasks.values()} if (found := load(folder / f"{name}.json"))}
    missing = {name: task for task, (name, _) in tasks.items() if name not in read}
    read.update(compile_all(missing, folder, jobs))
    rows = []
    for task, (name, extra) in tasks.items():
        row = {**read[name], **extra, "op": task.op, "shape": task.shape, "target": task.target}
        rows.append(row | dict(faults=targets.faults(row, DTYPE)))
    return rows, len(missing)


@cache
def peers() -> dict[str, list[Launch]]:
    """Liger-Kernel's launches by the name of our op, at sizes of d24."""
    from benchmarks.static_peers import liger

    return liger()


def compile_all(missing: dict[str, Task], folder: Path, jobs: int) -> dict[str, dict[str, Any]]:
    """Rows by key; each is written into the folder as soon as it is there."""
    made: dict[str, dict[str, Any]] = {}
    if not missing:
        return made
    # Longest first, so that none of them is left over at the end.
    queue = sorted(missing, key=lambda name: ("attention" not in missing[name].op, missing[name].op))
    made.update(compile_in_pool({name: missing[name] for name in queue}, folder, jobs))
    # A process that died takes all of its pool with it: what was lost is tried again, each in a pool of its own.
    for name in [name for name in queue if name not in made]:
        made[name] = compile_in_pool({name: missing[name]}, folder, 1).get(name) or broken(missing[name])
    return made


def compile_in_pool(tasks: dict[str, Task], folder: Path, jobs: int) -> dict[str, dict[str, Any]]:
    """As compile_all, without those that were lost when a process died."""
    made: dict[str, dict[str, Any]] = {}
    # Not forked: torch has threads here.
    with ProcessPoolExecutor(min(jobs, len(tasks)), mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(compile_task, task): name for name, task in tasks.items()}
        for count, future in enumerate(as_completed(futures), 1):
            name = futures[future]
            try:
                made[name] = future.result()
            except BrokenProcessPool:
                continue
            if not made[name]["error"]:
                write_atomically(folder / f"{name}.json", json.dumps(made[name]).encode())
            if count % 20 == 0 or count == len(futures):
                print(f"compiled {count} of {len(futures)}", file=sys.stderr, flush=True)
    return made


def broken(task: Task) -> dict[str, Any]:
    """A row for a kernel whose compilation ended its process, twice."""
    row = dict(op=task.op, kernel="?", target=task.target, shape=task.shape)
    return {**row, **targets.UNREAD, "error": "the compiler's process died (a crash, or memory)"}


def load(path: Path) -> dict[str, Any] | None:
    """A remembered row; None where there is none, or none that can be used."""
    try:
        row = json_of(path.read_bytes())
        return row if set(targets.UNREAD) | {"kernel", "error"} <= set(row) else None
    except (OSError, ValueError, TypeError):
        return None


def processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
