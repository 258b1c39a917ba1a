"""The sandbox against programs that want out (hostile.py), each shown to be able to without it; and benign ones."""

import os
import re
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hostile
import pytest
from test_web import wait_until

from nanochat import sandbox
from nanochat.errors import UserError
from nanochat.sandbox import landlock, parent, seccomp

ISOLATED = not parent.missing()
needs_isolation = pytest.mark.skipif(not ISOLATED, reason=f"cannot isolate here: {parent.missing()}")
# How a probe ends that was refused: Python raises because of that, or goes on after a call that gave -1.
REFUSED = re.compile(
    r"^$|PermissionError|MemoryError|OSError: \[Errno (1|13|27)\]|can't start new thread|not allowed to raise"
)
ROOT = os.geteuid() == 0


@pytest.fixture(scope="module")
def listeners():
    """Ports and names on which somebody listens."""
    tcp, udp = socket.create_server(("127.0.0.1", 0)), socket.socket(type=socket.SOCK_DGRAM)
    udp.bind(("127.0.0.1", 0))
    abstract = socket.socket(socket.AF_UNIX)
    abstract.bind(f"\0nanochat-test-{os.getpid()}")
    abstract.listen()
    yield dict(tcp=tcp.getsockname()[1], udp=udp.getsockname()[1], abstract=abstract.getsockname())
    for one in (tcp, udp, abstract):
        one.close()


@pytest.fixture(scope="module")
def victim():
    """Another process, and an address in it."""
    with subprocess.Popen(["sleep", "300"], start_new_session=True, stdin=subprocess.PIPE) as process:
        maps = Path(f"/proc/{process.pid}/maps")
        address = int(maps.read_text().split("-")[0], 16) if maps.exists() else 0
        yield dict(victim=process.pid, address=address)
        assert process.poll() is None
        process.kill()


@pytest.fixture
def target(tmp_path, listeners, victim):
    """What the probes are after."""
    folder = tmp_path / "outside"
    (folder / "empty").mkdir(parents=True)
    (folder / "secret").write_text("secret")
    (folder / "link").symlink_to("secret")
    unix = socket.socket(socket.AF_UNIX)
    unix.bind(str(tmp_path / "s"))
    unix.listen()
    yield dict(folder=str(folder), file=str(folder / "secret"), unix=str(tmp_path / "s"), program="/bin/echo",
               name=f"nanochat-test-{os.getpid()}", **listeners, **victim)  # fmt: skip
    unix.close()


def bare(source: str, cwd: Path) -> str:
    """What a program prints without a sandbox."""
    words = [sys.executable, "-I", "-S", "-c", source]
    return subprocess.run(words, cwd=cwd, capture_output=True, stdin=subprocess.DEVNULL, timeout=20).stdout.decode()


def snapshot(folder: str) -> list:
    return [(path.name, path.lstat().st_mode, path.lstat().st_mtime_ns, path.lstat().st_size, path.lstat().st_nlink)
            for path in sorted(Path(folder).rglob("*"))]  # fmt: skip


@needs_isolation
@pytest.mark.parametrize("name", hostile.PROBES)
def test_nothing_gets_out(name, target):
    program = hostile.PROBES[name]
    if "call(" in program and seccomp.machine() != "x86_64":
        pytest.skip("the numbers of its system calls are x86-64's")
    source = hostile.PRELUDE.format(target=target) + program
    before = snapshot(target["folder"])
    result = sandbox.run(source, 3.0)
    assert "ESCAPED" not in result.stdout and result.outcome in ("finished", "error", "killed"), result
    assert snapshot(target["folder"]) == before
    last = (result.stderr.strip().splitlines() or [""])[-1]
    assert REFUSED.search(last) or result.outcome == "killed", f"it was not refused but broken: {last}"


@needs_isolation
@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(hostile.PROBES) - set(hostile.UNPROVEN)))
def test_without_the_sandbox_it_would(name, target, tmp_path):
    """A probe that does nothing anyway proves nothing."""
    if name in hostile.AS_ROOT and not ROOT:
        pytest.skip("only root could do it anyway")
    assert "ESCAPED" in bare(hostile.PRELUDE.format(target=target) + hostile.PROBES[name], tmp_path)


# ---- limits


