"""Answers by writing: the engine's are chat.answers', samples have their own seeds, pass@k is what it estimates."""

import itertools
import math

import pytest
import tiny

from nanochat import chat
from nanochat.engine import Engine, Sampling
from nanochat.evaluate import generative
from nanochat.evaluate.chatcore import chatcore
from nanochat.tasks import CHATCORE, Question, Task
from nanochat.tasks.task import ask
from nanochat.web import mock

TOKENIZER = tiny.tokenizer()
TASK = Task("fixture", "", lambda: [Question(ask(text), "the") for text in tiny.sentences(9, 5)])
NUMBERED = list(enumerate(TASK.questions(9)))


def test_greedy_answers_are_the_chats_own():
    answer = generative.by_engine(Engine(tiny.model(), slots=4), TOKENIZER)
    ticks = []
    rows = generative.answered(answer, TASK, NUMBERED, 8, Sampling(0), tick=ticks.append)
    talks = [question.messages for _, question in NUMBERED]
    plain = chat.answers(Engine(tiny.model(), slots=9), TOKENIZER, talks, 8, Sampling(0))
    assert [row["answer"] for row in rows] == [chat.visible_text(events).strip() for events in plain]
    assert sum(ticks) == 9 and [row["index"] for row in rows] == list(range(9)) and "samples" not in rows[0]
    short = [len(TOKENIZER.render_for_completion(talk)) < 64 for talk in talks]
    assert [not row["cropped"] for row in rows] == short and len(set(short)) == 2


def test_a_failure_leaves_the_engine_to_the_next_task(monkeypatch):
    engine, steps = Engine(tiny.model(), slots=2), []

    def broken(self):
        steps.append(1)
        if len(steps) == 3:
            raise MemoryError
        return plain(self)

    plain = Engine.step
    answer = generative.by_engine(engine, TOKENIZER)
    with monkeypatch.context() as patched:
        patched.setattr(Engine, "step", broken)
        with pytest.raises(MemoryError):
            generative.answered(answer, TASK, NUMBERED, 8, Sampling(0))
    fresh = generative.by_engine(Engine(tiny.model(), slots=2), TOKENIZER)
    again = [generative.answered(one, TASK, NUMBERED, 8, Sampling(0)) for one in (answer, fresh)]
    assert again[0] == again[1]


def test_samples_differ_and_do_not_depend_on_the_batch_or_the_rank():
    sampling = Sampling(1.0, None, seed=3)
    make = lambda slots: generative.by_engine(Engine(tiny.model(), slots=slots), TOKENIZER)
    texts = lambda rows: {row["index"]: (row["answer"], row["samples"]) for row in rows}
    together = texts(generative.answered(make(16), TASK, NUMBERED, 8, sampling, 3))
    halves = {}
    for rank in range(2):
        halves |= texts(generative.answered(make(3), TASK, NUMBERED[rank::2], 8, sampling, 3))
    assert together == halves
    asked = []
    note = lambda talks, limit, own, tick: [asked.append(one) or generative.Written("", []) for one in own]
    generative.answered(note, TASK, NUMBERED, 8, sampling, 3)
    assert len({one.seed for one in asked}) == 27 == len(asked)
    other = texts(generative.answered(make(16), TASK, NUMBERED, 8, Sampling(1.0, None, seed=4), 3))
    assert other != together


def test_the_tool_is_used_and_told(monkeypatch):
    monkeypatch.setattr(mock, "SECONDS", 0.0)
    task = Task("sum", "", lambda: [Question(ask("What is 27 + 58?"), "calculator"), Question(ask("say: hm"), "hm")])
    answer = generative.by_engine(mock.Parrot(TOKENIZER, 2), TOKENIZER)
    rows = generative.answered(answer, task, list(enumerate(task.questions(2))), 400, Sampling(0))
    assert [row["outcome"] for row in rows] == ["right", "right"]
    assert rows[0]["python"] == ["27 + 58"] and rows[1]["python"] == []
    assert rows[0]["answer"] == "Let me see.  That is what my calculator says."


@pytest.mark.parametrize("n, right", [(1, 0), (1, 1), (6, 2), (6, 0), (6, 6), (7, 1)])
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(n, right):
    samples = [True] * right + [False] * (n - right)
    for k in range(1, n + 1):
        draws = [any(draw) for draw in itertools.combinations(samples, k)]
        assert generative.pass_at_k(n, right, k) == pytest.approx(sum(draws) / len(draws))


def test_pass_at_k_is_unbiased():
    p, n, k = 0.3, 5, 3
    chances = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    assert sum(w * generative.pass_at_k(n, c, k) for c, w in enumerate(chances)) == pytest.approx(1 - (1 - p) ** k)
    with pytest.raises(ValueError, match="k=4"):
        generative.pass_at_k(3, 1, 4)


def test_chatcore_is_the_mean_of_centred_rates_and_says_what_is_missing():
    chances = dict(arc_easy=0.25, arc_challenge=0.25, mmlu=0.25)
    result = lambda name, rate: dict(n=50, rate=rate, low=rate - 0.1, high=rate + 0.1, chance=chances.get(name, 0.0))
    rates = dict(zip(CHATCORE, (0.25, 0.625, 1.0, 0.5, 0.0, 1.0)))
    whole = chatcore({**{name: result(name, rate) for name, rate in rates.items()}, "add_tool": result("", 1.0)})
    assert whole["score"] == pytest.approx((0 + 0.5 + 1 + 0.5 + 0 + 1) / 6) and not whole["partial"]
    half = math.sqrt(3 * (0.1 / 0.75) ** 2 + 3 * 0.1**2) / 6
    assert whole["high"] - whole["score"] == pytest.approx(half) == pytest.approx(whole["score"] - whole["low"])
    part = chatcore({"mmlu": result("mmlu", 0.4), "gsm8k": result("gsm8k", 0.1)})
    assert part["partial"] and part["missing"] == ["arc_easy", "arc_challenge", "humaneval", "spellingbee"]
    assert part["score"] == pytest.approx((0.2 + 0.1) / 2) and chatcore(dict(add_tool=result("", 1.0))) is None
