import json
import os
import subprocess
import sys

import pytest
import tiny
from test_training import ROOT

from nanochat import turns
from profiling.recorded import diff
from scripts import infer_bench

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


@pytest.mark.slow
def test_it_records_each_batch_after_it_is_measured(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    assert tiny.call("infer_bench", *SMALL, "--repeats=1", "--dtype=float32", "--profile=2") == 0
    lines = capsys.readouterr().out.strip().split("\n")
    assert ["first token" in line for line in lines] == [True, False, True, False, False]
    for batch, line in zip((1, 3), lines[1::2]):
        folder = tmp_path / "infer_bench" / f"batch-{batch}" / "profile"
        assert line.startswith(f"infer_bench, batch {batch}: 2 steps recorded: {folder / 'profile.html'}")
        found = diff.load(folder / "profile.json")
        assert len(found.step_ns) == 2 and found.meta["tokens_per_step"] == batch
        assert found.meta["decoding"]["prompt_tokens"] == 0 and "prefill" not in found.phase_ns
    assert len(json.loads(lines[-1])["rows"]) == 2


@pytest.mark.slow
def test_int8_and_the_compute_dtype_take_turns(monkeypatch, capsys):
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    assert tiny.call("infer_bench", *SMALL, "--batch-sizes=3", "--repeats=1", "--weights=int8") == 0
    lines = capsys.readouterr().out.strip().split("\n")
    rows = json.loads(lines[-1])["rows"]
    assert [row["engine"] for row in rows] == ["ours", "int8"] and "ours / int8:" in lines[2]
    assert "int8" not in rows[0]["about"] and "int8 weights" in rows[1]["about"] and rows[0]["weight_bytes"] > 1


@pytest.mark.slow
def test_a_recording_that_fails_costs_no_result(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "file"))  # as a folder that nobody may write
    assert tiny.call("infer_bench", *SMALL, "--repeats=1", "--dtype=float32", "--profile=2") == 0
    lines = capsys.readouterr().out.strip().split("\n")
    for batch, line in zip((1, 3), lines[1::2]):
        assert line.startswith(f"infer_bench, batch {batch}: not recorded: ") and "Not a directory" in line
    assert len(json.loads(lines[-1])["rows"]) == 2


def test_a_process_that_dies_while_recording_costs_no_result(monkeypatch, capsys, tmp_path):
    """It answers what is measured, and ends when told to record."""
    answer = dict(first_ms=1.0, tok_per_s=1.0, token_ms=1.0, peak_mb=1.0, weight_bytes=4, about="cpu, float32")
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import sys\nfor line in sys.stdin:\n    if int(line) < 0: sys.exit(7)\n"
        f"    print({json.dumps(answer)!r}, flush=True)"
    )
    monkeypatch.setattr(infer_bench, "WORKER", worker)
    monkeypatch.setattr(turns, "PAUSE", 0)
    flags = infer_bench.Flags(batch_sizes="1,3", width=128, depth=1, vocab_size=256, new_tokens=6, repeats=1, profile=2)
    assert len(infer_bench.run(flags)["rows"]) == 2
    said = capsys.readouterr().out.split("\n")
    assert "infer_bench, batch 1: not recorded: the process that runs" in said[1] and "ended (7)" in said[1]
    assert "infer_bench, batch 3: not recorded" in said[3]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--batch-sizes=1,x"], "--batch-sizes is"),
        (["--batch-sizes=0"], "wanted each of 1 to 4096"),
        (["--width=100"], "multiple of 128"),
        (["--new-tokens=5000"], "must fit --sequence-len"),
        (["--dtype=int8"], "wanted float32 or bfloat16"),
        (["--upstream=/nowhere"], "there is no nanochat/engine.py"),
        (["--new-tokens=6", "--profile=3"], "--profile 3 needs 7 steps, the first 4 to get warm, and a run here has 6"),
        (["--profile=-1"], "--profile is -1"),
    ],
)
def test_wrong_use_is_one_sentence(capsys, flags, words):
    assert tiny.call("infer_bench", *flags) == 2
    assert words in capsys.readouterr().err


def test_what_a_worker_said_of_its_end_is_said():
    worker = turns.start(str(ROOT), dict(no="flags"), infer_bench.WORKER)
    with pytest.raises(turns.UserError, match=r"ended \(1\); .*Error"):
        turns.measure(worker, 1)


def test_a_process_is_not_charged_with_the_memory_of_the_one_that_started_it():
    """As getrusage would: here more than 2 GB. Where it sees no card, of whose memory it would tell."""
    program = "import sys; sys.path.insert(0, 'benchmarks'); import worker; print(worker.peak())"
    whoever = f"import subprocess, sys; held = bytearray(2 << 30); subprocess.run([sys.executable, '-c', {program!r}])"
    found = subprocess.run(
        [sys.executable, "-c", whoever], cwd=ROOT, capture_output=True, text=True, check=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert 50 << 20 < int(found.stdout) < 1 << 30
