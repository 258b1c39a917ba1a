import json

import pytest
import tiny

SMALL = "--depth=2 --width=128 --vocab-size=256 --sequence-len=64 --batch-sizes=1,3 --new-tokens=6 --repeats=2".split()


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_it_measures_and_ends_with_json(compiled, monkeypatch, capsys):
    if not compiled:
        monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    assert tiny.call("infer_bench", *SMALL, "--dtype=float32") == 0
    lines = capsys.readouterr().out.strip().split("\n")
    assert len(lines) == 3 and "first token" in lines[0]
    rows = json.loads(lines[-1])["rows"]
    assert all(("compiled" in row["about"]) == compiled for row in rows)
    assert all(0 < row["bandwidth_use"] < 10 and 0 < row["flop_use"] < 1.5 for row in rows)
    assert [row["batch"] for row in rows] == [1, 3] and all(row["tok_per_s"] > 0 for row in rows)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--batch-sizes=1,x"], "--batch-sizes is"),
        (["--batch-sizes=0"], "at least 1"),
        (["--width=100"], "multiple of 128"),
        (["--new-tokens=5000"], "must fit --sequence-len"),
        (["--dtype=int8"], "wanted float32 or bfloat16"),
        (["--upstream=/nowhere"], "there is no nanochat/engine.py"),
    ],
)
def test_wrong_use_is_one_sentence(capsys, flags, words):
    assert tiny.call("infer_bench", *flags) == 2
    assert words in capsys.readouterr().err
