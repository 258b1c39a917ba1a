"""Tasks that need no data: what is graded as right, spelling, who the model is, and that it can be trained on."""

import re

import pytest
import tiny

from nanochat.calculator import calculate
from nanochat.errors import UserError
from nanochat.tasks import CHATCORE, MICROWORLD, TASKS, Question, customjson, identity, spellingbee
from nanochat.tasks.rows import key
from nanochat.tasks.task import final_number
from nanochat.tasks.wordlist import HELD_OUT, TRAINED, adjective, noun, verb

MADE = dict(
    spellingbee=spellingbee.count_train(2000),
    simple_spelling=spellingbee.spell_train(2000),
    identity=identity.Rendered(range(identity.ROWS), identity._talk),
)


def right(name: str, expected: str, answer: str) -> bool:
    return TASKS[name].grade(Question([], expected), answer) == "right"


def parts(content) -> list[dict]:
    return [dict(type="text", text=content)] if isinstance(content, str) else content


# ---- grading


@pytest.mark.parametrize("name", ["gsm8k", "spellingbee"])
@pytest.mark.parametrize(
    "answer, good",
    [
        ("#### 1234", True),
        ("So it is\n#### 1,234", True),
        ("#### 1234 is it", True),
        ("1234", False),
        ("#### 12345", False),
        ("####1234", False),
        ("#### 7\n#### 1234", False),  # the first counts
        ("#### -1234", False),
        ("#### 1234.", False),  # as upstream: the full stop belongs to the number
        ("", False),
    ],
)
def test_the_number_after_the_mark(name, answer, good):
    assert right(name, "1234", answer) is good


def test_final_numbers():
    assert final_number("#### -3.50") == "-3.50" and final_number("#### $5") is None


@pytest.mark.parametrize("name", ["arc_easy", "arc_challenge", "mmlu"])
def test_a_letter_is_right_alone(name):
    assert right(name, "B", "B") and right(name, "B", "B.")
    assert not any(right(name, "B", answer) for answer in ("A", "b", "A or B", "B C", "", "Bananas"))
    assert TASKS[name].chance == 0.25


def test_spelling_wants_the_letters_apart_and_nothing_else():
    expected = "\n".join("apple")
    assert all(right("simple_spelling", expected, answer) for answer in (expected, "a-p-p-l-e", "A, P, P, L, E."))
    wrong = ("apple", "a p l e", "a p p l e s", "a p p l e 1", "spelled a p p l e", "")
    assert not any(right("simple_spelling", expected, answer) for answer in wrong)


def test_the_names_are_those_of_the_report():
    assert set(CHATCORE) | set(MICROWORLD) | {"simple_spelling", "word_sums"} == set(TASKS)
    assert not set(CHATCORE) & set(MICROWORLD)
    assert {name for name, task in TASKS.items() if task.limit > 64} == {"gsm8k", "humaneval", "spellingbee"}


# ---- words and spelling


def test_regular_forms():
    assert noun("lady") == ["lady", "ladies"] and noun("church")[1] == "churches" and noun("key")[1] == "keys"
    assert verb("try") == ["try", "tries", "tried", "trying"]
    assert verb("like") == ["like", "likes", "liked", "liking"]
    assert verb("agree")[2:] == ["agreed", "agreeing"] and verb("play")[2:] == ["played", "playing"]
    assert adjective("happy")[1:] == ["happily", "happiness"] and adjective("gentle")[1] == "gently"
    assert adjective("dull")[1:] == ["dully", "dullness"] and adjective("wise")[1] == "wisely"


def test_held_out_words_are_never_trained():
    assert not set(TRAINED) & set(HELD_OUT)
    assert len(TRAINED) > 4000 and len(HELD_OUT) > 400
    assert all(re.fullmatch("[a-z]{3,}", word) for word in TRAINED + HELD_OUT)
    said = {word for name in ("spellingbee", "simple_spelling") for talk in MADE[name] for word in words(talk)}
    assert len(said & set(TRAINED)) > 1500 and not said & (set(HELD_OUT) - frame_words())
    for name in ("spellingbee", "simple_spelling"):
        assert {q.id.split("/")[1] for q in TASKS[name].all_questions()} == set(HELD_OUT)


