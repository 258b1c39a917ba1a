"""Processes that measure in turns: ours and another's, or ours in two ways, each with memory and caches of its own."""

import json
import sys
import time
from contextlib import suppress
from pathlib import Path
from subprocess import PIPE, Popen, TimeoutExpired
from tempfile import TemporaryFile
from typing import Any

from nanochat.errors import UserError

PAUSE = 0.5  # seconds: the threads of the one before still spin for a while after its run


class Worker(Popen):
    """A process that imports `nanochat` from a folder, and measures when told to; what it says of errors is kept."""

    def __init__(self, folder: str, words: list[str], env: dict[str, str] | None):
        self.folder, self.log = folder, TemporaryFile("w+", errors="replace")
        super().__init__(words, stdin=PIPE, stdout=PIPE, stderr=self.log, text=True, env=env)


def start(folder: str, settings: dict[str, Any], worker: Path, env: dict[str, str] | None = None) -> Worker:
    """worker: the program that it runs; env: its environment, if not ours."""
    return Worker(folder, [sys.executable, str(worker), folder, json.dumps(settings)], env)


def measure(worker: Worker, order: int) -> dict[str, Any]:
    """One run, told a number: of ours negative where it is to be recorded. Raises UserError if the process has died."""
    assert worker.stdin and worker.stdout
    time.sleep(PAUSE)
    with suppress(BrokenPipeError):
        worker.stdin.write(f"{order}\n")
        worker.stdin.flush()
    line = worker.stdout.readline()
    if not line:
        code = worker.wait()
        worker.log.seek(0)
        last = (worker.log.read().strip().splitlines() or ["it said nothing: was memory short?"])[-1]
        raise UserError(f"the process that runs {worker.folder} ended ({code}); {last.removeprefix('error: ')}")
    return json.loads(line)


def mirrored(sides: list[Any]) -> list[Any]:
    """Two of each, a b b a: the order in which to start processes, as those of one code differ in speed."""
    return sides + sides[::-1]


def end(worker: Popen) -> None:
    """By the end of its input, so that it ends what it has started; or at once, where it does not."""
    try:
        worker.communicate(timeout=60)
    except TimeoutExpired:
        worker.kill()
        worker.wait()
