"""SIGKILL at any moment, saving by a thread: the same call again goes on by itself and ends with the same bits."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import killed
import pytest
import test_checkpoint
import tiny
import torch
from test_training import CHAT, SIZES, assert_same, home  # noqa: F401 (home is a fixture)

from nanochat import checkpoint
from nanochat.log import read_log
from nanochat.run import Run

# ---- of one save alone


def in_a_child_killed_at(number, folder, act):
    """Runs `act` in a forked process; False if it was killed at that file operation."""
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, -signal.SIGKILL)
        return code == 0
    try:
        killed.at_operation(number, os.path.realpath(folder))
        act()
        os._exit(0)
    finally:
        os._exit(1)


def every_gap(tmp_path, before, act):
    """Yields (number, folder, whether `act(folder)` came to its end) for a copy of `before` each."""
    for number in range(1, 1000):
        folder = tmp_path / "trial" / str(number)
        shutil.copytree(before, folder)
        ended = in_a_child_killed_at(number, folder, lambda folder=folder: act(folder))
        yield number, folder, ended
        if ended:
            assert number > 40
            return


META = dict(test_checkpoint.META, config=vars(tiny.model().config))


def parts(seed):
    return dict(model=dict(tiny.model(seed=seed).state_dict()), optimizer={}, loader=dict(lengths=torch.zeros(0)))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.slow  # of two alike the longer
def test_at_any_file_operation_of_the_last_save_a_complete_checkpoint_is_left(tmp_path):
    """Of a step that is there already, and mostly alone."""
    checkpoint.write(tmp_path / "before", dict(META, step=5), parts(0))
    last, new = dict(META, step=5, finished=True), parts(1)
    for number, folder, _ in every_gap(tmp_path, tmp_path / "before", lambda f: checkpoint.write(f, last, new)):
        left = checkpoint.latest(folder)
        assert left is not None and left.step == 5 and checkpoint.damage(left.folder) is None, number
        assert checkpoint.finished(folder) == left.finished
        manifest = json.loads((left.folder / "manifest.json").read_text())
        checkpoint.write(folder, dict(last, step=6), new)  # the next save finds its place for what was left
        assert names(folder) == ["step_000005", "step_000006"], number
        assert json.loads((folder / "step_000005" / "manifest.json").read_text()) == manifest, number
    assert left.finished  # the last trial came to its end


def test_at_any_file_operation_of_a_save_the_two_before_are_left_until_it_is_complete(tmp_path):
    for step in (1, 2):
        checkpoint.write(tmp_path / "before", dict(META, step=step), parts(step))
    new = parts(3)
    for number, folder, _ in every_gap(
        tmp_path, tmp_path / "before", lambda f: checkpoint.write(f, dict(META, step=3), new)
    ):
        left = checkpoint.latest(folder)
        assert left.step in (2, 3), number
        older = checkpoint.at(folder / f"step_{left.step - 1:06d}")
        checkpoint.settle(folder)
        assert checkpoint.latest(folder).step == left.step and checkpoint.damage(older.folder) is None, number


def test_at_any_file_operation_of_clearing_up_nothing_complete_is_lost(tmp_path):
    """Killed while it ends what a killed save has left: a complete temporary folder beside the one it replaces."""
    before = tmp_path / "before"
    checkpoint.write(before, dict(META, step=5), parts(0))
    (before / "step_000005").rename(before / "old")
    checkpoint.write(before, dict(META, step=5, finished=True), parts(1))
    (before / "step_000005").rename(before / ".tmp-step_000005-1")
    (before / "old").rename(before / "step_000005")
    (before / ".tmp-step_000004-1").mkdir()
    for number, folder, _ in every_gap(tmp_path, before, checkpoint.settle):
        assert checkpoint.latest(folder).finished, number
        checkpoint.settle(folder)
        assert names(folder) == ["step_000005"] and checkpoint.latest(folder).finished, number


SAVER = """
import sys; sys.path[:0] = [{root!r}, {tests!r}]
import test_checkpoint as t, pathlib, torch
torch.set_num_threads(1)
for step in range(1, 10**6):
    t.save(pathlib.Path(sys.argv[1]), step, seed=0)
    print(step, flush=True)