def words(talk) -> set[str]:
    return set(re.findall("[a-z]+", " ".join(m["content"] for m in talk["messages"] if m["role"] == "user").lower()))


def frame_words() -> set[str]:
    frames = " ".join(spellingbee.COUNT_FRAMES + spellingbee.SPELL_FRAMES).lower()
    return set(re.findall("[a-z]+", frames))


def test_counting_ends_with_the_count_that_the_tool_gives():
    for talk in MADE["spellingbee"]:
        text, call, output, last = talk["messages"][1]["content"]
        word, letter = re.fullmatch(r'"(\w+)".count\("(\w)"\)', call["text"]).groups()
        asked = talk["messages"][0]["content"]
        assert word in asked and letter in asked.replace(word, "")
        lines = text["text"].split("\n")
        assert lines[0] == word and "".join(line[0] for line in lines[1:-1]) == word
        counts = [line[2:] for line in lines[1:-1] if line[0] == letter]
        assert counts == [str(i + 1) for i in range(word.count(letter))]
        assert [line for line in lines[1:-1] if line[0] != letter and len(line) > 1] == []
        assert output["text"] == calculate(call["text"]) == str(word.count(letter)) == final_number(last["text"])
        assert right("spellingbee", str(word.count(letter)), text["text"] + last["text"])


def test_every_letter_begins_its_line_and_is_one_token():
    tokenizer = tiny.tokenizer()
    for name in ("simple_spelling", "spellingbee"):
        content = parts(MADE[name][0]["messages"][1]["content"])[0]["text"]
        for line in content.split("\n"):
            if len(line) == 1:
                (token,) = tokenizer.encode(line)
                assert token in tokenizer.encode(content)


def test_questions_of_spelling():
    for name in ("spellingbee", "simple_spelling"):
        questions = TASKS[name].all_questions()
        assert questions == TASKS[name].all_questions() and len({q.id for q in questions}) == len(questions)
        assert all(q.messages[-1]["role"] == "user" and not q.letters for q in questions)
    zero = [q for q in TASKS["spellingbee"].all_questions() if q.expected == "0"]
    assert 0 < len(zero) < 60  # a letter that is not there, now and then


# ---- who it is


def test_identity_conversations_are_many_and_name_the_model(monkeypatch, tmp_path):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    talks = identity.conversations()
    assert len(talks) == 1000 and talks[5] == identity.conversations()[5]
    distinct = {str(talk) for talk in talks}
    assert len(distinct) > 600
    assert sum("nanochat" in text for text in distinct) > 300


def test_a_file_of_ones_own_takes_the_place_of_the_identity(monkeypatch, tmp_path):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    lines = '[{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ada."}]\n'
    (tmp_path / identity.FILE).write_text(lines * 3)
    assert [talk["messages"][1]["content"] for talk in identity.conversations()] == ["Ada."] * 3
    (tmp_path / identity.FILE).write_text(lines + '[{"role": "assistant", "content": "Ada."}]\n')
    with pytest.raises(UserError, match="identity_conversations.jsonl, line 2"):
        identity.conversations()
    with pytest.raises(UserError, match="is empty"):
        customjson.conversations(empty(tmp_path))


def empty(folder):
    (folder / "empty.jsonl").write_text("")
    return folder / "empty.jsonl"


# ---- training


@pytest.mark.parametrize("name", MADE)
def test_what_is_made_can_be_trained_on(name):
    tokenizer = tiny.tokenizer()
    for talk in list(MADE[name])[:200]:
        ids, mask = tokenizer.render(talk)
        assert len(ids) == len(mask) and ids[0] == tokenizer.bos
        learnt = tokenizer.decode([token for token, trained in zip(ids, mask) if trained])
        for message in talk["messages"]:
            for part in parts(message["content"]):
                if message["role"] == "assistant" and part["type"] != "python_output":
                    assert part["text"] in learnt
        assert "<|output_start|>" not in learnt and "<|user_start|>" not in learnt


def test_the_same_question_however_it_is_written():
    assert key(" What is\nIT? ") == key("what is it") != key("what is that")
