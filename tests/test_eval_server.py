"""nanochat.evaluate.server against our own server, and against one that is busy, broken, or says no."""

import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import tiny
from test_web import serving

from nanochat.engine import Sampling
from nanochat.errors import UserError
from nanochat.evaluate import server as servers
from nanochat.evaluate.server import Server
from nanochat.run import Run
from nanochat.tasks import TASKS, Question, Task
from nanochat.tasks.task import ask
from nanochat.web import mock


def asked(text, limit=20, temperature=0.0, seed=1):
    return ask(text), limit, Sampling(temperature, None, seed)


@pytest.fixture(scope="module")
def parrot():
    tokenizer = tiny.tokenizer()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(mock, "SECONDS", 0.0)
        with serving(mock.Parrot(tokenizer, 4), tokenizer, mock.CONTEXT) as (address, _):
            yield address


@contextmanager
def answering(*replies):
    """A server that gives these (status, headers, body) in turn, the last for ever: (address, what it was sent)."""
    left, seen = list(replies), []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"] or 0))
            seen.append((self.path, dict(self.headers), json.loads(body)))
            status, headers, content = left.pop(0) if len(left) > 1 else left[0]
            if status == 0:
                return self.connection.close()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content if isinstance(content, bytes) else json.dumps(content).encode())

        def do_GET(self):
            seen.append((self.path, dict(self.headers), {}))
            self.send_response(404)
            self.end_headers()

        def log_message(self, *words):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{httpd.server_address[1]}", seen
    finally:
        httpd.shutdown()
        thread.join()
        httpd.server_close()


def reply(text):
    return 200, {}, dict(choices=[dict(message=dict(content=text))])


@pytest.fixture
def waits(monkeypatch):
    """Nobody sleeps; what would have been slept."""
    found = []
    monkeypatch.setattr(servers.time, "sleep", found.append)
    return found


def test_our_own_server_answers_in_order_with_its_tool_calls(parrot):
    ticks = []
    texts = [f"say: number {i}" for i in range(9)]
    server = Server(parrot, "tiny", at_once=5)
    server.check()
    found = server.answer([ask(text) for text in texts], 20, [Sampling(0)] * 9, ticks.append)
    assert [one.text for one in found] == [text[5:] for text in texts]
    assert sum(ticks) == 9
    found = server.one(*asked("What is 2 + 3?", 400))
    assert found.python == ["2 + 3"] and "calculator" in found.text and not found.cropped
    assert server.one(*asked("say: " + "long " * 3000)).cropped


