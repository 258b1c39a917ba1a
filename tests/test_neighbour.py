"""benchmarks.neighbour: what is measured of whom, and what is left when it ends."""

import json
import re
import subprocess
import sys
from contextlib import nullcontext

import pytest
import tiny
import torch

from benchmarks import neighbour
from nanochat import threads, turns
from nanochat.engine import weights


class Process:
    def communicate(self, timeout):
        ended.append(timeout)


ended = []


def test_idle_and_beside_are_measured_in_turns(monkeypatch):
    """A stand-in that makes 100 tokens a second, 40 while somebody computes beside it."""
    busy = lambda: any("while True" in " ".join(one.args) for one in started if one.poll() is None)
    started, plain = [], subprocess.Popen
    ended.clear()

    def start(*given, **named):
        started.append(plain(*given, **named))
        return started[-1]

    monkeypatch.setattr(neighbour.subprocess, "Popen", start)
    monkeypatch.setattr(neighbour, "worker", lambda *given: Process())
    monkeypatch.setattr(neighbour, "measure", lambda *given: dict(tok_per_s=40.0 if busy() else 100.0, about=""))
    rows = neighbour.rates(neighbour.Flags(rounds=3), "train", ["ours", "libraries"], {})
    assert [row["way"] for row in rows] == ["ours", "libraries"]
    assert all((row["idle"], row["beside"], row["share"]) == (100, 40, 0.4) for row in rows)
    assert len(ended) == 2 and len(started) == 6 and all(one.poll() is not None for one in started)


@pytest.mark.parametrize("way, wanted", [("ours", threads.BRIEFLY), ("libraries", {})])
def test_a_worker_has_its_way_whatever_is_set_here(monkeypatch, way, wanted):
    for name in threads.VARIABLES:
        monkeypatch.setenv(name, "1")
    seen = {}
    monkeypatch.setattr(turns, "Worker", lambda folder, words, env: seen.update(env))
    neighbour.worker("train", way, {})
    assert {name: seen[name] for name in threads.VARIABLES if name in seen} == wanted


def test_what_a_worker_is_told_is_what_it_reads(monkeypatch, capsys):
    """Each has weights: of a file that was drawn, and the kind that an engine computes with."""
    told = {}

    def start(folder, settings, program, environment):
        told[program.name] = settings
        return Process()

    monkeypatch.setattr(neighbour, "start", start)
    monkeypatch.setattr(neighbour, "measure", lambda *given: dict(tok_per_s=1.0, about=""))
    monkeypatch.setattr(neighbour, "neighbour", nullcontext)
    monkeypatch.setattr(neighbour, "drawn_weights", lambda *given: "a file")
    assert tiny.call_module("benchmarks.neighbour", "--rounds=1") == 0
    assert {*told} == {*neighbour.WORKERS.values()}
    for program, settings in told.items():
        weights.check(settings["weights"], torch.device("cpu"))
        text = (neighbour.HERE / program).read_text("utf-8")
        assert {*re.findall(r'settings\["(\w+)"\]', text)} <= {*settings}
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(result["rows"]) == 8 and result["machine"] and result["flags"]["rounds"] == 1


WRONG = {"--what=dance": "there is no dance", "--ways=fast": "there is no fast", "--width=100": "multiple of 128",
         "--rounds=0": "--rounds is 0"}  # fmt: skip


@pytest.mark.parametrize("words, said", WRONG.items())
def test_wrong_use_is_one_sentence(capsys, words, said):
    assert tiny.call_module("benchmarks.neighbour", words) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.mark.slow
def test_a_small_one_is_measured():
    small = "--depth=1 --width=128 --vocab-size=512 --sequence-len=64 --batch=2 --rounds=1 --no-compile"
    made = subprocess.run(
        [sys.executable, "-m", "benchmarks.neighbour", *small.split()], capture_output=True, text=True
    )
    rows = json.loads(made.stdout.splitlines()[-1])["rows"]
    assert [(row["what"], row["way"]) for row in rows] == [
        (what, way) for what in neighbour.WORKERS for way in ("ours", "libraries")
    ]
    assert all(row["idle"] > 0 and row["share"] > 0 for row in rows)
