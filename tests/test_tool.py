"""The Python tool: what it answers, and that nobody waits for it but whoever asked."""

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import tiny
from test_pool import TOKENIZER, Listener
from test_training import home, train  # noqa: F401 (home is a fixture)
from test_web import client, serving, wait_until

from nanochat import chat
from nanochat.calculator import calculate
from nanochat.engine import Engine, Request, Sampling
from nanochat.errors import UserError
from nanochat.sandbox import parent
from nanochat.sandbox import tool as module
from nanochat.sandbox.tool import PythonTool
from nanochat.web import metrics, mock
from nanochat.web.worker import Pool, Worker

SUM = dict(role="user", content="What is 2 + 3?")


def test_it_answers_with_output_value_or_error():
    tool = PythonTool(unsandboxed=True)
    for code, answer in [
        ("27 + 58", "85"), ("print('a')\n2 + 2", "a\n4"), ("x = 1", ""), ("print('b')", "b"),
        ("1/0", "error: ZeroDivisionError: division by zero"),
        ("print('so far'); 1/0", "so far\nerror: ZeroDivisionError: division by zero"),
        ("import os; os._exit(0)", "error: it ended before its last line"),
    ]:  # fmt: skip
        assert tool(code).result() == answer
    assert len(tool("print('x' * 5000)").result()) == module.LONGEST


def test_calls_run_beside_each_other_and_none_waits_for_ever(monkeypatch):
    monkeypatch.setattr(module, "LONGEST_WAIT", 0.2)
    tool = PythonTool(unsandboxed=True)
    answers = [tool("import time; time.sleep(1)") for _ in range(6)]
    assert [one.result() for one in answers] == [""] * 4 + ["error: too many calls"] * 2


def test_a_child_that_cannot_be_had_is_no_answer(monkeypatch):
    tool = PythonTool(unsandboxed=True)
    for problem in (UserError("no"), BlockingIOError(11, "no process")):
        monkeypatch.setattr(module, "run", lambda *_, problem=problem: (_ for _ in ()).throw(problem))
        assert tool("1").result() is None


# ---- in the state machine


class Slow:
    """A tool that answers when it is told to, or after some seconds."""

    def __init__(self, seconds=None):
        self.calls: list[tuple[str, Future]] = []
        self.seconds = seconds

    def __call__(self, code):
        future: Future = Future()
        self.calls.append((code, future))
        if self.seconds is not None:
            threading.Timer(self.seconds, lambda: future.cancelled() or future.set_result(calculate(code))).start()
        return future


@pytest.fixture
def calling(monkeypatch):
    """Every request begins with a call of the tool: what is between its prompt's last two user tokens."""
    plain = chat.request

    def request(tokenizer, messages, *others):
        made, special = plain(tokenizer, messages, *others), tokenizer.special
        call = tokenizer.encode(messages[-1]["content"])
        made.force([special["<|python_start|>"], *call, special["<|python_end|>"]])
        return made

    monkeypatch.setattr(chat, "request", request)


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(1.0, 20, seed=3, repetition_penalty=1.2)])
def test_an_answer_that_comes_late_is_the_answer_that_comes_at_once(calling, slots, sampling):
    talks = [[dict(role="user", content=text)] for text in ("2+2", "12*3", "the dog", "7-9", "(1+2)*4")]
    engine = Engine(tiny.model(), slots=slots)
    wanted = chat.answers(engine, TOKENIZER, talks, 24, sampling)
    assert [event.text for event in wanted[1][:2]] == ["12*3", "36"] and chat.visible_text(wanted[1])
    assert chat.answers(engine, TOKENIZER, talks, 24, sampling, Slow(0.02)) == wanted
    assert [list(chat.stream(engine, TOKENIZER, talk, 24, sampling, Slow(0.02))) for talk in talks] == wanted
    with ThreadPoolExecutor(2) as two:
        pooled = chat.answers(engine, TOKENIZER, talks, 24, sampling, lambda code: two.submit(calculate, code))
    assert pooled == wanted and engine.idle


def test_an_answer_that_ends_with_its_call_does_not_wait(calling):
    engine = Engine(tiny.model(), slots=2)
    talk = [dict(role="user", content="2+2")]
    for tokens in (len(TOKENIZER.encode("2+2")) + 2, 2):
        (events,) = chat.answers(engine, TOKENIZER, [talk], tokens, Sampling(0.0), Slow())
        assert [event.kind for event in events] == (["python"] if tokens > 2 else [])
        assert list(chat.stream(engine, TOKENIZER, talk, tokens, Sampling(0.0), Slow())) == events