@pytest.mark.parametrize(
    "source, outcome",
    [
        ("while True: pass", "timeout"),
        ("import time; time.sleep(60)", "timeout"),
        ("import signal\nfor n in range(1, 32):\n  try: signal.signal(n, signal.SIG_IGN)\n  except OSError: pass\n"
         "while True: pass", "timeout"),
        ("class A:\n  def __repr__(self):\n    while True: pass\nA()", "timeout"),
        ("class E(Exception):\n  def __str__(self):\n    while True: pass\nraise E", "timeout"),
        ("import os\nfor n in range(64):\n  try: os.close(n)\n  except OSError: pass\nwhile True: pass", "timeout"),
        ("print('x' * 50_000_000)", "output limit"),
        ("import sys\nwhile True: print('x', file=sys.stderr)", "output limit"),
        ("import os\nwhile True: os.write(2, bytes(4096))", "output limit"),
        ("import os\nwhile True:\n for n in range(3, 64):\n  try: os.write(n, bytes(4096))\n  except OSError: pass",
         "output limit"),
        ("n = 0\nwhile True:\n  open(f'f{n}', 'wb').write(bytes(4_000_000)); n += 1", "output limit"),
        ("n = 0\nwhile True:\n  open(f'f{n}', 'w').close(); n += 1", "output limit"),
        ("import ctypes; ctypes.string_at(0)", "killed"),
    ],
)  # fmt: skip
def test_what_never_ends_or_fills_the_machine(source, outcome):
    if "ctypes" not in source and not ISOLATED:
        pytest.skip("needs rlimits that only Linux has")
    result = sandbox.run(source, 0.3 if outcome == "timeout" else 60.0, unsandboxed=True)
    assert result.outcome == outcome and len(result.stdout) + len(result.stderr) <= parent.OUTPUT + 4096


def processes_of(session: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


@needs_isolation
def test_nothing_is_left_behind(monkeypatch, tmp_path):
    """Neither process nor file nor descriptor."""
    monkeypatch.setattr(parent.tempfile, "tempdir", str(tmp_path))
    started, plain = [], parent.subprocess.Popen

    def noted(*words, **options):
        started.append(plain(*words, **options))
        return started[-1]

    monkeypatch.setattr(parent.subprocess, "Popen", noted)
    before = os.listdir("/proc/self/fd")
    for source in ("open('a', 'w').write('x')", "while True: pass", "1/0", "print('x' * 10**6)"):
        sandbox.run(source, 0.2)
    sandbox.judge("1", "while True: pass", 0.2)
    assert len(started) == 6 and not any(processes_of(process.pid) for process in started)
    assert len(os.listdir("/proc/self/fd")) == len(before) and not list(tmp_path.iterdir())


@needs_isolation
def test_a_child_ends_with_its_parent(tmp_path):
    code = "from nanochat import sandbox\nsandbox.run('while True: pass', 60)"
    with subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent.parent) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        ends = time.monotonic() + 30
        while not (found := children.read_text().split()) and time.monotonic() < ends:
            time.sleep(0.01)
        time.sleep(0.3)
        process.kill()
    (child,) = found
    while (alive := Path(f"/proc/{child}").exists()) and time.monotonic() < ends:
        time.sleep(0.01)
    assert not alive


# ---- what a program finds, and what is believed of what it says


@needs_isolation
def test_what_the_kernel_says_of_a_child():
    with parent.Child("import time; time.sleep(60)", 60) as child:
        assert wait_until(lambda: child.take(2) or child.started is not None, 30)
        status = dict(line.split(":\t") for line in Path(f"/proc/{child.process.pid}/status").read_text().splitlines())
        for name in ("CapEff", "CapPrm", "CapInh"):
            assert int(status[name], 16) == 0
        assert status["NoNewPrivs"] == "1" and status["Seccomp"] == "2" and status["Threads"] == "1"
        limits = Path(f"/proc/{child.process.pid}/limits").read_text()
        assert re.search(rf"Max address space +{parent.MEMORY} +{parent.MEMORY}", limits)


@needs_isolation
def test_a_judge_that_ends_at_once_is_no_error_of_the_sandbox():
    for _ in range(5):
        first, second = sandbox.judge("1 / 0", "while True: pass")
        assert first.problem == "ZeroDivisionError: division by zero" and second.outcome == "killed"


