"""The server through real clients: OpenAI's own, raw HTTP, raw sockets; with the parrot, and with a tiny model."""

import gzip
import json
import socket
import threading
import time
from collections import Counter
from contextlib import contextmanager

import httpx
import openai
import pytest
import tiny

from nanochat.engine import Engine
from nanochat.errors import UserError
from nanochat.web import metrics, mock
from nanochat.web import server as web_server
from nanochat.web.app import make_app
from nanochat.web.limits import Limits
from nanochat.web.served import Served
from nanochat.web.server import Door, listening
from nanochat.web.worker import Pool, Worker

HOSTS = frozenset({"127.0.0.1", "localhost"})


@contextmanager
def serving(engine, tokenizer, context, most=64, limits=None, **more):
    """A server of one engine, or of a list of them, on a free port, in a thread: (address, pool)."""
    limits = limits or Limits(HOSTS, header_seconds=1.0, body_seconds=1.0, body_bytes=100_000)
    engines = engine if isinstance(engine, list) else [engine]
    pool = Pool([Worker(engine, metrics.ended) for engine in engines], most)
    door = Door()
    with socket.create_server(("127.0.0.1", 0)) as at, listening(door, limits, at):
        door.open(make_app(Served(pool, tokenizer, "tiny", context, "sft", max_tokens=40, **more), limits))
        yield f"http://127.0.0.1:{at.getsockname()[1]}", pool
    pool.close()


@pytest.fixture(scope="module")
def parrot():
    tokenizer = tiny.tokenizer()
    with serving(mock.Parrot(tokenizer, 8), tokenizer, mock.CONTEXT) as found:
        yield found


@pytest.fixture(scope="module")
def real():
    """A model of random weights: it babbles, but through everything."""
    with serving(Engine(tiny.model(), slots=4), tiny.tokenizer(), 64) as found:
        yield found


def client(server, **options):
    return openai.OpenAI(base_url=server[0] + "/v1", api_key="any", max_retries=0, timeout=20, **options)


def say(text):
    return [dict(role="user", content=f"say: {text}")]


# ---- OpenAI's client


def test_models(parrot):
    assert [model.id for model in client(parrot).models.list()] == ["tiny"]
    assert client(parrot).models.retrieve("tiny").owned_by == "nanochat"
    with pytest.raises(openai.NotFoundError):
        client(parrot).models.retrieve("gpt-4")


@pytest.mark.parametrize("text", ["hello there", "né 春 🙂 ok", 'a <b> & "c" \n\n d'])
def test_streamed_or_whole_it_is_the_same_text(parrot, text):
    ask = lambda **more: client(parrot).chat.completions.create(model="tiny", messages=say(text), **more)
    whole = ask()
    assert whole.choices[0].message.content == text and whole.choices[0].finish_reason == "stop"
    chunks = list(ask(stream=True, stream_options=dict(include_usage=True)))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert len({c.id for c in chunks}) == 1 and chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(c.usage is None for c in chunks[:-1])


def test_length_stop_and_n(parrot):
    ask = lambda **more: client(parrot).chat.completions.create(model="tiny", messages=say("one two three"), **more)
    cut = ask(max_tokens=4).choices[0]
    assert cut.finish_reason == "length" and "one two three".startswith(cut.message.content)
    for stop in ("two", ["zzz", "e tw"], ["o thr", "e tw"]):
        found = ask(stop=stop)
        first = min("one two three".find(s) for s in ([stop] if isinstance(stop, str) else stop) if s != "zzz")
        assert found.choices[0].message.content == "one two three"[:first]
        assert found.choices[0].finish_reason == "stop"
        streamed = ask(stop=stop, stream=True)
        assert "".join(c.choices[0].delta.content or "" for c in streamed) == "one two three"[:first]
    assert [c.index for c in ask(n=3).choices] == [0, 1, 2]


def test_log_probabilities_spell_the_answer(parrot):
    answer = client(parrot).chat.completions.create(
        model="tiny", messages=say("né 春"), logprobs=True, top_logprobs=3, stop=["zzz"]
    )
    tokens = answer.choices[0].logprobs.content
    assert b"".join(bytes(token.bytes) for token in tokens).decode() == "né 春"
    assert all(len(token.top_logprobs) == 3 and token.top_logprobs[0].token == token.token for token in tokens)


def test_a_tool_call_is_told_beside_the_text(parrot):
    question = dict(role="user", content="What is 2 + 3?")
    answer = client(parrot).chat.completions.create(model="tiny", messages=[question])
    message = answer.choices[0].message
    events = message.model_extra["events"]
    assert events == [dict(type="python", text="2 + 3"), dict(type="python_output", text="5")]
    parts = [dict(type="text", text="Let me see. "), *events, dict(type="text", text=" That is it.")]
    again = [question, dict(role="assistant", content=parts), *say("x")]
    assert client(parrot).chat.completions.create(model="tiny", messages=again).choices[0].message.content == "x"


