"""Signals: what is noted, what ends at once, and that an end comes whatever holds it up."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from test_training import ROOT, SIZES, home, train  # noqa: F401 (home is a fixture)

from nanochat import checkpoint, interrupt, launch, processes, trainer
from nanochat.errors import EXIT_INTERRUPTED
from nanochat.interrupt import Interrupt
from nanochat.optim import MuonAdamW
from nanochat.progress import Progress
from nanochat.run import Run

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def this_process_goes_on():
    handlers = {number: signal.getsignal(number) for number in launch.SIGNALS}
    yield
    tiny.live_on(handlers)


def send(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


def test_with_something_to_save_the_first_is_noted_and_what_follows_at_once_is_the_same(monkeypatch, capsys):
    monkeypatch.setattr(interrupt, "ONE_PRESS", 0.3)
    handler = Interrupt(lambda: True)
    for number in (*SIGNALS, *SIGNALS):
        send(number)
    assert handler.received and not handler.at_once and capsys.readouterr().err.count("Stopping after this step") == 1
    time.sleep(0.4)
    with pytest.raises(KeyboardInterrupt):
        send()
    assert handler.at_once
    send()  # the same again
    handler.restore()
    send()  # while the process ends


def test_with_nothing_to_save_the_first_is_the_end(capsys):
    with pytest.raises(KeyboardInterrupt), Interrupt() as handler:
        send()
    assert handler.at_once and "nothing to save" in capsys.readouterr().err
    send()  # the same wish, handed on by another


def test_a_terminal_that_is_hung_up_is_a_signal_too():
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    handler = Interrupt(lambda: True)
    send(signal.SIGHUP)
    assert handler.received


def test_under_nohup_a_hung_up_terminal_is_nothing():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Interrupt(lambda: True) as handler:
        send(signal.SIGHUP)
    assert not handler.received


def test_that_nobody_reads_what_is_said_keeps_nothing_from_being_saved(monkeypatch):
    """Ctrl-C ends `tee` too, and a line that is lost takes the terminal with it."""

    class Gone:
        def write(self, text):
            raise BrokenPipeError

        def flush(self):
            raise BrokenPipeError

        def isatty(self):
            return False

    monkeypatch.setattr(sys, "stderr", Gone())
    monkeypatch.setattr(sys, "stdout", Gone())
    handler = Interrupt(lambda: True)
    send()
    assert handler.received and not handler.at_once
    Progress("base", 10, 0, True).note("a line")


def test_without_a_signal_the_handlers_come_back():
    before = [signal.getsignal(number) for number in SIGNALS]
    with Interrupt(), Interrupt():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_training_with_nothing_to_save_takes_no_further_step(home, monkeypatch):  # noqa: F811
    plain, steps = trainer.step, []

    def interrupting(stage, *rest):
        send()
        steps.append(stage.state.step)
        return plain(stage, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(trainer, "step", interrupting)
        assert train(home, "b") == EXIT_INTERRUPTED
    assert steps == [] and checkpoint.latest(Run.open("b").stage("base")) is None
    assert train(home, "b") == 0


@pytest.mark.parametrize("owner, name", [(MuonAdamW, "state_bytes"), (trainer.Saver, "_copy")])
def test_told_while_a_checkpoint_is_being_taken_it_is_still_saved(home, monkeypatch, owner, name):  # noqa: F811
    plain = getattr(owner, name)

    def interrupting(*args):
        send()
        return plain(*args)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, interrupting)
        assert train(home, "b") == EXIT_INTERRUPTED
    assert checkpoint.latest(Run.open("b").stage("base")).step >= 3


HELD_UP = """
import os, subprocess, sys, threading, time
sys.path.insert(0, sys.argv[1])
from nanochat.interrupt import Interrupt

subprocess.Popen(["sleep", "60"])  # what was there before goes on
interrupt = Interrupt()
threading.Thread(target=lambda: subprocess.run(["sleep", "61"])).start()  # as a compiler, and who waits for it
while True:
    try:
        print("ready", flush=True)  # in here: the signal may come before the print is over
        time.sleep(1)  # not longer: a signal that comes just before Python sleeps is heard when it wakes
    except KeyboardInterrupt:  # as in a collector's callback, where it is only printed
        pass
