"""The launcher of ranks: how it ends, what it hands on, and training under it that is told to stop."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import tiny
from test_training import ROOT, SIZES, home  # noqa: F401 (home is a fixture)

from nanochat import checkpoint, launch
from nanochat.log import read_log
from nanochat.run import Run

RANK = """
import os, pathlib, signal, sys, time
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
signals = []
signal.signal(signal.SIGINT, lambda *_: signals.append(1))

def wait():
    pathlib.Path(f"ready-{rank}").touch()
    while not signals:
        time.sleep(0.01)

"""


@pytest.fixture
def go(tmp_path, monkeypatch):
    """go(body, *signals): launches RANK and the body twice, from here; signals (number, pause after it) come when both
    ranks wait. Returns the exit code.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def run(body, *signals):
        (tmp_path / "rank.py").write_text(RANK + body)

        def send():
            while not all((tmp_path / f"ready-{rank}").exists() for rank in (0, 1)):
                time.sleep(0.01)
            for number, pause in signals:
                os.kill(os.getpid(), number)
                time.sleep(pause)

        if signals:
            threading.Thread(target=send, daemon=True).start()
        before = [signal.getsignal(number) for number in launch.SIGNALS]
        code = launch.launch("rank", [], 2)
        assert [signal.getsignal(number) for number in launch.SIGNALS] == before
        return code

    return run


@pytest.mark.parametrize(
    "body, code, words",
    [
        ("sys.exit(0)", 0, ""),
        ("sys.exit(2 if rank == 1 else 0)", 2, ""),
        ("sys.exit(75)", 75, ""),
        ("time.sleep(100 * (rank == 0)); raise ValueError('mine')", 1, "error: rank 1 of 2 ended with code 1"),
        ("os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else time.sleep(100)", 1, "rank 1 of 2 ended by SIGKILL"),
        ("sys.exit(75) if rank else (time.sleep(0.5), sys.exit(75))", 75, ""),  # is not hurried
        ("sys.exit(74) if rank == 0 else (time.sleep(0.5), sys.exit(2))", 2, ""),  # another has failed, and says why
        ("sys.exit(74) if rank == 0 else (time.sleep(0.5), sys.exit(3))", 1, "rank 1 of 2 ended with code 3"),
        ("sys.exit(74)", 1, ""),
    ],
)
def test_it_ends_as_its_ranks_end(go, capfd, body, code, words):
    assert go(body) == code
    error = capfd.readouterr().err
    assert words in error and bool(error) == bool(words)


def test_a_rank_that_hangs_when_another_failed_is_killed(go, capfd, monkeypatch):
    monkeypatch.setattr(launch, "TO_GIVE_UP", 0.5)
    assert go("signal.signal(signal.SIGTERM, signal.SIG_IGN)\nsys.exit(3) if rank else time.sleep(100)") == 1
    assert "rank 1 of 2 ended with code 3" in capfd.readouterr().err


def test_a_rank_that_does_not_stop_is_killed_in_the_end(go, capfd, monkeypatch):
    monkeypatch.setattr(launch, "TO_SAVE", 0.5)
    assert go("wait()\ntime.sleep(100)", (signal.SIGINT, 0)) == 1
    assert "rank 0 of 2 ended by SIGKILL, 0 s after it was told to stop" in capfd.readouterr().err


