"""Machine code of the kernels in a compiled step, Inductor's and ours, for the null device's card: what each one takes.

Every source is compiled once and remembered, as profiling/static does; Inductor's in the first of its configurations,
from which it would tune on the card.
"""

import hashlib
import json
import os
import re
import sys
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from kernels import machine_code, targets
from kernels.architectures import ALL_TARGETS
from kernels.triton_utils import triton
from nanochat.files import base_dir, write_atomically
from profiling.compiled import launches
from profiling.compiled.launches import Recorded
from profiling.compiled.lower import Prepared
from profiling.static import launches as static_launches
from profiling.static.launches import processors


def compile_generated(sources: list[tuple[str, str]], target: str) -> list[dict[str, Any]]:
    """Of each (name, source) the keys of UNREAD, and `error`; in a process whose null device is of the target."""
    made = [compiled(name, text, target) for name, text in sources]
    if cubins := [one.asm["cubin"] for one in made if not isinstance(one, str) and "cubin" in one.asm]:
        machine_code.disassemble(cubins)
    return [
        {**targets.UNREAD, "error": one} if isinstance(one, str) else targets.resources(name, one, target)
        for (name, _), one in zip(sources, made)
    ]


def compiled(name: str, text: str, target: str) -> Any:
    """A kernel of Inductor's as Triton compiles it, or why it does not."""
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
        return triton.compile(
            ASTSource(tuner.fn, meta["signature"], meta["constants"], meta["configs"][0]),
            target=GPUTarget(machine.backend, machine.arch, machine.warp),
            options=options,
        )
    except Exception as problem:  # whatever the compiler throws: the report says it
        return targets.last_line(problem)


TOGETHER = 8  # sources compiled and disassembled by a process at a time


def key(text: str, target: str) -> str:
    """Name of the cache's file: changes with the source, the versions and the code that reads."""
    reading = Path(machine_code.__file__).read_bytes() + Path(targets.__file__).read_bytes()
    said = f"{text}{target}{triton.__version__}{torch.__version__}".encode()
    return hashlib.sha256(said + reading).hexdigest()[:32]


def alike(name: str, text: str) -> str:
    """What a kernel's machine code follows from: its source but for its name, and for which of many scalars it reads.

    A layer's lambda is such a scalar: its kernels are the same but for one address.
    """
    return re.sub(r"(tl\.load\(in_ptr\d+ \+ )\(\d+\)", r"\1(0)", text.replace(name, "kernel"))


class Compiler:
    """Compiles Inductor's sources for a target in other processes as soon as they are written, beside the lowering.

    Used as a context: `written` is told of each source, `rows` waits for what is not done yet.
    """

    def __init__(self, target: str) -> None:
        self.target, self.folder = target, base_dir() / "static-cache"
        # Not forked: torch has threads here. Lowering, which all wait for, goes before.
        self.pool = ProcessPoolExecutor(processors(), get_context("spawn"), os.nice, (5,))
        self.known: dict[str, dict[str, Any]] = {}  # by what is alike
        self.next: dict[str, tuple[str, str]] = {}  # by the same: a name and source each
        self.asked: list[tuple[list[str], Future[list[dict[str, Any]]]]] = []
        self.seen: set[str] = set()
        self.turn = Lock()  # forward's module is loaded by a thread (forked.py)

    def __enter__(self) -> "Compiler":
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.shutdown(cancel_futures=True)

    def path(self, text: str) -> Path:
        return self.folder / f"{key(text, self.target)}.json"

    def written(self, name: str, source: str) -> None:
        """A kernel's name and source; one like it may have been there before."""
        text = alike(name, source)
        with self.turn:
            if text in self.seen:
                return
            self.seen.add(text)
            if row := static_launches.load(self.path(text)):
                self.known[text] = row
            else:
                self.next[text] = name, source
            if len(self.next) == TOGETHER:
                self.ask()

    def ask(self) -> None:
        """Has those compiled that wait for it."""
        sources = list(self.next.values())
        self.asked.append((list(self.next), self.pool.submit(compile_generated, sources, self.target)))
        self.next = {}

    def rows(self, found: Recorded) -> dict[str, dict[str, Any]]:
        """Launch.kernel → what became of that kernel on the target; ours are compiled here, meanwhile."""
        if self.next:
            self.ask()
        paths = {
            name: self.folder / f"{static_launches.key(ours, self.target)}.json" for name, ours in found.ours.items()
        }
        rows = {name: row for name, path in paths.items() if (row := static_launches.load(path))}
        targets.disassemble_ahead((launch for name, launch in found.ours.items() if name not in rows), self.target)
        for name in paths.keys() - rows.keys():
            rows[name] = targets.build("", "", found.ours[name], self.target)
            remember(rows[name], paths[name])
        for texts, future in self.asked:
            for text, row in zip(texts, future.result()):
                self.known[text] = dict(kernel="", **row)
                remember(self.known[text], self.path(text))
            print(f"compiled {len(self.known)} of {len(self.seen)}", file=sys.stderr, flush=True)
        for name, source in found.generated.items():
            rows[name] = {**self.known[alike(name.partition(":")[0], source)], "kernel": name}
        return rows


def recorded(ready: Prepared, target: str) -> tuple[Recorded, list[Any], dict[str, dict[str, Any]]]:
    """What launches.recorded returns, and Compiler.rows of it."""
    with Compiler(target) as compiler:
        ready.written.append(compiler.written)
        found, events = launches.recorded(ready)
        return found, events, compiler.rows(found)


def remember(row: dict[str, Any], path: Path) -> None:
    if not row["error"] and not path.exists():
        write_atomically(path, json.dumps(row).encode())