"""


@pytest.mark.slow
def test_killed_while_saving_fifty_times(tmp_path):
    """A process that saves again and again: what is left must always be complete."""
    tests = Path(__file__).parent
    code = SAVER.format(root=str(tests.parent), tests=str(tests))
    for trial in range(50):
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
        process.stdout.readline()  # it saves now
        time.sleep(0.002 * (trial % 10))
        process.send_signal(signal.SIGKILL)
        process.wait()
        found = checkpoint.latest(tmp_path)
        assert found is not None and checkpoint.damage(found.folder) is None
        json.loads((found.folder / "meta.json").read_text())


# ---- of training


@pytest.fixture
def scripts(tmp_path):
    scripts = killed.Scripts(tmp_path)
    scripts.ready()
    yield scripts
    scripts.close()


SCRIPTS = dict(base="base_train", mid="mid_train", sft="chat_sft")


def train(scripts, home, name, stage, *more, **when):  # noqa: F811
    data, flags = ("text.jsonl", SIZES) if stage == "base" else ("chat.jsonl", CHAT)
    return scripts.run(SCRIPTS[stage], f"--run={name}", f"--data={home / data}", *flags, *more, **when)


def stages_before(scripts, home, stage):  # noqa: F811
    """Run "a" trained up to a stage, and a copy of it for each trial."""
    for before in ("base", "mid", "sft"):
        if before == stage:
            break
        assert train(scripts, home, "a", before) == 0
    run = Run.open("a").folder
    shutil.copytree(run, home / "before")

    def again():
        shutil.rmtree(Run.open("b").folder)
        shutil.copytree(home / "before", Run.open("b").folder)

    return again


def one_row_each(stage):
    """Of the log of run "b"."""
    rows = read_log(Run.open("b").stage(stage) / "log.jsonl")
    steps = [row["step"] for row in rows if "loss" in row]
    return steps == list(range(1, len(steps) + 1))


def kill_at_random(scripts, home, stage, kills, *more):  # noqa: F811
    """Kills it so often, at moments drawn from the time that it takes; each time it ends before, it is compared."""
    again, draw = stages_before(scripts, home, stage), random.Random(0)
    again()
    began = time.monotonic()
    assert train(scripts, home, "a", stage, *more) == 0
    whole, done, ended = time.monotonic() - began, 0, 0
    while done < kills or not ended:
        code = train(scripts, home, "b", stage, *more, seconds=draw.uniform(0.1, 1) * whole if done < kills else 0.0)
        assert code in (0, -signal.SIGKILL), scripts.said.read_text()
        done += code != 0
        if code == 0:
            assert_same(stage)
            again()
            ended += 1
    assert done == kills


def test_killed_three_times(scripts, home):  # noqa: F811
    kill_at_random(scripts, home, "base", 3, "--save-every=1")


@pytest.mark.slow
@pytest.mark.parametrize("stage, kills", [("base", 80), ("mid", 60), ("sft", 60)])
def test_killed_two_hundred_times(scripts, home, stage, kills):  # noqa: F811
    kill_at_random(scripts, home, stage, kills, "--num-iterations=30", "--save-every=1")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["base", "mid", "sft"])
def test_killed_at_every_file_operation(scripts, home, stage):  # noqa: F811
    """Of training that saves four times: first, into its place, with one to remove, and over what is there."""
    flags = ("--num-iterations=3", "--save-every=1", "--eval-every=-1")
    again = stages_before(scripts, home, stage)
    assert train(scripts, home, "a", stage, *flags) == 0
    for number in range(1, 2000):
        again()
        folder = str(Run.open("b").stage(stage))
        code = train(scripts, home, "b", stage, *flags, operation=number, folder=folder)
        assert code in (0, -signal.SIGKILL), (number, scripts.said.read_text())
        if code == 0:
            break
        assert train(scripts, home, "b", stage, *flags) == 0, (number, scripts.said.read_text())
        assert_same(stage)
        assert one_row_each(stage)
    assert number > 200