@needs_isolation
def test_it_finds_nothing_of_its_parent():
    source = """
import os, sys
def there(n):
    try: return bool(os.fstat(n))
    except OSError: return False
[dict(os.environ), sys.stdin.read(), sys.argv, [n for n in range(1024) if there(n)][3:], os.listdir('.')]"""
    with open(__file__):  # one more descriptor
        environment, typed, words, descriptors, files = eval(sandbox.run(source).value)
    assert set(environment) <= {"LC_CTYPE"} and typed == "" and words == ["-c"] and files == []
    assert len(descriptors) == 1  # where it reports


@pytest.mark.parametrize("end", ["import os; os._exit(0)", "import sys; sys.exit(0)", "raise SystemExit", "1/0", "["])
def test_only_the_last_line_finishes(end):
    result = sandbox.run(f"x = 1\n{end}\nx", unsandboxed=True)
    assert result.outcome == "error" and result.value == "" and result.problem


def test_lies_to_the_parent_are_the_program_s_own_affair():
    """It may call itself finished, as it may leave out its last line; it cannot make its parent believe anything else,
    or fail."""
    for lie in ("refused\\nno", "ready\\n", "\\xff\\xfe", "finished\\n"):
        source = f"import os\nfor n in range(3, 64):\n  try: os.write(n, b'{lie}')\n  except OSError: pass\nos._exit(0)"
        assert sandbox.run(source, unsandboxed=True).outcome in ("error", "finished")
    for patch in ("import os; os._exit = print", "import sys; sys.stdout = None", "import builtins; builtins.repr = 7",
                  "import os; os.write = None", "import sys; sys.__excepthook__ = 0; 1/0"):  # fmt: skip
        assert sandbox.run(patch + "\n5", 1.0, unsandboxed=True).outcome in ("finished", "error")


def test_a_child_that_cannot_isolate_itself_runs_nothing(monkeypatch):
    if not ISOLATED:
        pytest.skip("cannot isolate here")
    monkeypatch.setattr(parent.seccomp, "program", lambda machine: b"\xff" * 8)
    with pytest.raises(UserError, match="could not be set up: .*seccomp"):
        sandbox.run("print('here')")
    monkeypatch.undo()
    config = landlock.config
    monkeypatch.setattr(parent.landlock, "config", lambda *args: (b"\xff" * 16, *config(*args)[1:]))
    with pytest.raises(UserError, match="could not be set up: .*Landlock"):
        sandbox.run("print('here')")


def test_where_nothing_isolates_it_is_refused_but_for_the_flag(monkeypatch):
    monkeypatch.setattr(parent.landlock, "abi", lambda: 0)
    for call in (lambda: sandbox.run("1"), lambda: sandbox.judge("1", "1")):
        with pytest.raises(UserError, match="Landlock.*--allow-unsandboxed"):
            call()
    assert sandbox.describe().startswith("no isolation")
    assert sandbox.require(True).startswith("no isolation")
    assert sandbox.run("6 * 7", unsandboxed=True).value == "42"
    assert sandbox.run("while True: pass", 0.2, unsandboxed=True).outcome == "timeout"


def test_a_child_left_alone_does_not_keep_its_parent_waiting(monkeypatch):
    """Without isolation a program can start another, which holds the pipes open."""
    monkeypatch.setattr(parent.landlock, "abi", lambda: 0)
    begun = time.monotonic()
    result = sandbox.run("import subprocess; subprocess.Popen(['sleep', '20']); print('x')", 15, unsandboxed=True)
    assert result.outcome == "finished" and result.stdout == "x\n" and time.monotonic() - begun < 12


# ---- benign programs

LIBRARY = """
import abc, argparse, array, ast, base64, bisect, calendar, cmath, collections, contextlib, copy, csv, dataclasses
import datetime, decimal, difflib, doctest, enum, fractions, functools, hashlib, heapq, html, inspect, io, itertools
import json, math, numbers, operator, os, pathlib, pickle, pprint, queue, random, re, secrets, shutil, statistics
import string, struct, sys, tempfile, textwrap, threading, time, timeit, traceback, types, typing, unicodedata
import unittest, uuid, zlib
"""