def test_signals_in_quick_succession_are_one_and_a_late_one_is_another(go, capfd, monkeypatch):
    monkeypatch.setattr(launch, "ONE_PRESS", 0.5)
    quick = [(number, 0.05) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    last = [(signal.SIGINT, 0.8), (signal.SIGINT, 0)]
    assert go("wait()\ntime.sleep(1.5)\nprint(len(signals))\nsys.exit(75)", *quick, *last) == 75
    said = capfd.readouterr()
    assert sorted(said.out.replace("\n", "")) == ["2", "2"] and not said.err  # two ranks print at the same time


def test_a_rank_that_dies_of_the_signal_was_told_so(go, capfd):
    assert go("signal.signal(signal.SIGINT, signal.SIG_DFL)\nwait()", (signal.SIGINT, 0)) == 75
    assert not capfd.readouterr().err


OUTLIVES = """
import os, pathlib, signal, time
from nanochat.flags import run_script

def main():
    signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path("told-" + os.environ["RANK"]).touch(), os._exit(0)))
    pathlib.Path("ready-" + os.environ["RANK"]).touch()
    time.sleep(100)

run_script(main)
"""


def wait_for(*paths, seconds=60):
    ends = time.monotonic() + seconds
    while not all(path.exists() for path in paths):
        assert time.monotonic() < ends, paths
        time.sleep(0.02)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has ended")
def test_ranks_are_told_to_stop_when_their_launcher_was_killed(tmp_path):
    (tmp_path / "rank.py").write_text(OUTLIVES)
    command = [sys.executable, "-m", "scripts.launch", "--gpus", "2", "rank"]
    process = subprocess.Popen(command, cwd=tmp_path, env=dict(os.environ, PYTHONPATH=f"{tmp_path}:{ROOT}"))
    wait_for(tmp_path / "ready-0", tmp_path / "ready-1")
    process.kill()
    process.wait()
    wait_for(tmp_path / "told-0", tmp_path / "told-1")


def told_thrice(process, folder, kill, number):
    """Once five steps are logged, sends the signal three times within a second; returns what the process said."""
    while len(read_log(folder / "log.jsonl")) < 5:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    for _ in range(3):
        kill(process.pid, number)
        time.sleep(0.3)
    return process.communicate(timeout=120)


SLOW = """
import time
from nanochat import trainer
from nanochat.flags import run_script
from scripts import base_train

step = trainer.step

def slowly(*args):
    time.sleep(0.5)
    return step(*args)

trainer.step = slowly
run_script(base_train.main)
"""


def training(home, tmp_path, seconds):  # noqa: F811
    """Two ranks whose steps take so long, as a process, and the stage's folder."""
    (tmp_path / "slow.py").write_text(SLOW.replace("0.5", str(seconds)))
    command = [sys.executable, "-m", "scripts.launch", "--gpus", "2", "slow", "--"]
    process = subprocess.Popen(
        [*command, "--run=b", f"--data={home / 'text.jsonl'}", *SIZES, "--num-iterations=100000", "--device-type=cpu"],
        cwd=ROOT,
        env=dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=f"{tmp_path}:{ROOT}"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    return process, Run.open("b").stage("base")


def wait_for_steps(process, folder):
    """Until two are logged: after the first, Python collects garbage, deaf to signals."""
    while len(read_log(folder / "log.jsonl")) < 2:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)


ALONE = [pytest.param(number, False, marks=pytest.mark.slow) for number in launch.SIGNALS]


@pytest.mark.parametrize(
    "number, whole_group",
    [(signal.SIGINT, True), *ALONE],
)
def test_training_that_is_told_to_stop_saves_on_all_ranks(home, tmp_path, number, whole_group):  # noqa: F811
    """By Ctrl-C, which goes to the whole process group, or by somebody who signals the launcher; thrice in a step."""
    process, folder = training(home, tmp_path, 0.5)
    wait_for_steps(process, folder)
    for _ in range(3):
        (os.killpg if whole_group else os.kill)(process.pid, number)
        time.sleep(0.1)
    said, error = process.communicate(timeout=120)
    assert process.returncode == 75, error
    assert "Traceback" not in error and "error:" not in error
    assert error.count("The same command again goes on") == 1  # not once a rank
    assert ": stopped at step" in said and checkpoint.latest(folder).step > 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has ended")
def test_training_saves_when_its_launcher_was_killed(home, tmp_path):  # noqa: F811
    process, folder = training(home, tmp_path, 0.5)
    wait_for_steps(process, folder)
    process.kill()
    said, error = process.communicate(timeout=120)  # until the last rank has closed its streams
    assert ": stopped at step" in said and "saved" in said and "Traceback" not in error, error
    assert checkpoint.latest(folder).step == read_log(folder / "log.jsonl")[-1]["step"]


@pytest.mark.slow
def test_told_to_stop_before_the_first_step_is_done_they_end_at_once(home, tmp_path):  # noqa: F811
    process, folder = training(home, tmp_path, 60)
    while not (folder / "log.jsonl").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)
    error = process.communicate(timeout=50)[1]
    assert process.returncode == 75 and "Traceback" not in error and "error:" not in error, error
    assert error.count("nothing to save") == 1 and checkpoint.latest(folder) is None


def test_wrong_use_of_the_script(capsys):
    assert tiny.call("launch", "--gpus=0", "scripts.base_train") == 2
    assert "--gpus is 0" in capsys.readouterr().err
    assert tiny.call("launch", "scripts.base_train") == 2