def test_plain_completions(real):
    answer = client(real).completions.create(model="tiny", prompt="the dog", max_tokens=5, logprobs=2, seed=1)
    assert len(answer.choices[0].logprobs.tokens) <= 5 and answer.usage.prompt_tokens > 2
    names = [token for token in answer.choices[0].logprobs.tokens if not token.startswith("<|")]  # no text
    spelled = b"".join(bytes.fromhex(n[6:].replace("\\x", "")) if n.startswith("bytes:") else n.encode() for n in names)
    assert spelled.decode("utf-8", "replace") == answer.choices[0].text
    streamed = client(real).completions.create(model="tiny", prompt="the dog", max_tokens=5, seed=1, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == answer.choices[0].text


def test_the_same_seed_says_the_same(real):
    ask = lambda seed: client(real).chat.completions.create(
        model="tiny", messages=say("a"), seed=seed, max_tokens=12, temperature=1.5
    )
    answers = [ask(seed).choices[0].message.content for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(model="gpt-4"), openai.NotFoundError, "there is no model"),
        (dict(temperature=3), openai.BadRequestError, "temperature"),
        (dict(top_logprobs=2), openai.BadRequestError, "logprobs: true"),
        (dict(messages=[]), openai.BadRequestError, "messages"),
        (dict(messages=[dict(role="assistant", content="x")]), openai.BadRequestError, "must be the user's"),
        (dict(messages=[*say("x"), dict(role="assistant", content="x")]), openai.BadRequestError, "must be the user's"),
        (dict(max_tokens=0), openai.BadRequestError, "max_tokens is 0"),
        (dict(presence_penalty=1), openai.BadRequestError, "repetition_penalty"),
        (dict(tools=[dict(type="function", function=dict(name="f"))]), openai.BadRequestError, "tools"),
        (dict(extra_body=dict(top_k=-2)), openai.BadRequestError, "top_k"),
        (dict(n=17), openai.BadRequestError, "n:"),
        (dict(stop=[""]), openai.BadRequestError, "stop"),
        (dict(logit_bias={"5": 100}), openai.BadRequestError, "logit_bias is not supported"),
        (dict(functions=[dict(name="f")]), openai.BadRequestError, "calls its own calculator"),
        (
            dict(messages=[dict(role="user", content=[dict(type="image_url", image_url=dict(url="x"))])]),
            openai.BadRequestError,
            r"messages.0.content.0.type: Input should be 'text'",
        ),
    ],
)
def test_bad_input_is_openais_exception(parrot, change, error, words):
    with pytest.raises(error, match=words) as raised:
        client(parrot).chat.completions.create(**{"model": "tiny", "messages": say("x"), **change})
    body = raised.value.response.json()["error"]
    assert set(body) == {"message", "type", "param", "code"}


def test_too_long_has_its_code_and_the_chat_drops_turns(real):
    turns = [dict(role=("user", "assistant")[i % 2], content="the dog sees a cat") for i in range(21)]
    with pytest.raises(openai.BadRequestError) as raised:
        client(real).chat.completions.create(model="tiny", messages=turns)
    assert raised.value.code == "context_length_exceeded"
    client(real).chat.completions.create(model="tiny", messages=turns, max_tokens=8, extra_body=dict(truncation="auto"))


# ---- everything else


def test_the_old_endpoint(parrot):
    with httpx.stream("POST", parrot[0] + "/chat/completions", json=dict(messages=say("né 春"))) as answer:
        lines = [json.loads(line[6:]) for line in answer.iter_lines() if line]
    assert "".join(line.get("token", "") for line in lines) == "né 春" and lines[-1] == dict(done=True)
    bad = httpx.post(parrot[0] + "/chat/completions", json=dict(messages=say("x" * 9000)))
    assert bad.status_code == 400 and "messages.0.content" in bad.json()["error"]["message"]


def test_health_stats_metrics_and_the_page(parrot):
    assert httpx.get(parrot[0] + "/health").json() == dict(status="ok")
    assert httpx.get(parrot[0] + "/stats").json()["slots"] == 8
    assert "nanochat_generated_tokens_total" in httpx.get(parrot[0] + "/metrics").text
    page = httpx.get(parrot[0] + "/")
    assert "default-src 'none'" in page.headers["content-security-policy"] and "/static/app.js" in page.text
    for name in ("app.js", "style.css", "tokens.js"):
        assert httpx.get(f"{parrot[0]}/static/{name}").status_code == 200
    assert httpx.get(parrot[0] + "/docs").json()["error"]["type"] == "not_found_error"


