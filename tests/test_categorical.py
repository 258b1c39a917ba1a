"""Multiple choice by the letters' logits: equal to one plain forward a question, whatever is batched with it."""

import pytest
import tiny
import torch

from nanochat.evaluate import categorical, letters
from nanochat.tasks import Question, Task
from nanochat.tasks.task import ask, is_only

TOKENIZER = tiny.tokenizer()
FOUR = tuple("ABCD")


def choice(text, options, right, letters=FOUR):
    lines = "".join(f"- {option}={letter}\n" for option, letter in zip(options, letters))
    return Question(ask(f"{text}\n{lines}Answer with the letter."), right, letters=letters)


def questions(count=23):
    """Of many lengths, some with few letters, some too long for the model."""
    words = tiny.sentences(200, 3)
    made = []
    for i in range(count):
        n = 2 + i % 3
        made.append(choice(words[i][: 5 * (i % 7)], [w[:6] for w in words[9 * i : 9 * i + n]], FOUR[i % n], FOUR[:n]))
    return [*made, choice(" ".join(words[:20]), "wxyz", "C")]


TASK = Task("fixture", "", questions, is_right=is_only, chance=0.25)


def plain(model, question):
    """All logits at the last position, of this question alone, and of these the letters'."""
    context = model.config.sequence_len
    ids = TOKENIZER.render_for_completion(question.messages)
    if len(ids) >= context:
        ids = [ids[0], *ids[-(context * 3 // 4) :]]
    logits = model(torch.tensor([ids]))[0, -1]
    return logits[[TOKENIZER.encode(letter)[0] for letter in question.letters]]


@torch.inference_mode()
@pytest.mark.parametrize("tokens", [1, 300, 8192])
def test_batched_letters_are_those_of_one_plain_forward_each(monkeypatch, tokens):
    model = tiny.model(sequence_len=128).eval()
    monkeypatch.setattr(categorical.batches, "__defaults__", (tokens,))
    found, cropped = categorical.letter_logits(model, TOKENIZER, questions())
    margins = []
    for question, logits in zip(questions(), found):
        capped = model.config.softcap * torch.tanh(logits / model.config.softcap)
        wanted = plain(model, question)
        torch.testing.assert_close(capped, wanted, rtol=1e-4, atol=1e-5)
        best = wanted.sort(descending=True).values
        margins.append(best[0] - best[1])
        assert capped.argmax() == wanted.argmax() or margins[-1] < 1e-4
    assert max(margins) > 0.01 and cropped == [False] * 23 + [True]


def test_the_rows_and_the_ticks():
    model = tiny.model(sequence_len=128).eval()
    ticks = []
    rows = categorical.answered(model, TOKENIZER, TASK, list(enumerate(questions()))[1::2], tick=ticks.append)
    assert [row["index"] for row in rows] == list(range(1, 24, 2)) and sum(ticks) == len(rows)
    for row in rows:
        assert row["answer"] == row["letters"][row["probabilities"].index(max(row["probabilities"]))]
        assert (row["outcome"] == "right") == (row["answer"] == row["expected"])
        assert sum(row["probabilities"]) == pytest.approx(1, abs=1e-3)
    assert {row["outcome"] for row in rows} == {"right", "wrong"} and rows[-1]["cropped"]


def test_batches_are_bounded_and_lose_nothing():
    lengths = [7, 100, 3, 50, 50, 1, 8, 20]
    groups = categorical.batches(lengths, 100)
    assert sorted(i for group in groups for i in group) == list(range(8))
    assert all(len(group) * max(lengths[i] for i in group) <= 100 for group in groups)
    assert len(groups) == 3 and categorical.batches([500], 100) == [[0]]


def test_only_the_letters_rows_of_the_head_are_multiplied(monkeypatch):
    model = tiny.model(sequence_len=128).eval()
    monkeypatch.setattr(type(model), "logits", lambda *_: pytest.fail("the whole head"))
    monkeypatch.setattr(model.lm_head, "forward", lambda *_: pytest.fail("the whole head"))
    categorical.letter_logits(model, TOKENIZER, questions(3))


def test_a_letter_of_several_tokens_is_refused():
    assert categorical.letter_ids(TOKENIZER, "AB") == [65, 66] == [*b"AB"]
    with pytest.raises(ValueError, match="tokens, wanted one"):
        categorical.letter_ids(TOKENIZER, ["A", "春"])


# ---- permuted options


def test_a_shift_moves_the_options_and_the_right_letter():
    question = choice("Which - one=A?", ["red", "two\n- lines=B", "blue", "so = what"], "B")
    moved = letters.shifted(question, 1)
    text = moved.messages[-1]["content"]
    assert text == ("Which - one=A?\n- so = what=A\n- red=B\n- two\n- lines=B=C\n- blue=D\nAnswer with the letter.")
    assert moved.expected == "C" and letters.shifted(question, 0) == question == letters.shifted(question, 4)
    assert letters.shifted(letters.shifted(choice("Q?", "wxyz", "D"), 3), 1) == choice("Q?", "wxyz", "D")
    with pytest.raises(ValueError, match="no list of options"):
        letters.shifted(Question(ask("A or B?"), "A", letters=("A", "B")), 1)
    with pytest.raises(ValueError, match='no line "- option=B"'):
        letters.shifted(Question(ask("Q?\n- x=A\n* y=B\n"), "A", letters=("A", "B")), 1)


def test_who_always_says_a_letter_is_seen_and_who_reads_is_not_blamed():
    asked = [choice(f"Q{i}?", "wxyz", FOUR[i % 4]) for i in range(8)]

    def rows(reads):
        found = []
        for question in asked:
            shifts = [letters.shifted(question, by).expected if reads else "C" for by in range(4)]
            found.append(dict(expected=question.expected, letters=list(FOUR), shifts=shifts))
        return found

    biased, reader = letters.over_shifts(rows(False)), letters.over_shifts(rows(True))
    assert biased["rate"] == 0.25 and biased["steady"] == 0 and biased["by_position"] == dict(A=0, B=0, C=1, D=0)
    assert biased["letters"]["C"] == dict(expected=0.25, chosen=1.0) and biased["letters"]["A"]["chosen"] == 0
    assert reader["rate"] == 1 == reader["steady"] and set(reader["by_position"].values()) == {1.0}


def test_permuted_questions_are_the_plain_ones_first():
    model = tiny.model(sequence_len=128).eval()
    numbered = list(enumerate(questions(9)[:9]))
    once = categorical.answered(model, TOKENIZER, TASK, numbered)
    all_shifts = categorical.answered(model, TOKENIZER, TASK, numbered, permute=True)
    for a, b, (_, question) in zip(once, all_shifts, numbered):
        shifts = b.pop("shifts")
        assert a.pop("probabilities") == pytest.approx(b.pop("probabilities"), abs=2e-4)
        assert a == b and shifts[0] == a["answer"] and len(shifts) == len(question.letters)
        alone = categorical.answered(model, TOKENIZER, TASK, [(0, letters.shifted(question, 1))])
        assert alone[0]["answer"] == shifts[1]
