"""Generated data, made by child processes a few units ahead of where it is read.

Python makes a million tokens of the microworld a second and holds its lock meanwhile: a GPU that trains a small model
would wait for them. A child imports no torch. It is told numbers of units and answers each with a line of JSON; it ends
when nobody listens any more. What it makes is what `load` would have made here, so the data, and how it is resumed,
stay the same.
"""

import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanochat.data import microworld

if TYPE_CHECKING:
    from nanochat.data.source import Source

MOST = 4  # children of a process: with so many, tokenizing is what takes longest
FREE = 2  # cores that are left to the rest of the process
AHEAD = 2  # units that a child has been asked for


def children(world: int) -> int:
    """How many are worth having where so many ranks train; 0 where cores are few."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(MOST, cores // world - FREE))


def loaded(source: "Source", split: str, units: Iterable[int], count: int) -> Iterator[list[Any]]:
    """The items of each of these units, in order; by `count` children where the source is generated.

    Where a child has died (out of memory, say), its units are made here.
    """
    if not count or not isinstance(source, (microworld.Documents, microworld.Conversations)):
        yield from (source.load(split, unit) for unit in units)
        return
    processes = [_start(source, split) for _ in range(count)]
    asked: deque[tuple[int, subprocess.Popen]] = deque()
    try:
        for unit, process in zip(units, cycle(processes)):
            with suppress(OSError):
                process.stdin.write(f"{unit}\n")  # type: ignore[union-attr]
                process.stdin.flush()  # type: ignore[union-attr]
            asked.append((unit, process))
            if len(asked) == AHEAD * count:
                yield _answer(source, split, *asked.popleft())
        while asked:
            yield _answer(source, split, *asked.popleft())
    finally:
        for process in processes:
            process.kill()
            with suppress(OSError):
                process.stdin.close()  # type: ignore[union-attr]
            process.stdout.close()  # type: ignore[union-attr]
            process.wait()


def _start(source: microworld.Documents | microworld.Conversations, split: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "nanochat.data.ahead", type(source).__name__, json.dumps(source.arguments), split]
    path = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]  # the user's: numpy's, say
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
        env=dict(os.environ, PYTHONPATH=os.pathsep.join(path)),
        start_new_session=True,  # Ctrl-C is for the process that trains
    )


def _answer(source: "Source", split: str, unit: int, process: subprocess.Popen) -> list[Any]:
    line = process.stdout.readline()  # type: ignore[union-attr]
    return json.loads(line) if line.endswith("\n") else source.load(split, unit)


def main() -> None:
    """The child: class, arguments and split on the command line, units on standard input."""
    name, arguments, split = sys.argv[1:]
    source = getattr(microworld, name)(**json.loads(arguments))
    with suppress(BrokenPipeError):
        for line in sys.stdin:
            print(json.dumps(source.load(split, int(line))), flush=True)


if __name__ == "__main__":
    main()
