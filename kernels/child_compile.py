"""Compiling in a child process, so that a compiler's crash is a line of text and not the end of this process.

Triton's AMD compiler can end its process by a signal, which no exception catches. `compiles_in_child` is for dispatch,
tuning and benchmarks: whether an op's kernels compile for the card at hand, asked before the first launch there.
`report` is the table of `python -m kernels compile`: AMD targets in a child, the others here. A child reads tasks as
JSON and prints, for each launch, one line before it compiles it and one with the row after.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from . import targets
from .architectures import ALL_TARGETS, refused, untried
from .registry import OPS
from .triton_utils import INSTALLED, triton

try:
    import fcntl
except ImportError:  # Windows, where there is no ROCm
    fcntl = None  # type: ignore[assignment]

TIMEOUT = 300.0  # seconds for all kernels of a probe
OUT_OF_MEMORY = 9  # the signal: says nothing about the next time
COMMAND = [sys.executable, "-m", f"{__package__}.child_compile"]


@dataclass(frozen=True)
class Task:
    """Every launch of a call and its backward: `shape` is the case's name, `dtype` such as "bfloat16"."""

    op: str
    shape: str
    case: Mapping[str, int]
    dtype: str
    target: str


def main() -> None:
    """The child: tasks, and how many launches to leave out, from standard input."""
    tasks, done = json.load(sys.stdin)
    count = 0
    for task in (Task(**task) for task in tasks):
        for launch in targets.launches(OPS[task.op], task.case, getattr(torch, task.dtype), task.target):
            if count >= done:
                print(json.dumps(_begun(task, launch.kernel.fn.__name__)), flush=True)
                print(json.dumps(targets.build(task.op, task.shape, launch, task.target)), flush=True)
            count += 1


def _begun(task: Task, kernel: str) -> dict[str, Any]:
    return dict(op=task.op, kernel=kernel, target=task.target, shape=task.shape)


def rows(tasks: list[Task], timeout: float | None = None) -> list[dict[str, Any]]:
    """`targets.build`'s row of every launch, made in children; one that ended its child has why in its `error`."""
    made: list[dict[str, Any]] = []
    while True:
        said, ended = _child(tasks, len(made), timeout)
        made += [row for row in said if "error" in row]
        if not ended:
            return made
        alone = not said or "error" in said[-1]  # it ended before it compiled anything, or between two kernels
        made.append({**(_begun(tasks[0], "?") if alone else said[-1]), **targets.UNREAD, "error": ended})
        if alone or timeout is not None:  # a probe's first failure is enough
            return made


def _child(tasks: list[Task], done: int, timeout: float | None) -> tuple[list[dict[str, Any]], str]:
    """(what a child printed, why it ended early or "")."""
    left_out = ("TRITON_INTERPRET", "NANOCHAT_KERNELS")
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    paths = [str(Path(__file__).parent.parent), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    asked = json.dumps([[asdict(task) for task in tasks], done])
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as wrong:
        try:
            code = subprocess.run(
                COMMAND, input=asked, stdout=out, stderr=wrong, text=True, timeout=timeout, env=environment
            ).returncode
            ended = f"the compiler crashed (signal {-code})" if code < 0 else ""
        except subprocess.TimeoutExpired:
            code, ended = 0, f"the compiler was not done after {timeout:.0f} s"
        out.seek(0), wrong.seek(0)
        printed = [json.loads(line) for line in out.read().split("\n") if line.endswith("}")]
        if code > 0:
            last = (wrong.read().strip() or "no message").split("\n")[-1]
            ended = f"the compiler's process ended with exit code {code}: {last}"
    return printed, ended


@cache
def compiles_in_child(op_name: str, size: int, dtype: torch.dtype, arch: str, timeout: float = TIMEOUT) -> str:
    """ "" when all kernels of an op's probe compile for an architecture of ALL_TARGETS, else why not, in one line.

    `size` is what the op's tuned table is keyed by. What came out is remembered for this process and, but for timeouts
    and errors that may pass, in Triton's cache folder under all that it follows from.
    """
    if why := ("" if INSTALLED else "Triton is not installed") or untried(arch) or refused(op_name, arch, dtype):
        return why
    name = str(dtype)[6:]
    path = _memory(op_name, size, name, arch)
    with suppress(OSError):
        return path.read_text()
    with _turn(path.parent.parent, timeout):
        with suppress(OSError):  # another rank has asked meanwhile
            return path.read_text()
        return _found_out(op_name, size, name, arch, path, timeout)


def _found_out(op_name: str, size: int, dtype: str, arch: str, path: Path, timeout: float) -> str:
    """The answer, from a child; what it may be remembered by is written to `path`."""
    tasks = [Task(op_name, "probe", case, dtype, arch) for case in OPS[op_name].probe(size)]
    row = next((row for row in rows(tasks, timeout) if row["error"]), None)
    why = f"{row['error']} on {arch}, in {row['kernel']}" if row else ""
    crashed = "(signal " in why and f"(signal {OUT_OF_MEMORY})" not in why
    if not why or crashed:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            whole = path.with_suffix(f".{os.getpid()}")
            whole.write_text(why)
            os.replace(whole, path)  # other ranks ask the same
        except OSError:
            pass  # a folder that cannot be written to: asked again next time
    return why


@contextmanager
def _turn(folder: Path, timeout: float) -> Iterator[None]:
    """Within it no other rank of this machine is: all ask the same, so one compiles, and the others read its answer.

    Who has waited for `timeout` seconds goes on beside it, as do all where folders cannot be locked.
    """
    descriptor, ends = None, time.monotonic() + timeout
    try:
        if fcntl:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder, os.O_RDONLY)
        while descriptor is not None and time.monotonic() < ends:
            with suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.1)
    except OSError:
        pass
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)  # and with it the lock


def _memory(*question: Any) -> Path:
    """The file of an answer: its name changes with our code, the tables of block sizes and Triton's version."""
    folder = Path(__file__).parent
    files = sorted([*folder.rglob("*.py"), *folder.rglob("*.json")])
    text = repr((question, triton.__version__)).encode()
    digest = hashlib.sha256(text + b"".join(file.read_bytes() for file in files)).hexdigest()
    return Path(triton.knobs.cache.dir) / "nanochat-compiled" / digest[:32]


def report(ops: list[str], chosen: list[str], shapes: list[str], dtype: torch.dtype) -> list[dict[str, Any]]:
    """Rows for every launch of these ops at the named cases (or an op's largest), on these targets, with `faults`."""
    tasks = [
        Task(name, case, OPS[name].cases[case], str(dtype)[6:], target)
        for target in chosen
        for name in ops
        for case in dict.fromkeys(targets.case_of(OPS[name], shape, dtype) for shape in shapes)
        if targets.runs_on(name, target, dtype)
    ]
    apart, here = (
        [task for task in tasks if (ALL_TARGETS[task.target].backend == "hip") is amd] for amd in (True, False)
    )
    made = rows(apart) if apart else []
    launched = [
        (task, launch) for task in here for launch in targets.launches(OPS[task.op], task.case, dtype, task.target)
    ]
    for target in dict.fromkeys(task.target for task in here):
        targets.disassemble_ahead((launch for task, launch in launched if task.target == target), target)
    made += [targets.build(task.op, task.shape, launch, task.target) for task, launch in launched]
    for row in made:
        row["faults"] = targets.faults(row, dtype)
    return sorted(made, key=lambda row: (ops.index(row["op"]), chosen.index(row["target"])))


if __name__ == "__main__":
    main()
