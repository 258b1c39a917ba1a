"""Checkpoints written by a thread while training goes on.

`Saver.save` copies what is to be saved into host memory that is kept from save to save, and returns: that copy is all
that a step waits for. The thread hashes and writes it (nanochat/checkpoint.py). From a GPU the copies go to pinned
memory, on the stream that computes, so whatever changes the weights next comes after them; the thread waits for an
event behind them. One checkpoint is written at a time.

It takes as much host memory as is saved, on rank 0: weights, and the moments of all ranks (pinned, up to a quarter
more: chunks are not filled to the end). Where less is available, or no thread can be started, checkpoints are written
before `save` returns.
"""

import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanochat import checkpoint
from nanochat.files import sync_file
from nanochat.log import LOG
from nanochat.optim import Moment
from nanochat.oserrors import no_more

CHUNK = 1 << 28  # bytes that are asked for at a time: a power of two, to which torch rounds pinned memory up
ALIGNED = 64  # bytes
SPARE = 1.25  # how many times the size must be available


class Saver:
    """Writes the checkpoints of a stage into `folder`. pinned: the tensors are on a CUDA device.

    What fails in the thread is raised by the next `check`, `save` or `wait`.
    """

    def __init__(self, folder: Path, pinned: bool):
        self.folder = folder
        self.cuda = self.pinned = pinned
        self._kept: dict[tuple[str, str], Tensor] = {}  # by part and name
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0  # bytes of the chunk
        self._fits: bool | None = None  # decided at the first save
        self._idle = threading.Event()
        self._idle.set()
        self._error: BaseException | None = None

    def save(
        self,
        meta: dict[str, Any],
        changing: dict[str, Mapping[str, Tensor | Moment]],
        fixed: dict[str, dict[str, Tensor]],
        size: int,
    ) -> None:
        """Saves meta and parts as `checkpoint.write` does; waits first until the checkpoint before is written.

        changing: parts whose tensors may be changed as soon as this returns; size: their bytes, at most. Moments of
        several ranks are gathered one by one, each part in the order of `checkpoint.in_order`. The tensors of `fixed`,
        on the host, and `meta` are nobody else's.
        """
        self.wait()
        self._idle.clear()
        try:
            if self._fits is None:
                self._fits = self._has_room(size)
            if not self._fits:
                self._put(meta, {**changing, **fixed})
                self._idle.set()
                return
            copies = {
                part: {name: self._copy(part, name, named[name]) for name in checkpoint.in_order(named)}
                for part, named in changing.items()
            }
            copied = None
            if self.cuda:
                copied = torch.cuda.Event()
                copied.record()
            arguments = (meta, {**copies, **fixed}, copied)
            try:
                threading.Thread(target=self._write, args=arguments, daemon=True, name="save").start()
            except RuntimeError as problem:
                if not no_more(problem):
                    raise
                print("note: no thread can be started: this checkpoint is written while training waits", flush=True)
                self._write(*arguments)
        except BaseException:
            self._idle.set()
            raise

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being taken or written."""
        return not self._idle.is_set()

    def check(self) -> None:
        """Raises what the thread failed with, if it did."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def wait(self) -> None:
        """Returns when nothing is left to be written; a signal's handler may raise out of it."""
        self._idle.wait()
        self.check()

    def close(self, wait: bool = True) -> None:
        """At the end, whatever brought it: waits for what is being written, and never raises.

        wait=False leaves it half-written, to be cleared by the next save, if the process ends first.
        """
        if wait:
            self._idle.wait()
        if self._error is not None and not isinstance(sys.exc_info()[1], OSError):  # one full disk, one sentence
            print(f"warning: the last checkpoint was not written: {self._error}", file=sys.stderr)

    def _write(self, meta: dict[str, Any], parts: dict[str, dict[str, Tensor]], copied: Any) -> None:
        try:
            if copied is not None:
                copied.synchronize()
            self._put(meta, parts)
        except BaseException as error:  # noqa: BLE001 (raised in the main thread)
            self._error = error
        finally:
            self._idle.set()

    def _put(self, meta: dict[str, Any], parts: Mapping[str, Mapping[str, Tensor | Moment]]) -> None:
        sync_file(self.folder / LOG)  # the rows up to here are never less than the checkpoint's steps
        checkpoint.write(self.folder, meta, parts)

    def _copy(self, part: str, name: str, tensor: Tensor | Moment) -> Tensor:
        """The tensor's values now, or, of one on a GPU, once its stream comes to the copy."""
        tensor = tensor.whole() if isinstance(tensor, Moment) else tensor
        if (part, name) not in self._kept:
            self._kept[part, name] = self._room(tensor.nbytes).view(tensor.dtype).view(tensor.shape)
        return self._kept[part, name].copy_(tensor.detach(), non_blocking=self.cuda)

    def _room(self, size: int) -> Tensor:
        """Bytes to keep something in, (size,) uint8."""
        begin = -(-self._used // ALIGNED) * ALIGNED
        if begin + size > len(self._chunk):
            begin, self._chunk = 0, self._memory(max(size, CHUNK))
        self._used = begin + size
        return self._chunk[begin : self._used]

    def _memory(self, size: int) -> Tensor:
        if self.pinned:
            try:
                return torch.empty(size, dtype=torch.uint8, pin_memory=True)
            except RuntimeError as problem:  # WSL, or a limit on what may be locked; the other ranks are in a gather
                self.pinned = False
                why = str(problem).splitlines()[0]
                print(f"note: no pinned memory for checkpoints ({why}): copying them takes longer", flush=True)
        return torch.empty(size, dtype=torch.uint8)

    def _has_room(self, size: int) -> bool:
        free = available()
        if SPARE * size <= free:
            return True
        print(
            f"note: checkpoints are written while training waits: a copy of what is saved takes {size / 1e9:.1f} GB of "
            f"memory, and {free / 1e9:.1f} are available",
            flush=True,
        )
        return False


def available() -> int:
    """Bytes of host memory that can be had: of the machine, or of the container. A quarter of it all on macOS."""
    try:
        with open("/proc/meminfo") as f:
            free = next(1024 * int(line.split()[1]) for line in f if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        try:
            free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
        except (AttributeError, ValueError, OSError):  # Windows
            return 0
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        cache = next(
            int(line.split()[1])
            for line in (group / "memory.stat").read_text().splitlines()
            if line.startswith("inactive_file ")
        )
        return free if limit == "max" else min(free, int(limit) - int(used) + cache)
    except (OSError, StopIteration, ValueError):  # no such limit here
        return free
