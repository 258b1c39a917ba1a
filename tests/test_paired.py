"""Runs side by side, and two models question by question: what is counted, refused, and printed."""

import json

import pytest
import tiny

from nanochat.evaluate.paired import adjusted
from nanochat.files import file_name


def result(outcomes, wanted="right", asked="same"):
    n, sign = len(outcomes), dict(right="r", refused="x")[wanted]
    rate = outcomes.count(sign) / n
    counts = dict(right=outcomes.count("r"), wrong=outcomes.count("w"), refused=outcomes.count("x"))
    return dict(
        wanted=wanted, rate=rate, low=0.0, high=1.0, n=n, counts=counts, examples={}, outcomes=outcomes, asked=asked
    )


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))

    def writer(where, stage="sft", more=None, **results):
        folder = tmp_path / where / "eval"
        folder.mkdir(parents=True)
        content = dict(chat={stage: results}, **(more or {}))
        (folder / "summary.json").write_text(json.dumps(content))

    return writer


def test_two_models_on_the_same_questions(write, tmp_path, capsys):
    write("runs/a", facts_taught=result("rrrrrrrwwx"), unknown_names=result("xxw", "refused"), add_tool=result("rw"))
    write(
        f"servers/{file_name('b/c')}",
        "server",
        facts_taught=result("rrwwwwwwww"),
        unknown_names=result("xwx", "refused"),
    )
    out = tmp_path / "out.json"
    assert tiny.call("compare", "--paired", "--runs=a,server:b/c", f"--write={out}") == 0
    said = capsys.readouterr().out
    assert "| facts_taught | 10 | 5 | 0 | +50.0%" in said and "| 0.0625 | 0.125 |" in said
    assert "| unknown_names | 3 | 1 | 1 | +0.0%" in said and "left out: add_tool: server:b/c has no result" in said
    tasks = json.loads(out.read_text())["tasks"]
    assert tasks["facts_taught"]["low"] < 0.5 < tasks["facts_taught"]["high"] and tasks["unknown_names"]["p"] == 1


def test_what_cannot_be_paired_says_why(write, capsys):
    old, foreign = result("rr"), result("rr")
    del old["outcomes"], old["asked"], foreign["asked"]
    write("runs/a", facts_taught=result("rr"), add_tool=result("rr"), choice=foreign, copy=result("r"))
    write("runs/b", facts_taught=result("rr", asked="others"), add_tool=old, choice=foreign, copy=result("w"))
    assert tiny.call("compare", "--paired", "--runs=a:sft,b") == 0
    said = capsys.readouterr().out
    assert "facts_taught: not the same questions (2 and 2)" in said and "add_tool: an older version" in said
    assert "choice: an older version" in said
    for runs, words in (
        ("a", "compares two"),
        ("a:mid,b", "'a:mid' has no results of chat tasks"),
        ("a,nobody", "'nobody' has no results"),
        ("a,server:gpt", "'server:gpt' has no results"),
        ("a,..", "wanted letters"),
    ):
        assert tiny.call("compare", "--paired", f"--runs={runs}") == 2
        assert words in capsys.readouterr().err
    write("runs/c", facts_taught=result("r", asked="x"))
    assert tiny.call("compare", "--paired", "--runs=a,c") == 2
    assert "no task with the same questions: facts_taught: not the same" in capsys.readouterr().err


def test_many_comparisons_are_corrected():
    assert adjusted(dict(a=0.01, b=0.04, c=0.03)) == pytest.approx(dict(a=0.03, b=0.06, c=0.06))
    assert adjusted(dict(a=0.5, b=0.9)) == dict(a=1.0, b=1.0)


def test_runs_side_by_side(write, tmp_path, capsys):
    core = dict(chatcore=dict(sft=dict(score=0.1, low=0.0, high=0.2, partial=True, missing=["mmlu"])))
    write("runs/one", facts_taught=result("rrrrrwwwwx"), more=core)
    write("runs/two", facts_taught=result("rrrrrrrwwx"), more=core)
    tiny.call("compare", "--runs=one,two", f"--write={tmp_path / 'out.json'}")
    said = capsys.readouterr().out
    assert "| facts_taught | 60.0% (50.0% to 70.0%); 0.0% to 100.0% |" in said  # two runs say nearly nothing
    assert "| ChatCORE, without mmlu | 0.1000 (0.1000 to 0.1000); 0.1000 to 0.1000 |" in said
    together = json.loads((tmp_path / "out.json").read_text())["together"]
    refused = together["sft"]["facts_taught refused"]
    assert refused == pytest.approx(dict(mean=0.1, low=0.1, high=0.1, mean_low=0.1, mean_high=0.1))
    half = 12.7062 * 0.141421 / 2**0.5  # t for one degree of freedom, the standard deviation of 0.5 and 0.7
    assert together["sft"]["facts_taught"]["mean_high"] == pytest.approx(0.6 + half, rel=1e-4)
    assert tiny.call("compare", "--runs=one") == 0
    assert "| facts_taught | 50.0% (50.0% to 50.0%) |" in capsys.readouterr().out
    assert tiny.call("compare", "--runs=one,nobody") == 2
    assert "nobody" in capsys.readouterr().err
    assert tiny.call("compare", "--runs=one,two,one") == 2  # would have an interval of no width
    assert "--runs names 'one' twice" in capsys.readouterr().err


def test_runs_with_nothing_in_common_are_refused(write, capsys):
    write("runs/a", add_tool=result("rw"))
    write("runs/b", "base", add_tool=result("rw"))
    assert tiny.call("compare", "--runs=a,b") == 2
    said = capsys.readouterr()
    words = "these runs have no result in common: a has add_tool of sft; b has add_tool of base; evaluate them alike"
    assert said.err == f"error: {words}\n" and not said.out
