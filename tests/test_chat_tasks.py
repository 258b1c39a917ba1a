"""Tasks asked and graded: what is kept of them, failures of one, ranks, and a server's answers, through the script."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace

import pytest
import tiny
from test_training import ROOT, home, train  # noqa: F401 (home is a fixture)

from nanochat import records
from nanochat.errors import UserError
from nanochat.evaluate.chat_tasks import TaskResult, chosen, evaluate, fingerprint
from nanochat.hardware import setup
from nanochat.run import Run
from nanochat.tasks import CHATCORE, MICROWORLD, TASKS, Question, Task
from nanochat.tasks.task import ask

TASK = Task("fixture", "", lambda: [Question(ask(f"question {i}"), str(i), id="named" * (i == 2)) for i in range(9)])


def rows(task, questions):
    return [
        dict(
            index=i,
            question="",
            expected=q.expected,
            answer="",
            python=[],
            outcome=("right", "wrong")[i % 2],
            cropped=0,
        )
        for i, q in questions
    ]


def test_the_questions_are_asked_in_order_and_named():
    result = evaluate(TASK, 5, rows, setup("cpu"))
    assert result.n == 5 and result.kind == "generative" and result.counts == dict(right=3, wrong=2, refused=0)
    assert [row["id"] for row in result.rows] == ["fixture/0", "fixture/1", "named", "fixture/3", "fixture/4"]
    numbers = result.numbers()
    assert numbers["outcomes"] == "rwrwr" and numbers["rate"] == 0.6 and numbers["low"] < 0.6 < numbers["high"]
    assert "pass" not in numbers and "letters" not in numbers and [row["index"] for row in result.failures] == [1, 3]
    assert evaluate(TASK, 0, rows, setup("cpu")).n == 9
    with pytest.raises(UserError, match="no questions"):
        evaluate(replace(TASK, all_questions=list), 5, rows, setup("cpu"))


@pytest.mark.parametrize("rank, places", [(0, [0, 2, 4]), (1, [1, 3])])
def test_ranks_share_the_questions_by_place(rank, places):
    asked = []
    with pytest.raises(ValueError, match="process group"):  # the gathering, which this test has none for
        hardware = replace(setup("cpu"), rank=rank, world=2)
        evaluate(TASK, 5, lambda task, questions: asked.extend(questions) or [], hardware)
    assert [place for place, _ in asked] == places


def test_a_fingerprint_is_of_what_is_asked():
    questions = TASK.all_questions()
    prints = {fingerprint(questions), fingerprint(questions[:-1]), fingerprint(questions[::-1])}
    prints |= {fingerprint([replace(questions[0], expected="x"), *questions[1:]])}
    assert len(prints) == 4 and fingerprint(TASK.all_questions()) in prints


def test_pass_at_k_over_the_questions():
    samples = [["right"] * 4, ["wrong"] * 4, ["right", "wrong", "wrong", "wrong"]]
    found = TaskResult(
        TASK, "generative", "", [dict(outcome=s[0], samples=s, cropped=False) for s in samples]
    ).numbers()
    rates = {k: round(v["rate"], 6) for k, v in found["pass"].items()}
    assert rates == {"1": round(1.25 / 3, 6), "2": 0.5, "4": round(2 / 3, 6)}
    assert 0 < found["pass"]["1"]["low"] < 0.2 and 0.7 < found["pass"]["1"]["high"] < 1


def test_which_tasks_are_chosen():
    assert chosen("", "microworld conversations (sft)") == (list(MICROWORLD), False)
    assert chosen("all", "") == (list(TASKS), False) and chosen("choice,add_tool", "") == (["choice", "add_tool"], True)
    there = [name for name in TASKS if name in CHATCORE]
    if there:
        assert chosen("", "SmolTalk and more") == (there, False)
    else:
        with pytest.raises(UserError, match="no task is chosen"):
            chosen("", "SmolTalk and more")
    with pytest.raises(UserError, match="'nonsense'"):
        chosen("choice,nonsense", "")


# ---- through the script


SHORT = ("-x", "6", "-b", "4", "-m", "3")


@pytest.fixture
def trained(home):  # noqa: F811
    assert train(home, "a") == 0
    return home


def evaluated(*flags):
    code = tiny.call("chat_eval", "--run=a", "--source=base", *SHORT, *flags)
    return code, (Run.open("a").summary("eval") or {}).get("chat", {}).get("base", {})


def test_a_failing_task_leaves_the_others(trained, capsys, monkeypatch):
    def missing():
        raise UserError("the data set is not there; put it there")

    monkeypatch.setitem(TASKS, "gone", Task("gone", "", missing))
    monkeypatch.setitem(
        TASKS, "broken", Task("broken", "", lambda: [Question(ask("x"), "x")], is_right=lambda q, a: 1 / 0)
    )
    code, found = evaluated("-a", "gone,choice,broken,add_tool")
    said = capsys.readouterr()
    assert code == 1 and set(found) == {"choice", "add_tool"}
    assert "gone: no result, the other tasks go on: the data set is not there" in said.err
    assert "broken: no result, the other tasks go on: division by zero" in said.err and "1 / 0" in said.err
    monkeypatch.setattr("nanochat.evaluate.chat_tasks.MICROWORLD", ("gone", "choice"))
    monkeypatch.setattr("nanochat.evaluate.chat_tasks.CHATCORE", ("gone", "choice"))
    code, found = evaluated()
    assert code == 0 and "gone: no result" in capsys.readouterr().err, "what nobody asked for by name is only reported"
    assert evaluated("-a", "gone")[0] == 1 == evaluated("-a", "gone,choice")[0]


def test_multiple_choice_and_writing_and_their_failures(trained, capsys, monkeypatch):
    code, found = evaluated("-a", "choice,add_tool", "--permute", "-n", "2", "-t", "1")
    assert code == 0 and found["choice"]["kind"] == "categorical" and found["add_tool"]["kind"] == "generative"
    permuted = found["choice"]["permuted"]
    assert permuted["n"] == 6 and {v["expected"] for v in permuted["letters"].values()} == {0.25}
    assert sum(v["chosen"] for v in found["choice"]["letters"].values()) == pytest.approx(1)
    assert set(found["add_tool"]["pass"]) == {"1", "2"} and found["choice"]["chance"] == 0.25
    file = Run.open("a").stage("eval") / "base_failures.jsonl"
    kept = records.rows(file, "")
    wrong = [
        f"{name}/{i}" for name, result in found.items() for i, sign in enumerate(result["outcomes"]) if sign != "r"
    ]
    assert [row["id"] for row in kept] == wrong and {row["task"] for row in kept} <= {"choice", "add_tool"}
    capsys.readouterr()
    assert tiny.call("chat_eval", "--run=a", "--source=base", "--view", "-a", "add_tool") == 0
    out = capsys.readouterr().out
    assert out.count("── ") == sum(row["task"] == "add_tool" for row in kept) and "choice/" not in out
    assert evaluated("-n", "2")[0] == 2 and "--temperature" in capsys.readouterr().err


def test_wrong_use_is_one_sentence(trained, capsys):
    for flags, said in (
        (["-t", "-1"], "wanted 0 to 2"),
        (["-t", "nan"], "wanted 0 to 2"),
        (["-t", "1", "-k", "-4"], "--top-k"),
        (["-x", "-3"], "--max-problems"),
        (["-m", "-5"], "--max-new-tokens"),
        (["-b", "0"], "--batch-size is 0, wanted 1 to 4096"),
        (["-n", "0"], "--num-samples is 0, wanted 1 to 10000"),
        (["--view"], "nothing of mid of 'a' has been evaluated yet"),
        (["--server=http://127.0.0.1:9", "--model=x", "--python-tool"], "--python-tool is for a run's model"),
    ):
        assert tiny.call("chat_eval", "--run=a", "--source=mid", *flags) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


def test_two_ranks_get_what_one_gets(trained):
    flags = ("-a", "choice,add_tool,unknown_names", "-n", "2", "-t", "0.8", "--seed=5")
    code, alone = evaluated(*flags)
    file = Run.open("a").stage("eval") / "base_failures.jsonl"
    rows = file.read_text()
    file.unlink()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    where = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), WORLD_SIZE="2", MASTER_PORT=str(port))
    command = [sys.executable, "-m", "scripts.chat_eval", "--run=a", "--source=base", *SHORT, *flags]
    ranks = [
        subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=dict(where, RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", CUDA_VISIBLE_DEVICES=""),
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=120) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], said
    assert code == 0 and said[1][0] == "", "only the first rank speaks"
    together = Run.open("a").summary("eval")["chat"]["base"]
    strip = lambda found: json.loads(json.dumps({name: {**one, "examples": {}} for name, one in found.items()}))
    assert strip(together) == strip(alone)
    assert [row["id"] for row in map(json.loads, file.read_text().splitlines())] == [
        row["id"] for row in map(json.loads, rows.splitlines())
    ]
