"""benchmarks.neighbour: what is measured of whom, and what is left when it ends."""

import json
import re
import subprocess
import sys

import pytest
import tiny
import torch

from benchmarks import neighbour
from nanochat import host_memory, threads, turns
from nanochat.engine import weights


class Process:
    def communicate(self, timeout):
        ended.append(timeout)


ended = []


@pytest.mark.parametrize("processes", [2, 6])
def test_idle_and_beside_are_measured_in_turns(monkeypatch, processes):
    """A stand-in that makes 100 tokens a second, 40 while somebody computes beside it."""
    busy = lambda: any("while os.getppid" in " ".join(one.args) for one in started if one.poll() is None)
    started, plain = [], subprocess.Popen
    ended.clear()

    def start(*given, **named):
        started.append(plain(*given, **named))
        return started[-1]

    monkeypatch.setattr(neighbour.subprocess, "Popen", start)
    monkeypatch.setattr(neighbour, "worker", lambda *given: Process())
    monkeypatch.setattr(neighbour, "measure", lambda *given: dict(tok_per_s=40.0 if busy() else 100.0, about=""))
    rows = neighbour.rates(neighbour.Flags(rounds=3, processes=processes), "train", ["ours", "libraries"], {})
    assert [row["way"] for row in rows] == ["ours", "libraries"]
    assert all((row["idle"], row["beside"], row["share"]) == (100, 40, 0.4) for row in rows)
    assert (
        len(ended) == 2 * processes and len(started) == 6 * processes and all(one.poll() is not None for one in started)
    )


def test_a_busy_process_ends_with_who_was_killed():
    """Nobody else would end it. It holds the other end of our pipe for as long as it runs."""
    held = (
        "import subprocess, time; from benchmarks.neighbour import BUSY\n"
        "subprocess.Popen(BUSY); print(1, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", held], stdout=subprocess.PIPE, text=True)
    assert parent.stdout.readline() == "1\n"
    parent.kill()
    parent.communicate(timeout=30)


@pytest.mark.parametrize("way, wanted", neighbour.WAYS.items())
def test_a_worker_has_its_way_whatever_is_set_here(monkeypatch, way, wanted):
    names = ("GLIBC_TUNABLES", *threads.VARIABLES, *host_memory.VARIABLES)
    for name in names:
        monkeypatch.setenv(name, "1")
    seen = {}
    monkeypatch.setattr(turns, "Worker", lambda folder, words, env: seen.update(env))
    neighbour.worker("train", way, {})
    assert {name: seen[name] for name in names if name in seen} == wanted


def test_a_worker_gets_what_it_reads(monkeypatch, capsys):
    """The names that the workers' code takes from the settings, with values that they take."""
    given = {}
    monkeypatch.setattr(neighbour, "rates", lambda flags, what, ways, settings: given.update({what: settings}) or [])
    assert tiny.call_module("benchmarks.neighbour", "--width=128", "--depth=1", "--vocab-size=512") == 0
    assert set(given) == set(neighbour.WORKERS)
    for what, settings in given.items():
        text = (neighbour.HERE / neighbour.WORKERS[what]).read_text()
        assert set(re.findall(r'settings\["(\w+)"\]', text)) <= {*settings, "evaluate"}, what
    weights.check(given["decode"]["weights"], torch.device("cpu"))
    assert given["train"]["weights_file"].endswith(".safetensors")


WRONG = {"--what=dance": "--what names 'dance'", "--ways=fast": "--ways names 'fast'", "--width=100": "multiple of 128",
         "--rounds=0": "--rounds is 0", "--processes=3": "--processes is 3"}  # fmt: skip


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
