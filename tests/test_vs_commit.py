"""benchmarks.vs_commit: both in turns, ratios of neighbours in time; the last commit beside itself; wrong use."""

import json
import shutil
from pathlib import Path

import pytest
import tiny

from benchmarks import vs_commit

ROOT = Path(__file__).parent.parent
SMALL = "--depth=2 --width=128 --vocab-size=256 --sequence-len=64 --batch=2 --rounds=2 --no-compile".split()


class Process:
    def __init__(self, folder):
        self.folder, self.turn = folder, 0

    def communicate(self, timeout):
        ended.append(self.folder)


ended = []


def test_a_ratio_is_of_neighbours_in_time(monkeypatch):
    """Stand-ins on a machine that doubles its speed half way, and on which who was started first is 20% slower; ours is
    10% faster, and has another loss once.
    """
    order, started = [], []

    def measure(worker, count):
        order.append(worker.folder)
        worker.turn += 1
        speed = 100.0 if worker.turn <= 6 else 200.0
        ours = worker.folder == "ours"
        speed *= 0.8 if worker is started[0] else 1.2 if worker is started[3] else 1.0
        return dict(tok_per_s=speed * (1.1 if ours else 1.0), losses=[0.5 if ours and worker.turn == 5 else 1.0])

    monkeypatch.setattr(vs_commit, "start", lambda folder, *given: started.append(Process(folder)) or started[-1])
    monkeypatch.setattr(vs_commit, "measure", measure)
    ended.clear()
    row = vs_commit.side_by_side(vs_commit.Flags(rounds=6), "train", ["ours", "before"], {})
    assert row["ratio"] == pytest.approx(1.1) and row["low"] == pytest.approx(row["high"])
    assert row["same_losses"] is False and ended == ["ours", "before", "before", "ours"]
    assert row["apart"] == pytest.approx(0.5)
    assert order[:4] == ["ours", "before", "before", "ours"] and len(order) == 4 * (vs_commit.WARM + 6)


WRONG = {
    "--commit=no-such": "--commit is 'no-such': ",
    "--what=dance": "names 'dance'",
    "--width=100": "multiple",
}


@pytest.mark.parametrize("words, said", WRONG.items())
def test_wrong_use_is_one_sentence(capsys, words, said):
    if "commit" in words and not shutil.which("git"):
        said = "git is not installed"
    assert tiny.call_module("benchmarks.vs_commit", words) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.mark.slow
def test_the_last_commit_beside_itself(capsys):
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("needs git and a clone")
    assert tiny.call_module("benchmarks.vs_commit", *SMALL, "--what=train,evaluate") == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [(row["what"], row["same_losses"]) for row in rows] == [("train", True), ("evaluate", True)]
    assert all(row["low"] <= row["ratio"] <= row["high"] for row in rows)
