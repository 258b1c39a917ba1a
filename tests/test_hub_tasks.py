"""The Hub's data sets as tasks and conversations: the real rows of the mirror, and fixtures with their columns."""

import sys
import types

import hub_fixture
import pytest
import tiny

from nanochat.calculator import calculate
from nanochat.chat import Event, content
from nanochat.errors import UserError
from nanochat.tasks import CHATCORE, TASKS, arc, available, gsm8k, humaneval, mmlu, smoltalk
from nanochat.tasks.task import final_number


@pytest.fixture
def hub(shared, monkeypatch, tmp_path):
    """The real rows."""
    monkeypatch.setenv("NANOCHAT_HUB_ROOT", str(shared / "data" / "hub"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))


@pytest.fixture
def made(monkeypatch, tmp_path):
    """A mirror to write to."""
    monkeypatch.setenv("NANOCHAT_HUB_ROOT", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    (tmp_path / "hub").mkdir()
    return tmp_path / "hub"


def right(name, question, answer):
    return TASKS[name].grade(question, answer) == "right"


# ---- real rows


@pytest.mark.parametrize(
    "name, count", [("arc_easy", 2376), ("arc_challenge", 1172), ("gsm8k", 1319), ("humaneval", 164)]
)
def test_questions_are_all_there_in_a_fixed_order(hub, name, count):
    task = TASKS[name]
    questions = task.all_questions()
    assert len(questions) == len({q.id for q in questions}) == count
    assert questions == task.all_questions() and task.questions(7) == questions[:7]
    assert [q.id for q in questions] != sorted(q.id for q in questions)
    tokenizer = tiny.tokenizer()
    assert all(tokenizer.render_for_completion(q.messages) for q in questions[:50])


@pytest.mark.parametrize("name", ["arc_easy", "arc_challenge"])
def test_multiple_choice_has_its_letters_after_the_choices(hub, name):
    for q in TASKS[name].all_questions():
        assert q.expected in q.letters == ("A", "B", "C", "D")
        lines = q.messages[-1]["content"].split("\n")
        assert [line[-2:] for line in lines if line.startswith("- ")][-4:] == ["=A", "=B", "=C", "=D"]
        assert right(name, q, q.expected) and not any(right(name, q, x) for x in q.letters if x != q.expected)


def test_gsm8k_solutions_are_graded_right_and_their_marks_are_sums(hub):
    for q in TASKS["gsm8k"].all_questions():
        assert q.expected.lstrip("-").replace(".", "").isdigit()
        assert right("gsm8k", q, f"Some steps.\n#### {q.expected}")
        assert not right("gsm8k", q, f"#### {q.expected}1") and not right("gsm8k", q, q.expected)
    calls = same = 0
    for talk in gsm8k.train():
        answer = talk["messages"][1]["content"]
        assert final_number(answer[-1]["text"])
        for call, output in zip(answer, answer[1:]):
            if call["type"] == "python":
                assert output["type"] == "python_output"
                calls += 1
                same += calculate(call["text"]) == output["text"]
    assert calls > 20_000 and same > 0.96 * calls  # the others differ in how they are written: 9.00, .5


def test_a_gsm8k_solution_is_what_the_chat_would_have_made_of_it(hub):
    """Parts of training are those that an answer with tool calls has: what is trained is what is run."""
    answer = "He has 48/2 = <<48/2=24>>24 clips.\n#### 24"
    events = [
        Event("text", "He has 48/2 = "),
        Event("python", "48/2"),
        Event("python_output", "24"),
        Event("text", "24 clips.\n#### 24"),
    ]
    assert gsm8k.solution(answer) == content(events)
    tokenizer = tiny.tokenizer()
    ids, mask = tokenizer.render(gsm8k.train()[0])
    special = tokenizer.special
    trained = {token for token, learnt in zip(ids, mask) if learnt}
    assert {special["<|python_start|>"], special["<|python_end|>"], special["<|assistant_end|>"]} <= trained
    assert not {special["<|output_start|>"], special["<|user_start|>"]} & trained


def test_humaneval_answers_go_to_the_checker_with_their_problem(hub, monkeypatch):
    """A stand-in for the sandbox that runs the data set's own solutions, and nothing else."""

    def check(problem, completion, unsandboxed):
        if completion not in (problem["canonical_solution"], "    return None\n"):
            return "not run here"
        space: dict = {}
        exec(problem["prompt"] + completion + problem["test"], space)
        try:
            space["check"](space[problem["entry_point"]])
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return ""

    monkeypatch.setitem(sys.modules, "nanochat.humaneval", types.SimpleNamespace(check=check))
    questions = TASKS["humaneval"].questions(40)
    assert all(right("humaneval", q, q.expected) for q in questions)
    assert not any(right("humaneval", q, answer) for q in questions for answer in ("    return None\n", "pass", ""))


def test_the_real_smoltalk_can_be_trained_on(hub):
    tokenizer = tiny.tokenizer()
    assert (len(smoltalk.conversations("train")), len(smoltalk.conversations("test"))) == (950, 50)
    for talk in smoltalk.conversations("test"):
        _, mask = tokenizer.render(talk)
        assert any(mask)


def test_what_the_mirror_has(hub):
    assert available() == [name for name in CHATCORE if name != "mmlu"]
    with pytest.raises(UserError, match=r"no test-\*.parquet of cais/mmlu in .*cais/mmlu/all"):
        TASKS["mmlu"].questions(1)


# ---- fixtures


def test_nothing_is_read_before_it_is_asked_for(made):
    assert available() == ["spellingbee"]
    for name in set(CHATCORE) - {"spellingbee"}:
        with pytest.raises(UserError, match="the mirror has no"):
            TASKS[name].questions(1)


def test_mmlu(made):
    hub_fixture.mmlu(made, "test", hub_fixture.mmlu_rows("test", 30))
    hub_fixture.mmlu(made, "auxiliary_train", hub_fixture.mmlu_rows("auxiliary_train", 9))
    questions = TASKS["mmlu"].all_questions()
    assert sorted(q.id for q in questions)[:2] == ["astronomy/0", "astronomy/12"]
    for q in questions:
        number = int(q.id.split("/")[1])
        assert q.letters == mmlu.LETTERS and q.expected == "ABCD"[number % 4]
        word = ("one", "two", "three", "four")[number % 4]
        assert f"- {word} {number}={q.expected}\n" in q.messages[0]["content"]
    talks = mmlu.train()
    assert len(talks) == 9 and [talk["messages"][1]["content"] for talk in talks] == list("ABCDABCDA")
    tokenizer = tiny.tokenizer()
    ids, mask = tokenizer.render(talks[1])
    assert tokenizer.decode([token for token, learnt in zip(ids, mask) if learnt]) == "B<|assistant_end|>"
    assert "mmlu" in available()


def test_arc_of_three_choices(made):
    hub_fixture.arc(made, "ARC-Easy", "train", hub_fixture.arc_rows("train", 5))
    hub_fixture.arc(made, "ARC-Easy", "test", hub_fixture.arc_rows("test", 5))
    assert {q.letters for q in TASKS["arc_easy"].all_questions()} == {("A", "B", "C")}
    talk = arc.train("ARC-Easy")[1]["messages"]
    assert "- green 1=B\n" in talk[0]["content"] and talk[1]["content"] == "B"


def test_smoltalk_keeps_its_system_message(made):
    hub_fixture.smoltalk(made, "train", 3)
    talk = smoltalk.conversations("train")[2]
    assert [message["role"] for message in talk["messages"]] == ["system", "user", "assistant"]
    ids, mask = tiny.tokenizer().render(talk)
    assert sum(mask) == len(tiny.tokenizer().encode("answer 2")) + 1


def test_another_mirror_has_other_problems(made, monkeypatch, tmp_path):
    def row(text):
        return dict(task_id="HumanEval/0", prompt=text, canonical_solution="", test="", entry_point="f")

    for folder in ("hub", "other"):
        hub_fixture.write(tmp_path / folder, "openai/openai_humaneval", "openai_humaneval", "test", [row(folder)])
    assert TASKS["humaneval"].questions(1)[0].messages[0]["content"] == "hub"
    monkeypatch.setenv("NANOCHAT_HUB_ROOT", str(tmp_path / "other"))
    assert TASKS["humaneval"].questions(1)[0].messages[0]["content"] == "other"


def test_a_malformed_row_of_a_test_is_named(made):
    """Left out it would make another score."""
    arc_row, mmlu_row = hub_fixture.arc_rows("test", 1)[0], hub_fixture.mmlu_rows("test", 1)[0]
    question, problem = dict(question="1 and 2?", answer="#### 3"), dict.fromkeys(humaneval.COLUMNS, "pass")
    cases = [
        ("arc_easy", arc.EASY, arc_row, dict(answerKey="Z"), "its answerKey 'Z' is none of its labels"),
        (
            "arc_easy",
            arc.EASY,
            arc_row,
            dict(choices=dict(text=["a"], label=["A", "B"])),
            "it has 1 choices and 2 labels",
        ),
        ("mmlu", mmlu.TEST, mmlu_row, dict(answer=-1), "its answer is -1, wanted 0 to 3"),
        ("mmlu", mmlu.TEST, mmlu_row, dict(choices=["a", None, "b", "c"]), "its choices are .*, wanted texts"),
        ("gsm8k", gsm8k.TEST, question, dict(question=None), "its question is None, wanted a text"),
        ("humaneval", humaneval.TEST, problem, dict(test=None), "its test is None, wanted a text"),
    ]
    for name, split, sound, change, said in cases:
        hub_fixture.write(made, *split, [dict(sound, id="1"), {**sound, "id": "2", **change}])
        with pytest.raises(UserError, match=f"{split[0]}, {split[1]}, test, row 2 is malformed \\({said}"):
            TASKS[name].all_questions()
    hub_fixture.write(made, *gsm8k.TEST, [dict(question="?")])
    with pytest.raises(UserError, match=r"row 1 is malformed \(it has no 'answer'\); get the data set again"):
        TASKS["gsm8k"].all_questions()
