"""Paging through failing examples: keys, filter, ends, and what a terminal must not obey."""

import subprocess
import sys

from conftest import ROOT

from nanochat.evaluate.view import HELP, page, shown

ROWS = [
    dict(
        task=task,
        id=f"{task}/{i}",
        question=f"question {i} of {task}",
        expected="x",
        answer="",
        outcome="wrong",
        python=[],
    )
    for task in ("one", "two")
    for i in range(3)
]


def session(*typed):
    said, words = [], iter(typed)

    def ask(prompt):
        word = next(words, None)
        if word is None:
            raise EOFError
        return word

    page(ROWS, ask, said.append)
    return said


def places(said):
    return [
        line.split("·")[0].split("──")[1].strip() + " " + line.split("·")[2].strip() for line in said if "──" in line
    ]


def test_next_previous_number_and_quit():
    said = session("", "n", "p", "5", "q", "n")
    assert places(said) == ["1 of 6 one/0", "2 of 6 one/1", "3 of 6 one/2", "2 of 6 one/1", "5 of 6 two/1"]


def test_a_filter_and_its_end():
    said = session("t two", "n", "t", "t three", "n")
    assert places(said) == ["1 of 6 one/0", "1 of 3 two/0", "2 of 3 two/1", "1 of 6 one/0", "2 of 6 one/1"]
    assert "no failing examples of 'three'; the tasks are one, two" in said


def test_beyond_the_ends_and_nonsense_say_what_there_is():
    said = session("p", "7", "0", "hm", "²", "9" * 5000, "t two", "3", "n")
    assert sum(line.startswith("there are 6") for line in said) == 3 and said.count(HELP) == 4
    assert said[-1].startswith("there are 3") and places(said)[-1] == "3 of 3 two/2"


def test_without_a_terminal_all_are_printed():
    said = []
    page(ROWS, None, said.append)
    assert len(said) == 6 and "question 2 of two" in said[-1] and "(nothing)" in said[-1]
    page([], None, said.append)
    assert said[-1] == "no failing examples"


def test_a_reader_that_has_seen_enough_is_no_error():
    script = "from nanochat.evaluate.view import page; from nanochat.flags import run_script; "
    program = f"{script}run_script(lambda: page({ROWS!r} * 5000, None), goes_on=True)"  # as scripts.chat_eval is
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=-1, stderr=-1) as process:
        assert process.stdout.readline().startswith("── 1 of 30000".encode())
        process.stdout.close()
        assert process.wait() == 0 and process.stderr.read() == b""


def test_what_is_shown_is_wrapped_and_harmless():
    row = dict(ROWS[0], question="a\x1b[2Jb\n\n" + "long " * 60, answer="\u202eevil", python=["1 + 1"])
    text = shown(dict(row, letters=["A", "B"], probabilities=[0.25, 0.75]), 0, 1, width=60)
    assert "\x1b" not in text and "\u202e" not in text and "a·[2Jb" in text
    assert max(map(len, text.split("\n"))) <= 60 and "A 25.0%  B 75.0%" in text and "  1 + 1" in text
