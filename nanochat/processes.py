"""What the system knows of processes: who one is, and which ones another has started."""

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

from nanochat.errors import UserError

PROC = Path("/proc")
# Fields of /proc/PID/stat, counted from after the command's name, which may hold spaces and brackets.
PARENT, BEGUN = 1, 19
LAUNCHER = "NANOCHAT_LAUNCHER"  # variable in which nanochat/launch.py tells its ranks its pid


def identity(pid: int) -> str:
    """A process for good: pid, boot and when it began; "" when there is none. A pid alone is given again, and in a
    container nearly always: the first process is 1.
    """
    if (PROC / "self").exists():
        try:
            boot = (PROC / "sys/kernel/random/boot_id").read_text().strip()
        except OSError:  # some containers do not show it
            boot = ""
        fields = _stat(pid)
        return f"{pid} {boot} {fields[BEGUN]}" if fields else ""
    begun = _ps("-o", "lstart=", "-p", str(pid)).strip()
    return f"{pid} {begun}" if begun else ""


def descendants(pid: int) -> set[int]:
    """The processes that a process has started, and those they have."""
    if (PROC / "self").exists():
        found = {int(name): _stat(int(name)) for name in os.listdir(PROC) if name.isdigit()}
        parents = {child: int(fields[PARENT]) for child, fields in found.items() if fields}
    else:
        lines = (line.split() for line in _ps("-axo", "pid=,ppid=").splitlines())
        parents = {int(child): int(parent) for child, parent in lines}
    family = {pid}
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    return family - {pid}


def end(pids: set[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def end_with_launcher() -> None:
    """A rank gets SIGTERM once its launcher has ended, however that was: it saves and ends too. Linux only.

    Raises UserError where the launcher is not its parent, or not any more.
    """
    parent = os.environ.pop(LAUNCHER, "")
    if not parent or sys.platform != "linux":
        return
    signal_with_parent(signal.SIGTERM)
    if str(os.getppid()) != parent:
        raise UserError(f"the launcher of this rank, process {parent}, is gone; call it again, or unset {LAUNCHER}")


def signal_with_parent(number: int) -> None:
    """This process gets a signal once the thread that started it has ended, however that was. Linux only."""
    ctypes.CDLL(None).prctl(1, *map(ctypes.c_ulong, (number, 0, 0, 0)))  # PR_SET_PDEATHSIG


def _stat(pid: int) -> list[str]:
    try:
        said = (PROC / str(pid) / "stat").read_bytes()  # with the command's name, which may be cut off within a letter
        return said.rpartition(b")")[2].decode("ascii").split()
    except OSError:  # gone, or another user's where /proc is mounted with hidepid
        return []


def git(folder: Path, *words: str) -> str:
    """What git says in a folder, "" where it fails or is not there."""
    try:
        done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, errors="replace")
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _ps(*words: str) -> str:
    try:
        return subprocess.run(["ps", *words], capture_output=True, text=True, errors="replace").stdout
    except OSError:  # Windows
        return ""


def end_at_once(ended: BaseException | None) -> NoReturn:
    """Ends this process as Python would for what it ends with, but without waiting for a thread inside a library."""
    code = ended.code if isinstance(ended, SystemExit) else 1 if ended else 0
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)