"""


@pytest.mark.parametrize("number", SIGNALS)
def test_an_end_comes_whatever_swallows_it_and_takes_compilers_along(number):
    process = subprocess.Popen([sys.executable, "-c", HELD_UP, ROOT], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    while len(children := processes.descendants(process.pid)) < 2:
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(30) == EXIT_INTERRUPTED
    left = {pid for pid in children if processes.identity(pid)}
    processes.end(left)
    assert len(left) == 1
    process.stdout.close()


def test_a_process_is_known_for_good():
    process = subprocess.Popen(["sleep", "60"])
    own = processes.identity(process.pid)
    assert own == processes.identity(process.pid) and process.pid in processes.descendants(os.getpid())
    processes.end({process.pid})
    process.wait()
    assert processes.identity(process.pid) != own and process.pid not in processes.descendants(os.getpid())


def test_proc_may_hide_the_boot_and_what_others_run(monkeypatch, tmp_path):
    """hidepid=1: their folders are there, and what is in them may not be read."""
    (tmp_path / "self").mkdir()
    for pid, parent in ((7, 1), (8, 7), (9, 7)):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "stat").write_text(f"{pid} (x) S {parent}" + 17 * " 0" + " 123")
    reads = Path.read_bytes

    def refused(path):
        if path.parent.name == "9":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return reads(path)

    monkeypatch.setattr(Path, "read_bytes", refused)
    monkeypatch.setattr(processes, "PROC", tmp_path)
    assert processes.descendants(7) == {8}
    assert processes.identity(8).split() == ["8", "123"] and processes.identity(9) == ""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps 15 bytes of a command's name")
def test_a_command_may_have_any_name(tmp_path):
    """Its first 15 bytes are reported, which end within a letter here."""
    command = tmp_path / "spring 春春春 (1)"
    command.write_text("#!/bin/sh\nread line\n")
    command.chmod(0o755)
    process = subprocess.Popen([command], stdin=subprocess.PIPE)
    try:
        while b"spring" not in Path(f"/proc/{process.pid}/comm").read_bytes():
            time.sleep(0.01)  # not started yet
        assert process.pid in processes.descendants(os.getpid()) and processes.identity(process.pid)
    finally:
        process.communicate(b"end\n")


def test_without_proc_the_system_is_asked(monkeypatch, tmp_path):
    if not processes._ps("-o", "lstart=", "-p", str(os.getpid())):
        pytest.skip("there is no ps here")
    monkeypatch.setattr(processes, "PROC", tmp_path)
    process = subprocess.Popen(["sleep", "60"])
    assert processes.identity(process.pid).startswith(f"{process.pid} ")
    assert process.pid in processes.descendants(os.getpid())
    processes.end({process.pid})
    process.wait()
    assert processes.identity(process.pid) == ""


# ---- while torch compiles


def told_while_compiling(command, cache):
    """Sends SIGTERM once a compiler runs; returns (exit code, seconds until then, what it left running, stderr)."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=dict(os.environ, TORCHINDUCTOR_CACHE_DIR=str(cache), OMP_NUM_THREADS="1"),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    compilers = set()
    while not (compilers and list(cache.glob(".compiling.*"))):
        assert process.poll() is None, process.communicate()[1]
        compilers = {pid for pid in processes.descendants(process.pid) if "cc1plus" in command_of(pid)}
        time.sleep(0.05)
    children = processes.descendants(process.pid)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    _, error = process.communicate(timeout=60)
    took = time.monotonic() - began
    time.sleep(2)  # torch's own helpers end when they see that their parent has
    return process.returncode, took, {pid: command_of(pid) for pid in children if command_of(pid)}, error


def command_of(pid):
    try:
        return (processes.PROC / str(pid) / "cmdline").read_text().replace("\0", " ")
    except (FileNotFoundError, ProcessLookupError):
        return ""


@pytest.mark.slow
def test_training_that_compiles_ends_at_once(home, tmp_path):  # noqa: F811
    flags = [flag for flag in SIZES if not flag.startswith("--compile")]
    command = [sys.executable, "-m", "scripts.base_train", "--run=a", f"--data={home / 'text.jsonl'}", *flags]
    code, took, left, error = told_while_compiling(command, tmp_path / "cache")
    assert (code, left) == (EXIT_INTERRUPTED, {}) and "Traceback" not in error
    print(f"ended after {took:.2f} s")


@pytest.mark.slow
def test_a_plan_that_measures_ends_at_once(home, tmp_path):  # noqa: F811
    command = [sys.executable, "-m", "scripts.plan", "--run=p", "--device=cpu"]
    code, took, left, error = told_while_compiling(command, tmp_path / "cache")
    assert (code, left) == (EXIT_INTERRUPTED, {}) and "Traceback" not in error
    print(f"ended after {took:.2f} s")