def test_the_script_keeps_a_servers_results_apart(parrot, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    task = Task("echo", "", lambda: [Question(ask(f"say: it is {i}"), str(i % 2)) for i in range(4)])
    monkeypatch.setitem(TASKS, "echo", task)
    flags = (f"--server={parrot}", "--model=tiny", "-b", "3")
    assert tiny.call("chat_eval", *flags, "-a", "echo,choice") == 1
    assert "choice: no result" in capsys.readouterr().err
    chat = Run.served("tiny").summary("eval")["chat"]
    assert chat["server"]["echo"]["outcomes"] == "rrww" and list(chat["server"]) == ["echo"]
    assert not (tmp_path / "runs").exists() and Run.served("tiny").folder.name == "tiny"
    assert re.fullmatch("a_b_c-[0-9a-f]{8}", Run.served("a/b c").folder.name)
    assert tiny.call("chat_eval", *flags, "--view") == 0
    assert "echo/2" in capsys.readouterr().out
    for more, words in (
        (["--model="], "wants --model"),
        (["--model=gpt"], "has no model 'gpt'; it lists tiny"),
        (["--api-key-env=NO_SUCH_KEY"], "which is not set"),
        (["--server=parrot"], "wanted an address"),
        (["--server=file:///etc/passwd"], "wanted an address"),
        (["--server=http://127.0.0.1:9"], "nothing that speaks OpenAI's API answers"),
    ):
        assert tiny.call("chat_eval", *flags, *more, "-a", "echo") == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1


def test_what_may_pass_is_tried_again(waits):
    busy, broken = (429, {"retry-after": "7"}, {}), (503, {}, dict(error=dict(message="loading")))
    nonsense, lost = (200, {}, b"<html>"), (0, {}, {})
    with answering(busy, broken, nonsense, lost, reply("at last")) as (address, seen):
        assert Server(address, "m").one(*asked("hello", temperature=0.5, seed=9)).text == "at last"
    assert len(seen) == 5 and len({json.dumps(body) for _, _, body in seen}) == 1
    path, headers, body = seen[0]
    assert path == "/v1/chat/completions" and "Authorization" not in headers
    assert body == dict(
        model="m", messages=[dict(role="user", content="hello")], max_tokens=20, temperature=0.5, seed=9
    )
    assert (
        waits[0] == 7
        and [0.5 <= wait / servers.FIRST_WAIT / 2**i <= 1 for i, wait in enumerate(waits)][1:] == [True] * 3
    )


def test_an_error_whose_body_breaks_off_is_tried_again(waits):
    broken = (503, {"transfer-encoding": "chunked"}, b"50\r\nthe mod")
    with answering(broken, reply("at last")) as (address, seen):
        assert Server(address, "m").one(*asked("hello")).text == "at last"
    assert len(seen) == 2


def test_an_answer_in_parts_is_joined_and_one_that_is_no_text_is_none(waits):
    parts = [dict(type="text", text="at "), dict(type="image"), dict(type="text", text="last")]
    with answering(reply(parts)) as (address, _):
        assert Server(address, "m").one(*asked("hello")).text == "at last"
    for content in (5, True, {}, ["text"], [dict(type="text", text=5)]):
        with answering(reply(content)) as (address, seen):
            with pytest.raises(UserError, match="6 tries: its answer is no chat completion"):
                Server(address, "m").one(*asked("a"))
        assert len(seen) == 6


@pytest.mark.parametrize("listed", [dict(data=5), dict(data=True), True, [1], dict(data=[5, dict(id=7)])])
def test_a_list_of_models_that_is_none_says_nothing(monkeypatch, listed):
    monkeypatch.setattr(Server, "_call", lambda self, path, body: listed)
    Server("http://127.0.0.1:1", "7").check()


def test_what_may_not_pass_is_said_once(waits):
    refusal = (400, {}, dict(error=dict(message="max_tokens is\ntoo large")))
    with answering(refusal) as (address, seen):
        with pytest.raises(UserError, match="400 max_tokens is too large"):
            Server(address, "m").answer([ask("a")], 20, [Sampling(0)], lambda done: None)
    assert len(seen) == 1 and not waits
    with answering((500, {}, b"oops")) as (address, seen), pytest.raises(UserError, match="6 tries: 500 oops"):
        Server(address, "m").one(*asked("a"))
    assert len(seen) == 6 and len(waits) == 5


def test_the_key_goes_to_the_server_and_nowhere_else(waits):
    with answering(reply("the other")) as (other, seen_there):
        moved = (302, {"location": other + "/v1/chat/completions"}, {})
        with answering(moved, reply("x")) as (address, seen):
            server = Server(address + "/v1/", "m", key="secret")
            try:
                server.one(*asked("a"))
            except UserError:
                pass
        assert seen[0][1]["Authorization"] == "Bearer secret"
        assert seen_there and not any("secret" in str(headers) for _, headers, _ in seen_there)
    assert "secret" not in repr(server)


@pytest.mark.parametrize(
    "url", ["http://[::1", "http://[x]/v1", "http://ex\u2100mple", "http://a:99999", "http://a:x", "http://:80"]
)
def test_an_address_that_is_none_is_one_sentence(url):
    with pytest.raises(UserError, match="--server is .*wanted an address like"):
        Server(url, "m")


@pytest.mark.parametrize("key", ["sec\rret", "“secret”", "sec\u00a0ret"])
def test_a_key_that_cannot_be_sent_is_not_printed(key):
    with pytest.raises(UserError, match="a character that no header can have") as said:
        Server("http://127.0.0.1:1", "m", key)
    assert "ret" not in str(said.value).replace("character", "")
    assert Server("http://127.0.0.1:1", "m", "secret\r\n").key == "secret"


def test_a_wait_that_is_not_a_number_is_ours():
    assert servers.pause(0, " 3 ") == 3
    for asked_for in ("²", "9" * 5000, "-1", "soon"):
        assert 0 < servers.pause(0, asked_for) <= servers.FIRST_WAIT