def test_values_output_and_errors():
    run = lambda source: sandbox.run(source, unsandboxed=True)
    assert run("x = 6\nprint('a')\nx * 7") == sandbox.Result("finished", "a\n", "", "42", pytest.approx(0, abs=30))
    assert run("").outcome == "finished" and run("None").value == "" and run("'é春'").value == "'é春'"
    failed = run("def f():\n    return 1 / 0\nf()")
    assert failed.outcome == "error" and failed.problem == "ZeroDivisionError: division by zero"
    assert failed.stderr.count("File") == 2 and "line 2, in f" in failed.stderr  # no frame of ours
    assert run("import sys; sys.stdout.buffer.write(b'\\xff\\xfe'); None").stdout == "\ufffd\ufffd"
    assert run("'x' * 10**6").value == ("'" + "x" * 10**6)[: parent.VALUE]
    long = "x = 0\n" + "x += 1  # one more\n" * 11_000 + "x"
    assert len(long) > 200_000 and run(long).value == "11000"
    assert run("import __main__\ny = 1\n__main__.y, __name__").value == "(1, '__main__')"
    assert "surrogates" in run("'\ud800'\nprint('\ud800')").problem
    assert run("(" * 10_000).outcome == "error"


@pytest.mark.parametrize(
    "source, value",
    [
        ("hashlib.md5(b'x').hexdigest()[:6], hashlib.sha256(b'').hexdigest()[:6]", "('9dd4e4', 'e3b0c4')"),
        ("decimal.Decimal('0.1') * 3, fractions.Fraction(1, 3) + 1", "(Decimal('0.3'), Fraction(4, 3))"),
        ("random.Random(1).randint(0, 99), 0 <= random.random() < 1", "(17, True)"),
        ("datetime.date(2024, 2, 29).isoweekday(), datetime.datetime.now().year > 2000", "(4, True)"),
        ("re.findall(r'\\w+', 'a bc'), json.dumps({'a': [1]})", "(['a', 'bc'], '{\"a\": [1]}')"),
        ("sorted(collections.Counter('hello').items()), heapq.nsmallest(2, [3, 1, 2])",
         "([('e', 1), ('h', 1), ('l', 2), ('o', 1)], [1, 2])"),
        ("functools.reduce(operator.mul, range(1, 6)), list(itertools.permutations([1, 2]))",
         "(120, [(1, 2), (2, 1)])"),
        ("open('a', 'w').write('xy')\nopen('a').read(), os.listdir('.')", "('xy', ['a'])"),
        ("pathlib.Path('p').write_text('z')", "1"),
        ("pickle.loads(pickle.dumps([1, (2,)])), zlib.decompress(zlib.compress(b'a'))", "([1, (2,)], b'a')"),
        ("time.sleep(0.01), len(str(uuid.uuid4())), len(secrets.token_hex(4))", "(None, 36, 8)"),
        ("@dataclasses.dataclass\nclass A:\n  x: int = 1\nA()", "A(x=1)"),
        ("doctest.testmod().failed", "0"),
    ],
)  # fmt: skip
def test_the_standard_library_works(source, value):
    result = sandbox.run(LIBRARY + source, 10.0, unsandboxed=True)
    assert result.value == value, result.stderr


def test_many_at_once():
    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(lambda i: sandbox.run(f"{i} * {i}", 20.0, unsandboxed=True), range(24)))
    assert [result.value for result in results] == [str(i * i) for i in range(24)]


# ---- the parts


def test_the_rights_of_each_landlock_abi():
    """As <linux/landlock.h> has added them: 13, then refer, truncate, TCP, devices, scopes."""
    assert [landlock.handled(abi) for abi in (1, 2, 3, 4, 5, 6)] == [
        (0x1FFF, 0, 0), (0x3FFF, 0, 0), (0x7FFF, 0, 0), (0x7FFF, 3, 0), (0xFFFF, 3, 0), (0xFFFF, 3, 3),
    ]  # fmt: skip
    assert [len(landlock.config(abi, "/tmp")[0]) for abi in (1, 3, 4, 5, 6, 7)] == [8, 8, 16, 16, 24, 24]
    for abi in (1, 2, 3, 7):
        _, library, own, _, quiet = landlock.config(abi, "/tmp")
        assert quiet == (abi >= 7)
        assert library & own == library and not own & landlock.MAKE_DIR and not library & landlock.WRITE_FILE