def test_a_paused_request_holds_no_slot_and_goes_on_from_the_cache():
    engine = Engine(tiny.model(), slots=1)
    first, second = (Request(prompt, 12, Sampling(0.0)) for prompt in ([1, 2, 3], [4, 5, 6]))
    alone = [list(Engine(tiny.model(), slots=1).stream(Request(r.prompt, 12, Sampling(0.0)))) for r in (first, second)]
    engine.submit(first)
    engine.submit(second)
    for _ in range(5):
        engine.step()
    first.paused = True
    while not second.finished:
        engine.step()
        assert first not in engine.running
    first.paused = False
    engine.submit(first)
    while not engine.idle:
        engine.step()
    assert [first.output, second.output] == alone and first.cached == 0


# ---- in the server


class Counting(mock.Parrot):
    steps = 0

    def step(self):
        self.steps += 1
        return super().step()


@pytest.fixture
def waiting():
    """A worker with a job that waits for its tool: (pool, tool, what its owner is told)."""
    pool, tool, listener = Pool([Worker(Counting(TOKENIZER, 2), metrics.ended)], 8), Slow(), Listener()
    listener.job.request.prompt = TOKENIZER.render_for_completion([SUM])
    listener.job.reply.tool = tool
    pool.submit([listener.job])
    assert wait_until(lambda: tool.calls)
    yield pool, tool, listener
    pool.close()


def test_others_are_answered_while_one_waits_for_its_tool(waiting):
    pool, tool, listener = waiting
    others = [Listener(f"number {i}") for i in range(5)]
    for other in others:
        pool.submit([other.job])
    assert wait_until(lambda: all(other.over for other in others), 10)
    assert [other.text for other in others] == [f"number {i}" for i in range(5)] and not listener.over
    time.sleep(0.1)
    before = pool.workers[0].engine.steps
    time.sleep(0.2)
    assert pool.workers[0].engine.steps == before and pool.load == 1  # nor does it run in circles
    (code, future), = tool.calls  # fmt: skip
    assert code == "2 + 3"
    future.set_result("5")
    assert wait_until(lambda: listener.over)
    assert [event.text for event in listener.events[:-1] if event.kind != "text"] == ["2 + 3", "5"]
    assert listener.text == "Let me see.  That is what my calculator says." and listener.job.reason == "stop"


def test_who_leaves_while_the_tool_works_is_forgotten(waiting):
    pool, tool, listener = waiting
    pool.workers[0].cancel(listener.job)
    assert wait_until(lambda: listener.over) and pool.load == 0 and tool.calls[0][1].cancelled()
    again = Listener("still here")
    pool.submit([again.job])
    assert wait_until(lambda: again.over) and again.text == "still here"


def test_the_server_with_the_sandbox():
    if parent.missing():
        pytest.skip(f"cannot isolate here: {parent.missing()}")
    with serving(mock.Parrot(TOKENIZER, 8), TOKENIZER, mock.CONTEXT, tool=PythonTool()) as server:
        ask = lambda content: client(server).chat.completions.create(
            model="tiny", messages=[dict(role="user", content=content)]
        )
        with ThreadPoolExecutor(6) as threads:
            found = list(threads.map(ask, ["What is 2 ** 10?", "What is 9 ** 99 // 9 ** 98?", "say: hello"] * 2))
        events = [answer.choices[0].message.model_extra.get("events") for answer in found]
        assert [e and [part["text"] for part in e] for e in events[:3]] == [
            ["2 ** 10", "1024"], ["9 ** 99 // 9 ** 98", "9"], None,
        ]  # fmt: skip
        assert events[3:] == events[:3]
        assert client(server).completions.create(model="tiny", prompt="x", max_tokens=3).usage.completion_tokens == 3


def test_the_scripts_say_how_it_is_isolated_or_refuse(home, capsys, monkeypatch):  # noqa: F811
    assert train(home, "a") == 0
    capsys.readouterr()
    if not parent.missing():
        assert tiny.call("chat_cli", "--run=a", "-p", "the dog", "-m", "4", "--python-tool") == 0
        assert "Python runs with: Landlock ABI " in capsys.readouterr().out
    monkeypatch.setattr(parent.landlock, "abi", lambda: 0)
    for script in ("chat_cli", "chat_web"):
        assert tiny.call(script, "--run=a", "--python-tool") == 2
        assert "--allow-unsandboxed" in capsys.readouterr().err
    words = ["--run=a", "-p", "the dog", "-m", "4", "--python-tool", "--allow-unsandboxed"]
    assert tiny.call("chat_cli", *words) == 0
    assert "Python runs with: no isolation" in capsys.readouterr().out
    assert tiny.call("chat_cli", "--run=a", "-p", "the dog", "-m", "4") == 0
    assert "Python runs" not in capsys.readouterr().out
