"""Locks on files that die with the process that holds them (flock).

A lock's file says who holds it. Whoever lets it go removes the file; a process that is killed leaves it, unlocked. On
Windows, and on disks that know no flock, nothing is locked, and a `Lock` says so.
"""

import errno
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # some network file systems


class Taken(Exception):
    """Somebody else has the lock; the text is what its file says."""


@dataclass(frozen=True)
class Lock:
    """Held until `release`, or until this process ends. real: whether the file system has locks."""

    path: Path
    descriptor: int
    real: bool

    def release(self) -> None:
        if self.real:
            self.path.unlink(missing_ok=True)  # still locked: nobody can have begun to use it
        os.close(self.descriptor)
        if not self.real:
            self.path.unlink(missing_ok=True)


def take(path: Path, text: str, wait: bool = False) -> Lock:
    """Locks `path`, which is made, and writes `text` into it. Raises Taken, unless told to wait, and OSError."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            real = _lock(descriptor, wait)
        except BlockingIOError:
            said = os.read(descriptor, 1 << 12).decode(errors="replace").strip()
            os.close(descriptor)
            raise Taken(said) from None
        except BaseException:
            os.close(descriptor)
            raise
        if not real or _is_at(path, descriptor):
            break
        os.close(descriptor)  # its holder has just removed it
    os.ftruncate(descriptor, 0)
    os.write(descriptor, text.encode())
    return Lock(path, descriptor, real)


def held(path: Path) -> bool | None:
    """Whether a living process holds the lock; None where the file system has no locks."""
    return _free(path, remove=False)


def remove_if_free(path: Path) -> None:
    """Removes the file of a lock that nobody holds any more."""
    _free(path, remove=True)


def _free(path: Path, remove: bool) -> bool | None:
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        real = _lock(descriptor, wait=False)
        if remove:
            path.unlink(missing_ok=True)
        return False if real else None
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)


def _lock(descriptor: int, wait: bool) -> bool:
    """False where there are no locks. Raises BlockingIOError."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as problem:
        if problem.errno not in NO_LOCKS:
            raise
        return False
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    own = os.fstat(descriptor)
    return (there.st_dev, there.st_ino) == (own.st_dev, own.st_ino)


def holder() -> str:
    """This process, for people."""
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return f"{Path(sys.argv[0]).stem}, process {os.getpid()} on {platform.node()}, since {since}"


@contextmanager
def turn(path: Path) -> Iterator[None]:
    """Within it no other process is within the same; it waits for its turn."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = take(path, holder(), wait=True)
    try:
        yield
    finally:
        lock.release()
