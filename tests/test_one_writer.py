"""Two processes on one run: the second is told who has it; who only reads is not kept out."""

import errno
import os
import signal
import subprocess
import sys
import threading
import types

import pytest
import tiny
import torch.distributed as dist
from test_training import ROOT, SIZES, home, train  # noqa: F401 (home is a fixture)

from nanochat import checkpoint, locks
from nanochat.errors import UserError
from nanochat.one_writer import only_writer
from nanochat.plan import throughput
from nanochat.run import Run

HOLDER = """
import sys
sys.path.insert(0, sys.argv[1])
sys.argv = ["/somewhere/base_train.py"]
from nanochat.one_writer import only_writer
from nanochat.run import Run
with only_writer(Run.open("a")):
    print("ready", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def other(home):  # noqa: F811
    """Another process that writes to run "a"."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, ROOT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.communicate()


def lock_files(home):  # noqa: F811
    return [path.name for path in (home / "home" / "runs").glob(".*")]


def test_the_second_writer_is_told_of_the_first_and_may_begin_when_that_has_died(home, other, capsys):  # noqa: F811
    for stage in ("base", "mid", "sft"):
        assert train(home, "a", stage) == 2
        error = capsys.readouterr().err
        assert f"run 'a' is being written by base_train, process {other.pid} on " in error and ", since 20" in error
        assert error.count("\n") == 1
    assert tiny.call("tok_train", "--run=a", f"--data={home / 'text.jsonl'}", "--vocab-size=300") == 2
    assert tiny.call("plan", "--run=a", "--device=cpu") == 2
    assert capsys.readouterr().err.count(f"process {other.pid}") == 2
    assert not Run.open("a").stage("base").exists()
    assert train(home, "b") == 0  # another run is another's
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert lock_files(home) == [".a.lock"]
    assert train(home, "a") == 0
    assert lock_files(home) == []


@pytest.mark.slow
def test_readers_are_not_kept_out(home, monkeypatch):  # noqa: F811
    monkeypatch.setattr(throughput, "speed", lambda *args: (10_000.0, True))
    assert train(home, "a") == 0
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, ROOT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    try:
        flags = ["--run=a", "--device-type=cpu"]
        assert tiny.call("chat_cli", *flags, "--source=base", "--prompt=the river", "--max-tokens=4") == 0
        assert tiny.call("base_eval", *flags, f"--data={home / 'text.jsonl'}", "--eval=bpb", "--split-tokens=256") == 0
        assert tiny.call("plan", "--run=a", "--device=cpu", "--dry-run") == 0
        assert tiny.call("report", "--run=a") == 0
    finally:
        process.communicate("\n")


def test_a_run_may_be_moved_while_it_is_held_and_has_one_lock_by_any_name(home):  # noqa: F811
    runs = home / "home" / "runs"
    (runs / "link").symlink_to(runs / "a")
    with only_writer(Run.open("a")):
        (runs / "a").rename(runs / "elsewhere")
        with pytest.raises(locks.Taken):
            locks.take(runs / ".a.lock", "me")
        (runs / "elsewhere").rename(runs / "a")
        with pytest.raises(UserError, match="run 'link' is being written by"), only_writer(Run.open("link")):
            pass
    assert lock_files(home) == []


def test_where_a_disk_has_no_locks_it_says_so_and_goes_on(home, monkeypatch, capsys):  # noqa: F811
    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    assert train(home, "a") == 0
    assert "is on a disk without locks: see that nothing else writes to run 'a'" in capsys.readouterr().out
    monkeypatch.setattr(locks, "fcntl", None)  # Windows
    assert train(home, "b") == 0
    assert "is on a disk without locks" in capsys.readouterr().out
    assert lock_files(home) == []


@pytest.mark.parametrize("main", [True, False])
def test_what_rank_0_finds_ends_all_ranks(home, other, monkeypatch, main):  # noqa: F811
    noted = []

    def broadcast(found, src):
        noted.append(found[0])
        found[0] = found[0] or f"run 'a' is being written by process {other.pid}"

    monkeypatch.setattr(dist, "broadcast_object_list", broadcast)
    hardware = types.SimpleNamespace(is_main=main, world=2)
    with pytest.raises(UserError if main else SystemExit) as ended, only_writer(Run.open("a"), hardware):
        pytest.fail("it has begun")
    assert str(other.pid) in str(ended.value) if main else ended.value.code == 2
    assert bool(noted[0]) == main


def test_a_lock_whose_file_was_just_removed_is_taken_again(tmp_path, monkeypatch):
    """Between opening and locking it the other lets it go: the file that is locked then is no longer there."""
    path, plain = tmp_path / "lock", locks._lock
    others = [locks.take(path, "first")]

    def late(descriptor, wait):
        if others:
            others.pop().release()
        return plain(descriptor, wait)

    monkeypatch.setattr(locks, "_lock", late)
    second = locks.take(path, "second")
    assert path.read_text() == "second" and locks.held(path)
    second.release()
    assert locks.held(path) is False and not path.exists()


def test_turns_are_waited_for(tmp_path):
    inside, most = [], []

    def work():
        with locks.turn(tmp_path / "eval" / ".lock"):
            inside.append(1)
            most.append(len(inside))
            threading.Event().wait(0.01)
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 5 and list((tmp_path / "eval").iterdir()) == []


@pytest.mark.slow
def test_two_at_once_train_as_one(home):  # noqa: F811
    """Started together, one trains and the other is refused; the log and the checkpoints are of one."""
    command = [sys.executable, "-m", "scripts.base_train", "--run=a", f"--data={home / 'text.jsonl'}", *SIZES]
    both = [
        subprocess.Popen(
            [*command, "--num-iterations=400", "--save-every=1"], cwd=ROOT, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, text=True, env=dict(os.environ, OMP_NUM_THREADS="1"),
        )
        for _ in range(2)
    ]  # fmt: skip
    ended = sorted((process.communicate()[1], process.returncode) for process in both)
    assert [code for _, code in ended] == [0, 2] and "is being written by base_train" in ended[1][0]
    assert checkpoint.latest(Run.open("a").stage("base")).finished
    assert lock_files(home) == []
