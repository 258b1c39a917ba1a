"""A run has one writer at a time: a second one would remove what the first is saving, and mix both into one log.

Who only reads (chat, evaluation of a finished stage) is not kept out.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from nanochat import locks
from nanochat.errors import EXIT_USAGE, UserError
from nanochat.hardware import Hardware
from nanochat.locks import Lock
from nanochat.run import Run


@contextmanager
def only_writer(run: Run, hardware: Hardware | None = None) -> Iterator[None]:
    """Within it no other process is within the same. Raises UserError, which names that process.

    hardware: of a process that may be one of several ranks. Rank 0 takes the lock and all end when it cannot.
    """
    lock, problem = None, ""
    if hardware is None or hardware.is_main:
        try:
            lock = _take(run)
        except locks.Taken as holder:
            problem = (
                f"run {run.name!r} is being written by {str(holder) or 'another process'}; wait until it ends, or give "
                "another --run NAME"
            )
    if hardware and hardware.world > 1:
        verdict = [problem]
        dist.broadcast_object_list(verdict, src=0)
        problem = verdict[0]
    if problem and hardware and not hardware.is_main:
        raise SystemExit(EXIT_USAGE)  # rank 0 says it
    if problem:
        raise UserError(problem)
    try:
        yield
    finally:
        if lock:
            lock.release()


def _take(run: Run) -> Lock:
    """The lock is beside the run's folder, which may be moved while it is held."""
    folder = run.folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = locks.take(folder.with_name(f".{folder.name}.lock"), locks.holder())
    if not lock.real:
        print(f"note: {folder.parent} is on a disk without locks: see that nothing else writes to run {run.name!r}")
    return lock
