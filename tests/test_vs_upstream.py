"""benchmarks.vs_upstream: ours against ours standing in for a clone is a tie in loss; wrong use is one sentence."""

import json
from pathlib import Path

import pytest
import tiny

from benchmarks import vs_upstream

SMALL = "--depth=2 --width=128 --vocab-size=256 --sequence-len=64 --batch=2 --steps=4 --no-compile --what=train".split()


@pytest.mark.slow
def test_training_is_measured_in_turns(capsys):
    assert tiny.call_module("benchmarks.vs_upstream", *SMALL, f"--upstream={Path(__file__).parent.parent}") == 0
    said = json.loads(capsys.readouterr().out.strip().split("\n")[-1])
    ours, default = said["train"][:2]
    assert ours["losses"] == default["losses"] and len(ours["losses"]) == vs_upstream.WARM + 4
    assert ours["losses"][-1] < ours["losses"][0]
    assert said["ratios"][0]["loss"] == 1


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--upstream=/nowhere"], "there is no nanochat/gpt.py in it"),
        (["--upstream=.", "--what=dance"], "--what names 'dance'; there are train, decode"),
        (["--upstream=.", "--width=100"], "multiple of 128"),
    ],
)
def test_wrong_use_is_one_sentence(capsys, monkeypatch, flags, words):
    monkeypatch.chdir(Path(__file__).parent.parent)
    assert tiny.call_module("benchmarks.vs_upstream", *flags) == 2
    assert words in capsys.readouterr().err