@pytest.mark.parametrize(
    "send, status",
    [
        (dict(content=b"{", headers={"content-type": "application/json"}), 400),
        (dict(content=b"[" * 50_000, headers={"content-type": "application/json"}), 400),
        (dict(content=b"{}", headers={"content-type": "text/plain"}), 415),
        (dict(content=b"x" * 200_000, headers={"content-type": "application/json"}), 413),
        (dict(json=dict(messages=say("x")), headers={"host": "evil.example"}), 400),
        (dict(json=[1, 2]), 400),
        (dict(json=dict(messages=say("x"), temperature="hot")), 400),
    ],
)
def test_what_is_no_request_gets_its_status(parrot, send, status):
    answer = httpx.post(parrot[0] + "/v1/chat/completions", **send)
    assert answer.status_code == status and answer.json()["error"]["message"]


def test_a_compressed_body_is_told_apart_from_broken_json(parrot):
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    content = gzip.compress(json.dumps(dict(messages=say("x"))).encode())
    answer = httpx.post(parrot[0] + "/v1/chat/completions", content=content, headers=headers)
    assert answer.status_code == 415 and "'gzip'; it must be plain JSON" in answer.json()["error"]["message"]
    as_it_is = dict(headers={"content-encoding": "identity"}, json=dict(model="tiny", messages=say("x")))
    assert httpx.post(parrot[0] + "/v1/chat/completions", **as_it_is).status_code == 200


def test_a_key_is_asked_for():
    tokenizer = tiny.tokenizer()
    with serving(mock.Parrot(tokenizer, 2), tokenizer, 500, limits=Limits(HOSTS, "secret")) as server:
        with pytest.raises(openai.AuthenticationError):
            client(server).models.list()
        right = openai.OpenAI(base_url=server[0] + "/v1", api_key="secret")
        assert right.models.list().data
        assert httpx.get(server[0] + "/health").status_code == httpx.get(server[0] + "/").status_code == 200


@pytest.mark.parametrize("junk", [b"\x16\x03\x01\0\0\r\n\r\n", b"GET /health HTTP/1.1\r\n\r\n", b"GET\r\n\r\n"])
def test_what_is_no_http_is_refused_in_openais_form_too(parrot, junk):
    status, body = exchange(parrot, junk)
    assert status == 400 and json.loads(body)["error"]["type"] == "invalid_request_error"


def exchange(server, content):
    """(status, body) of bytes sent on a socket of their own."""
    host, port = server[0][7:].split(":")
    with socket.create_connection((host, int(port)), timeout=20) as one:
        one.sendall(content)
        head, _, body = b"".join(iter(lambda: one.recv(65536), b"")).partition(b"\r\n\r\n")
    return int(head.split()[1]), body


def test_too_many_connections_are_refused_and_room_comes_back():
    tokenizer = tiny.tokenizer()
    with serving(mock.Parrot(tokenizer, 2), tokenizer, 500, limits=Limits(HOSTS, connections=3)) as server:
        host, port = server[0][7:].split(":")
        held = [socket.create_connection((host, int(port))) for _ in range(3)]
        assert exchange(server, b"")[0] == 503  # said before anything is asked
        for one in held:
            one.close()

        def answered():
            try:
                return httpx.get(server[0] + "/health").status_code == 200
            except httpx.TransportError:  # refused while it was still writing
                return False

        assert wait_until(answered)


def test_head_is_get_without_a_body(parrot):
    for path in ("/", "/health"):
        answer = httpx.head(parrot[0] + path)
        assert answer.status_code == 200 and not answer.content


def wait_until(done, seconds=3.0):
    for _ in range(round(seconds / 0.02)):  # counted in looks: a machine that stood still for a while took none
        if done():
            return True
        time.sleep(0.02)
    return done()


@pytest.mark.slow
def test_whoever_leaves_frees_the_slot_and_a_full_queue_says_when_to_come_back():
    tokenizer = tiny.tokenizer()
    with serving(mock.Parrot(tokenizer, 2), tokenizer, 2000, most=3) as server:
        pool = server[1]
        body = dict(messages=say("word " * 150), stream=True, max_tokens=400)
        streams = []
        for _ in range(2):
            opened = httpx.Client()
            asked = opened.build_request("POST", server[0] + "/v1/chat/completions", json=body)
            answer = opened.send(asked, stream=True)
            chunks = answer.iter_bytes()
            next(chunks)
            streams.append((opened, answer, chunks))
        waiting = threading.Thread(target=lambda: httpx.post(server[0] + "/v1/chat/completions", json=body, timeout=30))
        waiting.start()
        assert wait_until(lambda: pool.load == 3)
        full = httpx.post(server[0] + "/v1/chat/completions", json=body)
        assert full.status_code == 429 and int(full.headers["retry-after"]) >= 1
        assert httpx.get(server[0] + "/health").status_code == 200
        for opened, answer, _ in streams:
            answer.close()
            opened.close()
        assert wait_until(lambda: pool.load == 1, 1.0)  # the third has a slot now
        waiting.join()
        assert wait_until(lambda: pool.load == 0)