@needs_isolation
@pytest.mark.parametrize("abi", range(1, 7))
def test_older_kernels_are_as_tight(abi, monkeypatch, target):
    """With the ruleset of an older ABI the system-call filter still refuses what Landlock does not see."""
    if abi > landlock.abi():
        pytest.skip("this kernel is older")
    monkeypatch.setattr(parent.landlock, "abi", lambda: abi)
    names = ("emptying a file", "emptying a file while opening it", "a file outside", "an abstract socket",
             "TCP to this machine", "a signal to another", "moving a file in", "a device")  # fmt: skip
    before = snapshot(target["folder"])
    for name in names if abi < 3 else names[:3]:
        result = sandbox.run(hostile.PRELUDE.format(target=target) + hostile.PROBES[name])
        assert "PermissionError" in result.stderr and "ESCAPED" not in result.stdout, (name, result)
    assert snapshot(target["folder"]) == before


def decide(program: bytes, data: bytes) -> int:
    """Runs a filter on one struct seccomp_data, as the kernel would."""
    at = accumulator = 0
    while True:
        code, if_true, if_false, k = seccomp.struct.unpack_from("=HBBI", program, 8 * at)
        at += 1
        if code == seccomp.LOAD:
            (accumulator,) = seccomp.struct.unpack_from("=I", data, k)
        elif code == seccomp.AND:
            accumulator &= k
        elif code == seccomp.EQUALS:
            at += if_true if accumulator == k else if_false
        else:
            return k


@pytest.mark.parametrize("machine, header", [
    ("x86_64", "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), ("aarch64", "/usr/include/asm-generic/unistd.h"),
])  # fmt: skip
def test_the_filter_lets_through_what_the_table_says(machine, header):
    program, (column, arch) = seccomp.program(machine), seccomp.ARCHITECTURES[machine]
    pack = lambda number, *args, arch=arch: seccomp.struct.pack("=IIQ6Q", number, arch, 0, *(args + (0,) * 6)[:6])
    allowed = {numbers[column] for numbers in seccomp.ALLOWED.values()} - {None}
    assert len(program) // 8 <= 4096
    for number in range(600):
        conditional = number in {numbers[column] for numbers, *_ in seccomp.CONDITIONAL.values()}
        expected = seccomp.ALLOW if number in allowed else seccomp.REFUSE
        assert conditional or decide(program, pack(number)) == expected, number
        assert decide(program, pack(number + 0x40000000)) == seccomp.REFUSE  # x32
        assert decide(program, pack(number, arch=0x40000003)) == seccomp.KILL_PROCESS  # 32-bit x86
    openat, fcntl, ioctl = (seccomp.CONDITIONAL[name][0][column] for name in ("openat", "fcntl", "ioctl"))
    for flags, fine in ((0, True), (os.O_TRUNC, False), (os.O_WRONLY | os.O_TRUNC | os.O_CREAT, True),
                        (os.O_RDWR | os.O_CLOEXEC, True), (os.O_TRUNC | os.O_CLOEXEC, False), (3, False)):  # fmt: skip
        assert (decide(program, pack(openat, 0, 0, flags)) == seccomp.ALLOW) is fine
    assert decide(program, pack(fcntl, 1, 8)) == seccomp.REFUSE and decide(program, pack(fcntl, 1, 3)) == seccomp.ALLOW
    for request, fine in ((0x5401, True), (0x5412, False), (0x541C, False)):  # TCGETS, TIOCSTI, TIOCLINUX
        assert (decide(program, pack(ioctl, 1, request)) == seccomp.ALLOW) is fine
    if not Path(header).exists():
        pytest.skip(f"{header} is not here, so the numbers cannot be compared with the kernel's")
    known = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", Path(header).read_text()))
    known["newfstatat"] = known.get("newfstatat") or known["fstatat"]
    for name, numbers in [*seccomp.ALLOWED.items(), *((n, c[0]) for n, c in seccomp.CONDITIONAL.items())]:
        if numbers[column] is not None:
            assert int(known[name]) == numbers[column], name
        else:
            assert name not in known
