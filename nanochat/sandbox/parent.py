"""The parent's side of the sandbox: starts a child, caps its time and output, ends it, and says how it went.

`run` is for a program whose word is enough (a tool). Whoever grades one uses `judge`: what is graded and what grades it
run in two children, and the verdict comes from the second, in which none of the graded code has ever been.
"""

import marshal
import math
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.errors import UserError
from nanochat.sandbox import landlock, seccomp

CHILD = Path(__file__).with_name("child.py").read_text("utf-8")
STARTUP_SECONDS = 30.0  # for Python to start, before a program's own time begins; a busy machine takes its time
MEMORY = 512 * 2**20  # bytes of address space
FILE = 8 * 2**20  # bytes of one file
FOLDER, FILES = 32 * 2**20, 200  # bytes and files in the child's folder
OUTPUT = 64 * 2**10  # bytes of stdout, and of stderr
VALUE = 10_000  # characters of the last expression's value
TICK = 0.05  # seconds between looks at the folder


@dataclass(frozen=True)
class Result:
    """How a program ended.

    outcome: "finished", its last line was reached; "error", an exception or an exit before that (`stderr` says which);
    "timeout"; "output limit", too much written, to stdout, stderr or files; "killed", by a signal (out of CPU time, a
    crash of the interpreter). value: repr of the last line where it is an expression other than None, else "".
    """

    outcome: str
    stdout: str
    stderr: str
    value: str
    seconds: float  # since its first line

    @property
    def problem(self) -> str:
        """Why it did not finish, in one line; "" if it did."""
        if self.outcome == "finished":
            return ""
        if self.outcome == "error":
            return one_line((self.stderr.strip().splitlines() or [""])[-1]) or "it ended before its last line"
        return self.outcome + (f" after {self.seconds:.1f} s" if self.outcome == "timeout" else "")


def one_line(text: str) -> str:
    """The beginning of what a program says, without what a terminal would obey."""
    return "".join(c for c in " ".join(text.split()) if c.isprintable())[:300]


def missing() -> str:
    """What this machine lacks to isolate a child; "" if nothing."""
    lacks = []
    if not landlock.abi():
        lacks.append("Landlock (Linux 5.13 or newer, switched on)")
    if not seccomp.machine():
        lacks.append(f"a seccomp filter for it (there is one for {' and '.join(seccomp.ARCHITECTURES)})")
    return ", ".join(lacks)


def describe() -> str:
    """The isolation that `run` gives here, e.g. "Landlock ABI 6, seccomp (x86_64), no capabilities, rlimits"."""
    if lacks := missing():
        return f"no isolation: this system lacks {lacks}"
    return f"Landlock ABI {landlock.abi()}, seccomp ({seccomp.machine()}), no capabilities, rlimits"


def require(unsandboxed: bool) -> str:
    """The isolation there will be. Raises UserError where there is none and the user has not said that this is fine."""
    if lacks := missing():
        if not unsandboxed:
            raise UserError(
                f"code that a model wrote cannot be isolated here: this system lacks {lacks}; run it in a virtual "
                "machine of its own with --allow-unsandboxed, or not at all"
            )
        return "no isolation (time, memory and output are limited)"
    return describe()


def run(source: str, seconds: float = 5.0, unsandboxed: bool = False) -> Result:
    """Runs a program in a child. Its "finished" is its own word: it could say so at any line (see `judge`).

    Raises UserError where a child cannot be isolated, unless `unsandboxed`: then it is only limited.
    """
    require(unsandboxed)
    with Child(source, seconds) as child:
        _watch([child], seconds)
        return child.result()


def judge(judge: str, judged: str, seconds: float = 5.0, unsandboxed: bool = False) -> tuple[Result, Result]:
    """Runs two programs beside each other until the first ends: (its result, the other's).

    Each finds the pipes to the other in its names READ and WRITE. Raises UserError as `run` does.
    """
    require(unsandboxed)
    ends = [*os.pipe(), *os.pipe()]
    try:
        with ExitStack() as both:
            first = both.enter_context(Child(judge, seconds, dict(READ=ends[0], WRITE=ends[3])))
            second = both.enter_context(Child(judged, seconds, dict(READ=ends[2], WRITE=ends[1])))
            while ends:
                os.close(ends.pop())
            _watch([first, second], seconds)
            return first.result(), second.result()
    finally:
        for end in ends:
            os.close(end)