def test_slow_headers_and_slow_bodies_end(parrot):
    host, port = parrot[0][7:].split(":")
    slow = [socket.create_connection((host, int(port))) for _ in range(20)]
    for i, one in enumerate(slow):
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        one.sendall(head + (b"content-length: 50\r\n\r\n{" if i % 2 else b"x-slow: "))
    assert httpx.get(parrot[0] + "/health", timeout=1).status_code == 200
    for i, one in enumerate(slow):
        one.settimeout(5)
        found = one.recv(1000)
        assert b"408" in found if i % 2 else found == b""
        one.close()


def test_a_dead_engine_is_told():
    class Broken(mock.Parrot):
        def step(self):
            raise RuntimeError("the card fell off")

    tokenizer = tiny.tokenizer()
    with serving(Broken(tokenizer, 2), tokenizer, 500) as server:
        with pytest.raises(openai.InternalServerError, match="the card fell off"):
            client(server).chat.completions.create(model="tiny", messages=say("x"))
        assert httpx.get(server[0] + "/health").status_code == 503


def test_stop_strings_over_token_borders():
    from nanochat.chat import Reply, visible_text
    from nanochat.engine import Request, Sampling

    tokenizer = tiny.tokenizer()
    for text, stops, shown in (
        ("abcabd.", ["abd"], "abc"),
        ("aaab", ["aab"], "a"),
        ("no stop here", ["herein"], "no stop here"),
        ("x<|end|>y", ["<|end|>"], "x"),
        ("春春é", ["é"], "春春"),
    ):
        reply = Reply(tokenizer, Request([1], 99, Sampling()), stops)
        events = [event for token in tokenizer.encode(text) for event in reply.feed(token)]
        assert not any(stop in visible_text(events) for stop in stops)
        assert visible_text(events + reply.finish()) == shown and reply.stopped == (shown != text)


def asked_at_random(operation, mode, statuses, **right):
    """Hundreds of requests of one kind; `right` are fields of the body that are put right, so that it gets further."""
    from hypothesis import HealthCheck, given, settings

    @given(operation.as_strategy(generation_mode=mode))
    @settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    def never(found):
        if right:
            found.body.update(right)
        answer = found.call(timeout=30)
        statuses[answer.status_code] += 1
        assert answer.status_code < 500, answer.text
        assert answer.status_code < 400 or set(answer.json()["error"]) == {"message", "type", "param", "code"}

    never()


@pytest.mark.slow
def test_thousands_of_random_requests_never_break_it(real):
    """Every endpoint of the schema: what fits the schema, what does not, and what gets as far as the model."""
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    from schemathesis import GenerationMode

    seen = {}
    for result in schemathesis.openapi.from_url(real[0] + "/openapi.json").get_all_operations():
        operation = result.ok()
        post = operation.method == "post"
        statuses = seen[f"{operation.method.upper()} {operation.path}"] = Counter()
        asked_at_random(operation, GenerationMode.POSITIVE, statuses)
        if post:
            asked_at_random(operation, GenerationMode.NEGATIVE, statuses)
            right = dict(prompt="the dog") if operation.path == "/v1/completions" else dict(messages=say("a"))
            asked_at_random(operation, GenerationMode.POSITIVE, statuses, model="tiny", **right)
        assert statuses[404 if "{name}" in operation.path else 200] and (statuses[400] or not post), statuses
    print(seen)
    assert set(seen) == {
        "GET /health", "GET /stats", "GET /tokenizer_info", "GET /v1/models", "GET /v1/models/{name}",
        "POST /chat/completions", "POST /detokenize", "POST /tokenize", "POST /v1/chat/completions",
        "POST /v1/completions",
    }  # fmt: skip
    assert httpx.get(real[0] + "/health").json() == dict(status="ok")
    assert wait_until(lambda: real[1].load == 0)


def test_a_system_without_ipv6_is_one_sentence(monkeypatch):
    def refuses(family):
        raise OSError(97, "Address family not supported by protocol")

    monkeypatch.setattr(web_server, "socket", refuses)
    with pytest.raises(UserError, match=r"cannot listen on \[::1\]:8000: Address family not supported"):
        web_server.listen("::1", 8000)
