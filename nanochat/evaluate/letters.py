"""Letter bias: what a model answers because of the letter and not of what it stands for.

`shifted` asks a multiple-choice question with its options moved on, so that over all shifts each option has had each
letter once; a model that reads the options gives the same one each time. `shares` and `over_shifts` count it.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from nanochat.evaluate.intervals import clustered
from nanochat.tasks import Question


def options(question: Question) -> tuple[int, int, list[str]]:
    """(where the list of options begins, where it ends, the options) in the last message's text, whose lines are
    "- option=letter". An option may have lines of its own. Raises ValueError where there is no such list.
    """
    text = question.messages[-1]["content"]
    first = text.find(f"={question.letters[0]}\n")
    begin = text.rfind("\n- ", 0, first) + 1 if first >= 0 else 0
    if not begin:
        raise ValueError(f'{text[:60]!r} has no list of options, lines of "- option=letter"')
    at, found = begin, []
    for letter in question.letters:
        end = text.find(f"={letter}\n", at)
        if end < 0 or not text.startswith("- ", at):
            raise ValueError(f'{text[:60]!r} has no line "- option={letter}" in its list of options')
        found.append(text[at + 2 : end])
        at = end + len(letter) + 2
    return begin, at, found


def shifted(question: Question, by: int) -> Question:
    """The same question with every option so many letters further on, around the end. Raises ValueError: `options`."""
    begin, end, found = options(question)
    n, text = len(found), question.messages[-1]["content"]
    moved = [found[(i - by) % n] for i in range(n)]
    lines = "".join(f"- {option}={letter}\n" for option, letter in zip(moved, question.letters))
    last = dict(question.messages[-1], content=text[:begin] + lines + text[end:])
    right = question.letters[(question.letters.index(question.expected) + by) % n]
    return replace(question, messages=[*question.messages[:-1], last], expected=right)


def shares(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By letter, {"expected": how often it was the right one, "chosen": how often it was the answer}, of rows that have
    "expected" and "answer".
    """
    letters = sorted({row["expected"] for row in rows} | {row["answer"] for row in rows})
    share = lambda key, letter: sum(row[key] == letter for row in rows) / len(rows)
    return {letter: dict(expected=share("expected", letter), chosen=share("answer", letter)) for letter in letters}


def over_shifts(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of questions that were asked with every shift. Each row has "letters" in order, "expected", and "shifts": the
    answer under each shift (of the question as it stands first).

    rate: right answers over all shifts, (low, high) its 95% interval over the questions; by_position: the rate where
    the right answer had this letter; steady: of how many questions the same option was chosen under every shift;
    letters: as `shares`, over all shifts.
    """
    asked = []  # a row for each question and shift
    steady = 0
    rates = []
    for row in rows:
        letters = row["letters"]
        place = {letter: i for i, letter in enumerate(letters)}
        right = [letters[(place[row["expected"]] + by) % len(letters)] for by in range(len(letters))]
        asked += [dict(expected=want, answer=got) for want, got in zip(right, row["shifts"])]
        steady += len({(place[got] - by) % len(letters) for by, got in enumerate(row["shifts"])}) == 1
        rates.append(sum(want == got for want, got in zip(right, row["shifts"])) / len(letters))
    rate, low, high = clustered(rates, min(len(row["letters"]) for row in rows))
    by_position = {}
    for letter in sorted({row["expected"] for row in asked}):
        there = [row for row in asked if row["expected"] == letter]
        by_position[letter] = sum(row["answer"] == letter for row in there) / len(there)
    return dict(
        n=len(rows), rate=rate, low=low, high=high, by_position=by_position,
        steady=steady / len(rows), letters=shares(asked),
    )  # fmt: skip