class Child:
    """A process that runs a program; `pipes` are descriptors that it inherits, told to the program by name."""

    def __init__(self, source: str, seconds: float, pipes: dict[str, int] | None = None):
        pipes = pipes or {}
        self.folder = tempfile.mkdtemp(prefix="nanochat-")
        self.limit = ""  # which one it ran into
        self.cut = False  # it was ended
        self.started: float | None = None  # when the program's first line was to run
        self.seconds = 0.0
        report, report_end = os.pipe()
        cpu = math.ceil(seconds + STARTUP_SECONDS)
        limits = dict(
            RLIMIT_AS=MEMORY, RLIMIT_FSIZE=FILE, RLIMIT_NOFILE=32, RLIMIT_CPU=cpu, RLIMIT_CORE=0, RLIMIT_MEMLOCK=0
        )
        isolation: Any = None
        if not missing():
            config = landlock.config(landlock.abi(), self.folder)
            isolation = (config, seccomp.program(seccomp.machine()), os.getpid())
        asked = dict(
            source=source, names=pipes, report=report_end, limits=list(limits.items()), isolation=isolation,
            longest=VALUE,
        )  # fmt: skip
        words = [sys.executable, "-I", "-S", "-B", "-X", "utf8", "-c", CHILD]
        try:
            with tempfile.TemporaryFile() as stdin:
                stdin.write(marshal.dumps(asked))
                stdin.seek(0)
                self.process = subprocess.Popen(
                    words, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=self.folder, env={},
                    start_new_session=True, pass_fds=(report_end, *pipes.values()),
                )  # fmt: skip
        except BaseException:
            os.close(report)
            shutil.rmtree(self.folder, ignore_errors=True)
            raise
        finally:
            os.close(report_end)
        assert self.process.stdout and self.process.stderr
        self.streams = [self.process.stdout, self.process.stderr, open(report, "rb")]
        self.read = [bytearray() for _ in self.streams]
        self.open = set(range(len(self.streams)))
        for stream in self.streams:
            os.set_blocking(stream.fileno(), False)

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        for stream in self.streams:
            stream.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def take(self, i: int) -> None:
        """Reads what has come on a stream."""
        try:
            found = os.read(self.streams[i].fileno(), 1 << 16)
        except BlockingIOError:
            return
        self.read[i] += found
        if not found:
            self.open.discard(i)
        elif len(self.read[i]) > OUTPUT:
            self.limit = "output limit"
        if self.started is None and self.read[2].startswith(b"ready\n"):
            self.started = time.monotonic()

    def drain(self) -> None:
        """Reads what is left, and waits for a process that is about to have ended."""
        for i in list(self.open):
            before = -1
            while i in self.open and not self.limit and len(self.read[i]) != before:
                before = len(self.read[i])
                self.take(i)
        if 2 not in self.open:  # the report, which it never closes itself
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(1.0)

    def look(self) -> None:
        """Counts its files: there is no rlimit for all of them together."""
        with suppress(FileNotFoundError), os.scandir(self.folder) as files:
            total = count = 0
            for file in files:
                with suppress(FileNotFoundError):
                    total += file.stat(follow_symlinks=False).st_size
                count += 1
                if total > FOLDER or count > FILES:
                    self.limit = "output limit"
                    return

    def end(self) -> None:
        """Kills its session, if it has not ended. In the sandbox it can start no process that could leave it."""
        if self.process.returncode is None:
            self.cut = True
            if self.started is not None:
                self.seconds = time.monotonic() - self.started
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def result(self) -> Result:
        """Raises UserError when it could not isolate itself, or not start: the program has not run then."""
        self.end()
        stdout, stderr, report = (bytes(read[:OUTPUT]) for read in self.read)
        if not report.startswith(b"ready\n") and not self.limit and not self.cut:
            why = report.removeprefix(b"refused\n") or stderr.strip()[-300:] or b"it ended at once"
            raise UserError(
                f"the sandbox could not be set up: {why.decode(errors='replace')}; a container may refuse Landlock or "
                "seccomp: allow them, or run outside of it"
            )
        said = report.removeprefix(b"ready\n")
        if self.limit:
            outcome = self.limit
        elif said.startswith(b"finished\n"):
            outcome = "finished"
        else:
            outcome = "killed" if self.process.returncode < 0 else "error"
        value = said.removeprefix(b"finished\n") if outcome == "finished" else b""
        text, errors, shown = (data.decode("utf-8", "replace") for data in (stdout, stderr[-4096:], value))
        return Result(outcome, text, errors, shown, self.seconds)


def _watch(children: list[Child], seconds: float) -> None:
    """Returns when the first child has ended, or any has run into a limit; all have ended then."""
    first, begun = children[0], time.monotonic()
    with selectors.DefaultSelector() as selector:
        for child in children:
            for i, stream in enumerate(child.streams):
                selector.register(stream, selectors.EVENT_READ, (child, i))
        looked = begun
        while first.open and not any(child.limit for child in children):
            for key, _ in selector.select(TICK):
                child, i = key.data
                child.take(i)
                if i not in child.open:
                    selector.unregister(key.fileobj)
            now = time.monotonic()
            if now - looked >= TICK:
                looked = now
                for child in children:
                    child.look()
            if now > _deadline(children, begun, seconds):
                for child in children:
                    child.limit = child.limit or "timeout"
            if first.process.poll() is not None and not selector.select(0):
                break  # only without the sandbox: something that it started holds its pipes open
        if not any(child.limit for child in children):
            try:
                first.process.wait(max(0.0, _deadline(children, begun, seconds) - time.monotonic()))
            except subprocess.TimeoutExpired:  # it has closed its streams and goes on
                first.limit = "timeout"
    for child in children:
        if not child.limit:
            child.drain()
        child.end()


def _deadline(children: list[Child], begun: float, seconds: float) -> float:
    """A program's time begins when all are ready."""
    started = [child.started for child in children]
    return begun + STARTUP_SECONDS if None in started else max(at for at in started if at is not None) + seconds
